"""What the paged engine costs beside the one with rows, and how far a request's numbers move with its company.

    PYTHONPATH=src python benchmarks/paged_engine.py
    PYTHONPATH=src python benchmarks/paged_engine.py --served base-tiny MODEL --out benchmarks/results/company.json
    PYTHONPATH=src python benchmarks/paged_engine.py --served base-tiny --shaped --out benchmarks/results/shaped.json

The second form takes checkpoints as the server has them, weights as they are stored: how far log-probabilities of a
request among 8 and 32 others are from those of the same request alone, how many texts are others, and what the
batch-invariant mode, where nothing differs, costs.

Sides take turns within every repeat: contiguous rows (the engine of rollouts), blocks with the compiled kernel, blocks
that are gathered by torch before each step's attention, and the batch-invariant mode. Prefill of prompts of 128 tokens
comes before the clock; figures are CPU-seconds of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tafkir.checkpoint.packed import load_packed
from tafkir.engine.engine import Engine
from tafkir.engine.paged_engine import PagedEngine
from tafkir.engine.shaping import Shaper, Shaping
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops import native
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.model import ModelConfig
from tafkir.records import Request, SamplingParams
from tafkir.serve.grammar import GrammarCompiler
from tafkir.serve.schema import OutputRules

SIDES = ("rows", "paged", "gathered", "invariant")
PROMPT = 128
ALONE = 8
"""Requests that are also asked alone."""


def build(dtype: torch.dtype) -> Decoder:
    """29M parameters, 7M active: 32 experts of which a token visits four."""
    config = ModelConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=512, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4, n_group=1,
        topk_group=1, max_position_embeddings=2048,
    )  # fmt: skip
    decoder = build_decoder(config, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # fresh weights give nearly uniform logits
    decoder = decoder.to(dtype)
    for router in decoder.routers:
        if router.expert_bias is not None:
            router.expert_bias = router.expert_bias.float()
    return decoder


def engine_of(decoder: Decoder, side: str, batch: int) -> Engine:
    if side == "rows":
        return Engine(decoder, eos_ids=(), max_batch=batch)
    options: dict[str, Any] = {"batch_invariant": side == "invariant", "prefix_caching": False}
    with mock.patch.object(native, "takes", return_value=False) if side == "gathered" else nullcontext():
        return PagedEngine(decoder, eos_ids=(), max_batch=batch, **options)


def requests(batch: int, tokens: int, seed: int, vocab: int = 8192, temperature: float = 1.0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, vocab, (batch, PROMPT), generator=generator).tolist()
    wanted = {"max_tokens": tokens, "temperature": temperature}
    return [Request(str(i), tuple(p), SamplingParams(seed=i, **wanted)) for i, p in enumerate(prompts)]


MakeShaper = Callable[[Request], Shaper | None]


def penalties(request: Request) -> Shaper:
    return Shaper(Shaping(frequency_penalty=0.1, repetition_penalty=1.1), request.prompt_ids, 1.0)


def grammars(folder: Path) -> MakeShaper:
    """Objects after one another, without end."""
    end = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    end = end[0] if isinstance(end, list) else end
    rules = OutputRules(regex=r'(\{"name": "[a-z ]{1,40}", "n": [0-9]{1,9}\}, )+')
    grammar = GrammarCompiler(folder, end).compile(rules)
    wishes = Shaping(min_tokens=None, end_ids=(end,))
    return lambda request: Shaper(wishes, request.prompt_ids, 1.0, grammar.copy())


def seconds_per_token(
    decoder: Decoder, side: str, batch: int, tokens: int, seed: int, shaper: MakeShaper = lambda request: None
) -> float:
    """CPU-seconds of a sampled token once all prompts are in the cache."""
    engine = engine_of(decoder, side, batch)
    for request in requests(batch, tokens, seed, decoder.config.vocab_size):
        engine.add_request(request, shaper=shaper(request))
    while engine._batch.num_alive < batch:
        engine.step()
    began, sampled = time.process_time(), 0
    while engine.has_work:
        sampled += len(engine.step())
    return (time.process_time() - began) / sampled


def company(decoder: Decoder, side: str, count: int, tokens: int, temperature: float = 1.0) -> dict[str, Any]:
    """The same requests alone and all at once: where log-probabilities differ, before the first token that does."""
    asked = requests(count, tokens, 7, decoder.config.vocab_size, temperature)
    together = {done.request_id: done for done in engine_of(decoder, side, count).complete(asked)}
    gaps, changed = [], 0
    for request in asked[:ALONE]:
        (alone,) = engine_of(decoder, side, 1).complete([request])
        other = together[request.id]
        changed += alone.token_ids != other.token_ids
        for a, b, p, q in zip(alone.token_ids, other.token_ids, alone.logprobs, other.logprobs, strict=True):
            if a != b:
                break
            gaps.append(abs(p - q))
    return {"max": max(gaps), "mean": statistics.mean(gaps), "tokens": len(gaps), "changed_requests": changed}


def served(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """A checkpoint in the server's engine: what company does to a request, and what it costs that it does nothing."""
    decoder = load_packed(find_checkpoint(name)).decoder
    found: dict[str, Any] = {"checkpoint": Path(name).name}
    for count in (8, 32):
        for temperature, kind in ((0.0, "greedy"), (1.0, "sampled")):
            found[f"among_{count}_{kind}"] = company(decoder, "paged", count, tokens, temperature)
    found["invariant_among_8"] = company(decoder, "invariant", 8, tokens)
    for batch in (1, 8):
        pairs = []
        for repeat in range(repeats + 1):  # the first warms up
            sides = ("paged", "invariant") if repeat % 2 else ("invariant", "paged")
            spent = {side: seconds_per_token(decoder, side, batch, tokens, repeat) for side in sides}
            pairs += [spent["paged"] / spent["invariant"]] if repeat else []
        found[f"invariant_over_paged_{batch}"] = statistics.median(pairs)
    return found | shaped(name, tokens, repeats)


def shaped(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """What 32 requests with two penalties each, and with a grammar each, cost beside those without."""
    decoder = load_packed(find_checkpoint(name)).decoder
    sides: dict[str, MakeShaper] = {
        "plain": lambda request: None, "penalties": penalties, "grammars": grammars(find_checkpoint(name)),
    }  # fmt: skip
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):  # the first warms up
        for side in sorted(sides, reverse=bool(repeat % 2)):
            seconds = seconds_per_token(decoder, "paged", 32, tokens, repeat, sides[side])
            spent[side] += [seconds] if repeat else []
    found: dict[str, Any] = {"checkpoint": Path(name).name}
    for side in ("penalties", "grammars"):
        ratios = [a / b for a, b in zip(spent[side], spent["plain"], strict=True)]
        found[f"{side}_over_plain_32"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        found[f"{side}_ms_a_step_32"] = 32e3 * (statistics.median(spent[side]) - statistics.median(spent["plain"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--served", nargs="+", metavar="CHECKPOINT", help="these, as they are stored, and nothing else")
    parser.add_argument("--shaped", action="store_true", help="of those, only what penalties and grammars cost")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paged_engine.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.served:
        results = []
        for name in args.served:
            results.append((shaped if args.shaped else served)(name, args.tokens, args.repeats))
            print(json.dumps(results[-1]), flush=True)
            args.out.write_text(
                json.dumps({"tokens": args.tokens, "served": results}, indent=1) + "\n", encoding="utf-8"
            )
        return
    found: dict[str, Any] = {"kernels": native.kernels_in_use(), "prompt": PROMPT, "tokens": args.tokens, "speed": []}
    for dtype in args.dtypes:
        decoder = build(getattr(torch, dtype))
        for batch in args.batches:
            spent: dict[str, list[float]] = {side: [] for side in SIDES}
            for repeat in range(args.repeats + 1):  # the first warms up
                for side in SIDES if repeat % 2 else SIDES[::-1]:
                    seconds = seconds_per_token(decoder, side, batch, args.tokens, repeat)
                    if repeat:
                        spent[side].append(seconds)
            row = {"dtype": dtype, "batch": batch}
            for side in SIDES:
                pairs = [a / b for a, b in zip(spent["rows"], spent[side], strict=True)]
                row |= {side: 1 / statistics.median(spent[side]), f"{side}_over_rows": statistics.median(pairs)}
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            found["speed"].append(row)
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        found[f"company_{dtype}"] = {side: company(decoder, side, 16, 32) for side in ("rows", "paged", "invariant")}
        print(json.dumps(found[f"company_{dtype}"]), flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
