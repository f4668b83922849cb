"""What rollouts in fewer bits cost on the CPU engine, and how far they are from training in float32.

Speed: the same completions (fixed length, no stop) are sampled from one checkpoint in every format in turn; rates are
tokens per CPU-second, ratios are medians over pairs with float32 of the same repeat. What a refresh of the weights
costs stands beside it. Except for bfloat16 the engine computes in float32 with values that the format can hold, so
this shows what that imitation costs; hardware with 4-bit arithmetic is another question.

Mismatch: every format samples answers to the same problems; a float32 forward of the training code, on its own experts
and on those that the rollouts went to, gives the log-probabilities to compare with.

    python benchmarks/rollout_precision.py --out benchmarks/results/rollout_precision.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.completer import build_completer, checkpoint_of
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import linear_logprobs
from tafkir.recipe.rollout import RolloutConfig, RolloutPrecision
from tafkir.records import Completion, Request, SamplingParams
from tafkir.train.mismatch import mismatch_metrics
from tafkir.train.replay import compare_experts

PRECISIONS: tuple[RolloutPrecision, ...] = get_args(RolloutPrecision)
BAND = (0.5, 5.0)


def requests(tokenizer: Tokenizer, prompts: int, group: int, max_tokens: int) -> list[Request]:
    """The same problems and the same draws for every format."""
    asked = []
    for i in range(prompts):
        ids = tuple(tokenizer.encode(make_story(10**9 + i).question + "\n"))
        for j in range(group):
            asked.append(Request(f"{i}-{j}", ids, SamplingParams(seed=i * group + j, max_tokens=max_tokens)))
    return asked


def build_engines(folder: Path, only: Sequence[RolloutPrecision]) -> dict[RolloutPrecision, Engine]:
    return {precision: build_completer(folder, RolloutConfig(precision=precision)) for precision in only}


def cpu_seconds(action: Any) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def measure_speed(
    engines: dict[RolloutPrecision, Engine], decoder: Decoder, asked: Sequence[Request], repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens per CPU-second of sampling and CPU-seconds of a refresh, formats in turn; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    refreshes: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            stops, engine.eos_ids = engine.eos_ids, ()
            refresh = cpu_seconds(lambda engine=engine: engine.load_weights(decoder.state_dict().items(), 1))
            done: list[Completion] = []
            seconds = cpu_seconds(lambda engine=engine, done=done: done.extend(engine.complete(asked)))
            engine.eos_ids = stops
            if repeat:
                rates[name].append(sum(len(c.token_ids) for c in done) / seconds)
                refreshes[name].append(refresh)
    rows = {}
    for name in engines:
        ratios = [mine / base for mine, base in zip(rates[name], rates["float32"], strict=True)]
        rows[name] = {
            "tokens_per_cpu_s": round(statistics.median(rates[name]), 1),
            "tokens_per_cpu_s_min": round(min(rates[name]), 1),
            "tokens_per_cpu_s_max": round(max(rates[name]), 1),
            "ratio_to_float32": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "refresh_cpu_s": round(statistics.median(refreshes[name]), 4),
        }
    return rows


@torch.no_grad()
def training_logprobs(
    decoder: Decoder, asked: Sequence[Request], done: Sequence[Completion], replay: bool
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of all sampled tokens one after the other, and the experts of all tokens that were fed."""
    inputs = [request.prompt_ids + c.token_ids[:-1] for request, c in zip(asked, done, strict=True)]
    bounds = [0, *torch.tensor([len(ids) for ids in inputs]).cumsum(0).tolist()]
    sources = [torch.arange(bounds[i] + len(request.prompt_ids) - 1, bounds[i + 1]) for i, request in enumerate(asked)]
    recorded = list(torch.cat([c.expert_ids for c in done]).long().unbind(1)) if replay else None
    positions = torch.cat([torch.arange(len(ids)) for ids in inputs])
    out = decoder(torch.tensor([t for ids in inputs for t in ids]), positions, VarlenCausal(bounds), recorded)
    targets = torch.tensor([t for c in done for t in c.token_ids])
    return linear_logprobs(out.hidden_ND[torch.cat(sources)], decoder.head_weight, targets, 1.0), out.expert_ids


def measure_mismatch(engine: Engine, decoder: Decoder, asked: Sequence[Request]) -> dict[str, Any]:
    """The probe of one format: |Δ log p| in nats, tokens out of the band, and the same with experts replayed."""
    by_id = {completion.request_id: completion for completion in engine.complete(asked)}
    done = [by_id[request.id] for request in asked]
    sampled_T = torch.tensor([x for c in done for x in c.logprobs])
    sequence_T = torch.repeat_interleave(torch.tensor([len(c.token_ids) for c in done]))
    row: dict[str, Any] = {"tokens": len(sampled_T)}
    for name, replay in (("own_experts", False), ("replayed_experts", True)):
        if done[0].expert_ids is None and replay:
            continue
        train_T, experts = training_logprobs(decoder, asked, done, replay)
        masked_T = torch.zeros(len(train_T), dtype=torch.bool)
        found = mismatch_metrics(train_T, sampled_T, masked_T, sequence_T, len(done), low=BAND[0], high=BAND[1])
        if done[0].expert_ids is not None:
            record = list(torch.cat([c.expert_ids for c in done]).long().unbind(1))
            found |= compare_experts(experts, record).metrics()
        row[name] = {
            key.removeprefix("mismatch/"): float(f"{value:.4g}") for key, value in found.items() if "masked" not in key
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="base-tiny", help="checkpoint folder, run, or bundled name")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--speed-tokens", type=int, default=32)
    parser.add_argument("--probe-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = checkpoint_of(args.checkpoint)
    tokenizer, decoder = Tokenizer.load(folder), load_checkpoint(folder).decoder
    only = ["float32", *(name for name in args.precisions if name != "float32")]
    engines = build_engines(folder, only)
    speed = measure_speed(
        engines, decoder, requests(tokenizer, args.prompts, args.group, args.speed_tokens), args.repeats
    )
    probes = {
        name: measure_mismatch(engine, decoder, requests(tokenizer, args.prompts, args.group, args.probe_tokens))
        for name, engine in engines.items()
    }
    rows = {name: {**speed[name], **probes[name]} for name in engines}
    heads = f"{'tok/CPU-s':>10s} {'of fp32':>8s} {'refresh':>9s} {'mean |dlogp|':>13s} {'max':>7s} {'oob':>8s}"
    print(f"{'':12s} {heads} replayed: mean, oob")
    for name, row in rows.items():
        own = row["own_experts"]
        replayed = row.get("replayed_experts", own)
        print(
            f"{name:12s} {row['tokens_per_cpu_s']:10.0f} {row['ratio_to_float32']:8.2f} {row['refresh_cpu_s']:7.3f} s"
            f" {own['abs_logprob_diff_mean']:13.5f} {own['abs_logprob_diff_max']:7.3f} {own['out_of_band']:8.2%}"
            f" {replayed['abs_logprob_diff_mean']:.5f}, {replayed['out_of_band']:.2%}"
        )
    outcome = {
        "benchmark": "rollout_precision",
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "torch": torch.__version__,
        "threads": args.threads,
        "checkpoint": args.checkpoint,
        "repeats": args.repeats,
        "batch": args.prompts * args.group,
        "band": BAND,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
