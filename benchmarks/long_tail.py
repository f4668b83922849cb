"""How idle an engine is while a few long rollouts hold everyone up, and what a token budget changes about it.

The rollout sources are the real ones; the engine is simulated: a number of slots, one token per running sequence and
tick, completion lengths from a lognormal distribution cut at a limit. Going on with a cut completion costs a prefill
of its prompt and of what it had, during which no slot decodes. Every variant learns from about the same number of
tokens per step. Idle share: slot-ticks in which no token was sampled. Bias: mean length of what was learned from
after the first steps, over the mean of what is drawn.

    python benchmarks/long_tail.py --out benchmarks/results/long_tail.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from tafkir.recipe.long_tail import LongTailConfig
from tafkir.recipe.rl import RlvrConfig
from tafkir.records import Completion, Example, Request, Verdict
from tafkir.train.long_tail import open_rollouts

PROMPTS, GROUP, LIMIT, MEDIAN = 16, 8, 4096, 250
SLOTS = PROMPTS * GROUP
PROMPT_TOKENS, PREFILL_PER_TICK = 100, 2048
WARM_UP = 5
TAILS = {"light": 0.5, "heavy": 1.0}
"""Spread of the lengths' logarithm: of answers of one kind, and of long chains of thought."""


def length_of(seed: int, sigma: float) -> int:
    """Tokens of the completion that this random stream gives."""
    return max(1, min(LIMIT, round(MEDIAN * math.exp(Random(seed).gauss(0.0, sigma)))))


def mean_length(sigma: float, draws: int = 20_000) -> float:
    return statistics.fmean(length_of(-1 - i, sigma) for i in range(draws))


@dataclass
class SimulatedEngine:
    """Slots that sample one token a tick each; what waits takes the place of what ends."""

    sigma: float
    ticks: int = 0
    busy: int = 0
    prefilled: int = 0
    version: int = 0
    running: dict[str, list[Any]] = field(default_factory=dict)
    waiting: list[Request] = field(default_factory=list)

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        self.waiting, prompts = list(requests), set()
        while self.waiting or self.running:
            tokens = 0
            while self.waiting and len(self.running) < SLOTS:
                request = self.waiting.pop(0)
                left = length_of(request.params.seed or 0, self.sigma) - len(request.prefix_ids)
                self.running[request.id] = [request, left, 0]
                # A group's prompt is read once; what is gone on with is read whole, each for itself.
                group = request.id.partition(".")[0]
                if request.prefix_ids or group not in prompts:
                    tokens += PROMPT_TOKENS + len(request.prefix_ids)
                prompts.add(group)
            self.prefilled += tokens
            self.ticks += math.ceil(tokens / PREFILL_PER_TICK)
            span = min(left for _, left, _ in self.running.values())
            self.ticks += span
            self.busy += span * len(self.running)
            for entry in self.running.values():
                entry[1] -= span
                entry[2] += span
            ended = [request_id for request_id, (_, left, _) in self.running.items() if left == 0]
            yield from [self._piece(request_id, "stop") for request_id in ended]

    def _piece(self, request_id: str, reason: Any) -> Completion:
        _, _, sampled = self.running.pop(request_id)
        return Completion(request_id, (1,) * sampled, (0.0,) * sampled, reason, self.version)

    def cancel_all(self) -> list[Completion]:
        ended = [self._piece(request_id, "cancelled") for request_id in list(self.running)]
        ended += [Completion(request.id, (), (), "cancelled", self.version) for request in self.waiting]
        self.waiting = []
        return ended

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version


class NoText:
    turn_end_id = 1

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class NoReward:
    name = "none"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        return Verdict("wrong", 0.0, None, "")


def prompts(step: int) -> list[tuple[Example, list[int]]]:
    return [(Example(f"{step}-{i}", "simulated", "train", "", ""), [1] * PROMPT_TOKENS) for i in range(PROMPTS)]


def simulate(sigma: float, tail: LongTailConfig, steps: int, seed: int) -> dict[str, float]:
    """One stage's rollouts; what the engine did meanwhile."""
    engine: Any = SimulatedEngine(sigma)
    words: Any = NoText()
    task: Any = NoReward()
    config = RlvrConfig(
        prompts_per_step=PROMPTS, group_size=GROUP, max_completion_tokens=LIMIT + 1, steps=steps, long_tail=tail
    )
    source = open_rollouts(engine, words, task, prompts, config, weights=lambda: (), seed=seed)
    lengths: list[list[int]] = []
    dropped = lag = 0.0
    for step in range(steps):
        groups = source(step)
        lengths.append([len(r.completion.token_ids) for group in groups for r in group.rollouts])
        numbers: Any = source.numbers()
        dropped += numbers.get("rollout/dropped_tokens", 0.0)
        lag += numbers.get("rollout/lag_mean", 0.0) / steps
    learned = sum(map(sum, lengths))
    late = [length for row in lengths[WARM_UP:] for length in row]
    return {
        "idle_share": 1 - engine.busy / (engine.ticks * SLOTS),
        "tokens_per_tick": learned / engine.ticks,
        "tokens_per_step": learned / steps,
        "dropped_share": dropped / max(1, engine.busy),
        "prefill_share": engine.prefilled / PREFILL_PER_TICK / engine.ticks,
        "lag_mean": lag,
        "length_bias": statistics.fmean(late) / mean_length(sigma),
    }


def variants(mean: float) -> dict[str, LongTailConfig]:
    """No control; then a budget of one step's tokens over a pool that is 1.5 and 2 times what a step trains on."""
    budget = round(PROMPTS * GROUP * mean)
    return {
        "synchronous": LongTailConfig(),
        "budget, pool 1.5x": LongTailConfig(token_budget=budget, pool_prompts=PROMPTS * 3 // 2, max_retention=99),
        "budget, pool 2x": LongTailConfig(token_budget=budget, pool_prompts=PROMPTS * 2, max_retention=99),
        "budget, pool 2x, retention 1": LongTailConfig(token_budget=budget, pool_prompts=PROMPTS * 2, max_retention=1),
    }


def measure(steps: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for tail, sigma in TAILS.items():
        for name, config in variants(mean_length(sigma)).items():
            runs = [simulate(sigma, config, steps, seed) for seed in range(repeats)]
            row: dict[str, Any] = {"tail": tail, "variant": name}
            for key in runs[0]:
                values = [run[key] for run in runs]
                row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            rows.append(row)
    for row in rows:
        base = next(each for each in rows if each["tail"] == row["tail"] and each["variant"] == "synchronous")
        row["speedup"] = row["tokens_per_tick"]["median"] / base["tokens_per_tick"]["median"]
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'tail':<6} {'variant':<30} {'idle':>16} {'speed':>6} {'dropped':>8} {'lag':>5} {'length bias':>16}")
    for row in rows:
        idle, bias = row["idle_share"], row["length_bias"]
        print(
            f"{row['tail']:<6} {row['variant']:<30} {idle['median']:>5.1%} {idle['min']:.0%}-{idle['max']:.0%}"
            f"{row['speedup']:>8.2f}x {row['dropped_share']['median']:>7.1%} {row['lag_mean']['median']:>5.2f}"
            f" {bias['median']:>5.2f} {bias['min']:.2f}-{bias['max']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.process_time()
    rows = measure(args.steps, args.repeats)
    show(rows)
    if args.out:
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "slots": SLOTS,
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "median_length": MEDIAN,
            "length_limit": LIMIT,
            "sigma": TAILS,
            "prefill_tokens_per_tick": PREFILL_PER_TICK,
            "steps": args.steps,
            "repeats": args.repeats,
            "cpu_s": time.process_time() - began,
            "python": platform.python_version(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
