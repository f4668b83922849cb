"""What each way of choosing NVFP4 weights and activation scales loses on a trained model, weights and activations.

    python benchmarks/quantize_algorithms.py base-tiny wordmath-tiny=PATH       about three CPU-minutes for each model
    python benchmarks/quantize_algorithms.py --table                            the table of docs/quantization.md

All matrices of the layers become NVFP4 (preset all-linear). Calibration reads 16,384 tokens of made-up word problems,
the measure the solutions of others of the same kind. W4A16: weights alone; W4A4: inputs of every matrix rounded, too,
as engines do. Divergence is in thousandths of a nat per token, against the model that was quantized.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.chat import encode_conversation, encode_document
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.quant.calibrated import write_quantized
from tafkir.quant.served import load_served
from tafkir.quant.verify import audit_checkpoint, summarize_audit
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.quantize import QuantizeConfig

RESULTS = Path(__file__).parent / "results" / "quantize_algorithms.json"
CALIBRATION_TOKENS, MEASURED_TOKENS, FIRST_STORY = 16_384, 8_192, 4 * 10**9
_BATCH = 64  # documents in one forward

# Name: scales, GPTQ and its order, ranges of activations (None: a scale of one, without data).
VARIANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "max, no data": ("max", {}, None),
    "four_over_six, no data": ("four_over_six", {}, None),
    "mse, no data": ("mse", {}, None),
    "max": ("max", {}, "max"),
    "four_over_six": ("four_over_six", {}, "max"),
    "four_over_six, percentile": ("four_over_six", {}, "percentile"),
    "four_over_six, headroom": ("four_over_six", {}, "headroom"),
    "mse": ("mse", {}, "max"),
    "local_hessian": ("local_hessian", {}, "max"),
    "GPTQ, max": ("max", {"gptq": True}, "max"),
    "GPTQ, four_over_six": ("four_over_six", {"gptq": True}, "max"),
    "GPTQ, local_hessian": ("local_hessian", {"gptq": True}, "max"),
    "GPTQ by act_order, local_hessian": ("local_hessian", {"gptq": True, "act_order": True}, "max"),
}


Text = tuple[list[int], list[bool]]
"""Token ids, and which of them are the solution's: the others are what no training of these models predicts."""


def familiar_texts(folder: Path) -> list[Text]:
    """Problems as plain text or as conversations, whichever the model predicts better."""
    tokenizer, decoder = Tokenizer.load(folder), load_checkpoint(folder).decoder
    made = {}
    for encode in (encode_document, encode_conversation):
        few = [encode(tokenizer, make_story(FIRST_STORY + i)) for i in range(8)]
        made[perplexity(predictions(decoder, few), few)] = encode
    encode, found = made[min(made)], list[Text]()
    while sum(sum(mask) for _, mask in found) < MEASURED_TOKENS:
        found.append(encode(tokenizer, make_story(FIRST_STORY + len(found))))
    return found


@torch.no_grad()
def predictions(decoder: Decoder, texts: Sequence[Text]) -> list[Tensor]:
    """Log-probabilities of each token of the solution, [tokens, vocabulary]."""
    found = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        lengths = [len(ids) - 1 for ids, _ in batch]
        flat = torch.tensor([token for ids, _ in batch for token in ids[:-1]])
        positions = torch.cat([torch.arange(length) for length in lengths])
        out = decoder(flat, positions, VarlenCausal([0, *accumulate(lengths)]))
        for hidden_ND, (_, mask) in zip(out.hidden_ND.split(lengths), batch, strict=True):
            found.append(F.log_softmax(decoder.logits(hidden_ND[torch.tensor(mask[1:])]), dim=-1))
    return found


def perplexity(logs: Sequence[Tensor], texts: Sequence[Text]) -> float:
    nats = []
    for p, (ids, mask) in zip(logs, texts, strict=True):
        nats.append(-p.gather(1, torch.tensor(ids[1:])[torch.tensor(mask[1:])][:, None]).flatten())
    return math.exp(float(torch.cat(nats).mean()))


def divergence(reference: Sequence[Tensor], logs: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over tokens, and its standard error over documents, both x 1000."""
    sums = torch.tensor([float((p.exp() * (p - q)).sum()) for p, q in zip(reference, logs, strict=True)])
    counts = torch.tensor([float(len(p)) for p in reference])
    mean = float(sums.sum() / counts.sum())
    spread = float((sums - mean * counts).square().sum().sqrt() / counts.sum())
    return 1000 * mean, 1000 * spread


def measure(source: Path, name: str, work: Path, texts: list[Text], reference: list[Tensor]) -> dict[str, Any]:
    scales, how, ranges = VARIANTS[name]
    calibration = (
        None if ranges is None else {"tokens": CALIBRATION_TOKENS, "cold_experts": "force", "ranges": ranges, **how}
    )
    config = QuantizeConfig.model_validate({"preset": "all-linear", "scales": scales, "calibration": calibration})
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        _, found = write_quantized(source, out, config)
        row: dict[str, Any] = {"cpu_s": time.process_time() - began}
        parts = [part for part in summarize_audit(audit_checkpoint(source, out))["parts"] if part["format"] == "nvfp4"]
        count = sum(part["parameters"] for part in parts)
        row["relative_mse"] = sum(part["relative_mse"] * part["parameters"] for part in parts) / count
        row["gptq"] = found["gptq"] if found else None
        for label, decoder in (("w4a16", load_checkpoint(out).decoder), ("w4a4", load_served(out))):
            logs = predictions(decoder, texts)
            row[f"{label}_kl"], row[f"{label}_kl_error"] = divergence(reference, logs)
            row[f"{label}_perplexity"] = perplexity(logs, texts)
    return row


def table(results: dict[str, Any]) -> str:
    lines = []
    for model, found in results.items():
        head = f"| {model}, perplexity {found['perplexity']:.4f} | weights' rel. MSE | W4A16 KL | W4A4 KL "
        head += "| W4A4 perplexity | CPU-s |"
        lines += [head, "|---|---|---|---|---|---|"]
        for name, row in found["variants"].items():
            kls = [f"{row[f'{kind}_kl']:.2f} ± {row[f'{kind}_kl_error']:.2f}" for kind in ("w4a16", "w4a4")]
            numbers = (f"{row['relative_mse']:.2e}", *kls, f"{row['w4a4_perplexity']:.4f}", f"{row['cpu_s']:.1f}")
            lines.append(f"| {name} | {' | '.join(numbers)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="bundled names, folders, or NAME=FOLDER")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants")
    parser.add_argument("--missing", action="store_true", help="those alone that are not measured yet")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    torch.set_num_threads(1)
    for model in options.models:
        name, _, place = model.rpartition("=")
        source = find_checkpoint(place)
        texts = familiar_texts(source)
        reference = predictions(load_checkpoint(source).decoder, texts)
        found = results.setdefault(name or place, {"variants": {}})
        found |= {"perplexity": perplexity(reference, texts), "tokens": sum(sum(mask) for _, mask in texts)}
        with tempfile.TemporaryDirectory() as work:
            for variant in options.only:
                if options.missing and variant in found["variants"]:
                    continue
                found["variants"][variant] = measure(source, variant, Path(work), texts, reference)
                print(variant, json.dumps(found["variants"][variant]), flush=True)
                found["variants"] = {key: found["variants"][key] for key in VARIANTS if key in found["variants"]}
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    if options.table or options.models:
        print(table(results))


if __name__ == "__main__":
    main()
