"""What mixing short and long answers costs: lengths of rollouts and idle share, joint RLVR + RLHF against two stages.

Ring-1T's authors found joint training as good as two stages, and rejected it because short open answers then wait for
the longest chains of thought (arXiv 2510.18855, section 2.3). This script samples the rollouts of one step of each
kind from a checkpoint and schedules their lengths on `--slots` parallel decoding slots, as an engine does: the idle
share is the part of slot-time in which a slot has nothing left to do while the step's last completion is still being
decoded.

    python benchmarks/joint_vs_two_stage.py --checkpoint base-tiny
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import time
from collections.abc import Sequence
from statistics import fmean, median, stdev

import torch

from tafkir.cli.completer import build_completer
from tafkir.data.chat import encode_prompt
from tafkir.data.loader import EpochOrder
from tafkir.data.preference import load_preferences
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.rlhf import PreferencesConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Request, SamplingParams

KINDS = ("rlvr", "rlhf", "joint")


def idle_share(lengths: Sequence[int], slots: int) -> float:
    """Share of slot-time that is idle when completions are decoded in order, each by the first slot that is free."""
    free = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return 1 - sum(lengths) / (len(free) * max(free))


def summarise(lengths: Sequence[int], slots: int) -> dict[str, float]:
    """Mean, spread and tail of the lengths of one step, and its idle share."""
    ordered = sorted(lengths)
    return {
        "mean": fmean(ordered),
        "median": median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
        "max_over_mean": ordered[-1] / fmean(ordered),
        "idle_share": idle_share(lengths, slots),
    }


class Sampler:
    """Lengths of completions to word problems and to open prompts, each kind with its own limit."""

    def __init__(self, checkpoint: str, open_limit: int, chain_limit: int, seed: int) -> None:
        folder = find_checkpoint(checkpoint)
        self.tokenizer, self.seed = Tokenizer.load(folder), seed
        self.completer = build_completer(folder)
        pairs = load_preferences(PreferencesConfig(max_length=400), self.tokenizer, seed).train
        self.prompts = [pair.prompt_ids for pair in pairs]
        self.order = EpochOrder(len(self.prompts), seed)
        self.limits = {"rlvr": chain_limit, "rlhf": open_limit}

    def lengths(self, kind: str, prompts: int, group_size: int, repeat: int) -> list[int]:
        requests = []
        for i in range(prompts):
            if kind == "rlvr":
                question = make_story(derive_seed(self.seed, repeat, i)).question
                ids = tuple(encode_prompt(self.tokenizer, question))
            else:
                ids = self.prompts[self.order[repeat * prompts + i]]
            for j in range(group_size):
                seed = derive_seed(self.seed, kind, repeat, i, j)
                stop = (self.tokenizer.turn_end_id,)
                params = SamplingParams(max_tokens=self.limits[kind], seed=seed, stop_token_ids=stop)
                requests.append(Request(f"{i}-{j}", ids, params))
        found = {done.request_id: len(done.token_ids) for done in self.completer.complete(requests)}
        return [found[request.id] for request in requests]


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """For each kind of step, every number of every repeat. A joint step takes half its prompts of either kind."""
    sampler = Sampler(arguments.checkpoint, arguments.open_limit, arguments.chain_limit, arguments.seed)
    rows: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for repeat in range(arguments.repeats):
        own = {
            kind: sampler.lengths(kind, arguments.prompts, arguments.group_size, repeat) for kind in ("rlvr", "rlhf")
        }
        half = arguments.prompts // 2 * arguments.group_size
        own["joint"] = own["rlvr"][:half] + own["rlhf"][:half]
        for kind in KINDS:
            for name, value in summarise(own[kind], arguments.slots).items():
                rows[kind].setdefault(name, []).append(value)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="base-tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--open-limit", type=int, default=64, help="length limit of answers to open prompts")
    parser.add_argument("--chain-limit", type=int, default=128, help="length limit of chains of thought")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    rows = measure(arguments)
    names = list(rows["joint"])
    print("| step | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for kind in KINDS:
        cells = [f"{fmean(v):.3g} ± {stdev(v) if len(v) > 1 else 0:.2g}" for v in rows[kind].values()]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print(json.dumps({"settings": vars(arguments), "rows": rows, "cpu_s": round(time.process_time() - began, 1)}))
    return rows


if __name__ == "__main__":
    main()
