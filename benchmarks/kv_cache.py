"""What a cache in FP8 or NVFP4 costs in predictions, and saves in bytes: on answers that a trained model gave itself.

    PYTHONPATH=src python benchmarks/kv_cache.py --checkpoint base-tiny --problems 64

The model answers made-up word problems with an exact cache, sampled. The same tokens are then fed through each cache,
one by one as in decoding; the distributions that follow are held against the exact ones. "calibrated" caches have the
scales that `tafkir quantize --kv-cache ... --calibrate task` writes, on other problems; the rest the formats' own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.cache_formats import CacheFormat, factor_of_stored
from tafkir.engine.coded_cache import build_cache
from tafkir.engine.engine import Engine
from tafkir.engine.views import Grouping
from tafkir.models.decoder import Decoder
from tafkir.quant.calibrate import calibrate_checkpoint
from tafkir.quant.calibration_text import read_calibration_text
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.quantize import CalibrationConfig, QuantizeConfig
from tafkir.records import Request, SamplingParams

Scales = Sequence[tuple[float, float]] | None


def problems(folder: Path, count: int) -> list[tuple[int, ...]]:
    """The first part of made-up word problems, as token ids."""
    from tafkir.data.chat import encode_document
    from tafkir.data.stories import make_story

    tokenizer = Tokenizer.load(folder)
    documents = [encode_document(tokenizer, make_story(10**9 + i))[0] for i in range(count)]
    return [tuple(ids[: max(8, len(ids) // 2)]) for ids in documents]


def calibrated(folder: Path, decoder: Decoder) -> list[tuple[float, float]]:
    """Largest magnitude / 448 of keys and values of every layer, on 16,384 tokens of made-up problems."""
    calibration = CalibrationConfig(tokens=16_384, cold_experts="data_free")
    config = QuantizeConfig(preset="all-linear", calibration=calibration)
    with tempfile.TemporaryDirectory() as scratch:
        found = calibrate_checkpoint(folder, Path(scratch), config, read_calibration_text(folder, calibration))
    return [found.cache_scales(layer) for layer in range(decoder.config.num_hidden_layers)]


@torch.no_grad()
def decode(
    decoder: Decoder,
    prompts: list[tuple[int, ...]],
    answers: list[tuple[int, ...]],
    format: CacheFormat,
    scales: Scales = None,
) -> tuple[Tensor, float]:
    """Log-probabilities [tokens, V] behind every fed token of the answers, and CPU-seconds of a step."""
    cache = build_cache(decoder.config, decoder.embed_tokens.weight, None, format, scales)
    rows = list(range(len(prompts)))
    longest = max(map(len, answers))
    cache.reserve_prompts(len(rows), max(map(len, prompts)))
    cache.reserve(len(rows), longest)
    view = cache.prefill_view(rows, [len(ids) for ids in prompts], torch.device("cpu"))
    decoder(torch.tensor([token for ids in prompts for token in ids]), view.positions_N, view)
    lengths = torch.tensor([len(ids) for ids in prompts])
    dtype = decoder.embed_tokens.weight.dtype
    grouping = Grouping.build(torch.tensor(rows), lengths, cache.num_heads, dtype)
    found, spent = [], 0.0
    for step in range(longest):
        fed = torch.tensor([ids[min(step, len(ids) - 1)] for ids in answers])
        began = time.process_time()
        decode_view = cache.decode_view(grouping, torch.full((len(rows),), step), step + 1)
        logits = decoder.logits(decoder(fed, lengths + step, decode_view).hidden_ND)
        spent += time.process_time() - began
        found.append(F.log_softmax(logits[[i for i in rows if step < len(answers[i])]].float(), dim=-1))
    return torch.cat(found), spent / longest


def measure(folder: Path, count: int, max_tokens: int) -> dict[str, Any]:
    decoder = load_checkpoint(folder).decoder
    prompts = problems(folder, count)
    engine = Engine(decoder, eos_ids=(2,))
    requests = [
        Request(str(i), ids, SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=i))
        for i, ids in enumerate(prompts)
    ]
    done = {completion.request_id: completion.token_ids for completion in engine.complete(requests)}
    answers = [done[str(i)] for i in range(count)]
    exact, _ = decode(decoder, prompts, answers, "auto")
    rows: dict[str, Any] = {}
    stored = calibrated(folder, decoder)
    own: dict[str, tuple[CacheFormat, Scales]] = {"auto": ("auto", None)}
    for format in ("fp8", "nvfp4"):
        own[format] = (format, None)
        scales = [(factor_of_stored(format, k), factor_of_stored(format, v)) for k, v in stored]
        own[f"{format} calibrated"] = (format, scales)
    for name, (format, scales) in own.items():
        steps = []
        for _ in range(5):
            found, spent = decode(decoder, prompts, answers, format, scales)
            steps.append(spent)
        cache = build_cache(decoder.config, decoder.embed_tokens.weight, None, format)
        kl = (exact.exp() * (exact - found)).sum(-1)
        rows[name] = {
            "bytes_per_token": cache.alone(32, 32) // 64,
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "logprob_drift_mean": float((exact - found).abs().gather(1, exact.argmax(-1, keepdim=True)).mean()),
            "same_first_choice": float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
            "step_cpu_ms": 1e3 * statistics.median(steps),
        }
    return {"tokens": len(exact), "sequences": count, "formats": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="base-tiny")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_cache.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(find_checkpoint(asked.checkpoint), asked.problems, asked.max_tokens)
    said = {"benchmark": "kv_cache", "checkpoint": Path(asked.checkpoint).name, **found}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(said, indent=2) + "\n")
    print(f"{found['tokens']:,} tokens of {found['sequences']} answers")
    for format, row in found["formats"].items():
        print(
            f"{format:<16} {row['bytes_per_token']:>6} bytes a token  KL {row['kl_mean']:.2e} (p99 {row['kl_p99']:.2e})"
            f"  same first choice {row['same_first_choice']:.2%}  step {row['step_cpu_ms']:.1f} CPU-ms"
        )


if __name__ == "__main__":
    main()
