"""What mixing short and long answers costs: lengths of rollouts and idle share, joint RLVR + RLHF against two stages.

Ring-1T's authors found joint training as good as two stages, and rejected it because short open answers then wait for
the longest chains of thought (arXiv 2510.18855, section 2.3). This script samples the rollouts of one step of each
kind from a checkpoint and schedules their lengths on `--slots` parallel decoding slots, as an engine does: the idle
share is the part of slot-time in which a slot has nothing left to do while the step's last completion is still being
decoded.

With `--quality DIR` it also trains both ways from one SFT checkpoint and one reward model (recipes/rlhf-tiny.toml), on
as many samples of each kind, and compares what comes out: held-out word problems, and what the reward model and a
judge that neither was trained on say of answers to held-out prompts.

    python benchmarks/joint_vs_two_stage.py --checkpoint base-tiny
    python benchmarks/joint_vs_two_stage.py --quality runs/joint --out benchmarks/results/joint_vs_two_stage.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from tafkir.checkpoint.load import load_reward_model
from tafkir.cli.completer import build_completer
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.chat import encode_prompt
from tafkir.data.loader import EpochOrder
from tafkir.data.preference import load_preferences
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.eval.metrics import paired_difference
from tafkir.eval.records import GREEDY, load_records
from tafkir.intervals import mean_interval
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.rlhf import PreferencesConfig, RlhfConfig
from tafkir.recipe.schema import Recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Request, SamplingParams
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tafkir.tasks.math import WordProblems
from tafkir.train.rlhf import OpenPrompts, OpenTask, RewardModelGrader
from tafkir.train.rollout import collect_rollouts

KINDS = ("rlvr", "rlhf", "joint")
# Both ways see 32 word problems and 16 open prompts a step, 8 answers each: one after the other, or mixed.
COMMON = (
    "report=",
    "threads=1",
    "rlvr.max_steps=0",
    "rlvr.steps=20",
    "rlhf.steps=20",
    "eval.max_problems=200",
    "rlhf.guard.kl_budget=0",
    "rlhf.guard.judge=false",
)
WAYS = {
    "two stages": ("rlvr.prompts_per_step=32", "rlhf.prompts_per_step=16", "eval.stages=['sft','rlvr','rlhf']"),
    "joint": (
        "rlvr=",
        "rlhf.prompts_per_step=48",
        "rlhf.verifiable_share=0.6666667",
        "rlhf.learning_rate=3e-4",
        "eval.stages=['sft','rlhf']",
    ),
}


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


def train(folder: Path, way: str, seed: int, overrides: Sequence[str], started: Path | None) -> tuple[Recipe, RunDir]:
    """Run the recipe one way; what `started` has finished before RL, the SFT model and the reward model, is copied."""
    loaded = resolve_recipe(load_recipe(["rlhf-tiny"], [f"seed={seed}", *COMMON, *WAYS[way], *overrides]))
    run = RunDir(folder / f"{way.replace(' ', '-')}-seed{seed}")
    if started is not None and not run.path.exists():
        for kind in ("tokenizer", "sft", "reward"):
            source = RunDir(started).stage(kind).path
            if source.is_dir():
                shutil.copytree(source, run.stage(kind).path)
    run_recipe(loaded, run, select_stages(loaded.recipe))
    return loaded.recipe, run


def open_rewards(recipe: Recipe, run: RunDir, prompts: int) -> dict[str, dict[str, list[float]]]:
    """What the reward model and the judge say of four answers to each held-out prompt, before and after RL."""
    folder, config = run.stage("reward").path, recipe.rlhf
    assert isinstance(config, RlhfConfig)
    tokenizer = Tokenizer.load(run.stage("sft").checkpoint_dir)
    pairs = load_preferences(recipe.preferences, tokenizer, derive_seed(recipe.seed, "preferences")).heldout
    stream = OpenPrompts(pairs, prompts_per_step=prompts, max_prompt_tokens=512, seed=0)
    params = SamplingParams(max_tokens=config.max_completion_tokens, stop_token_ids=(tokenizer.turn_end_id,))
    graders = {
        name: RewardModelGrader(load_reward_model(path), tokenizer, config)
        for name, path in (("reward_model", folder / "checkpoint"), ("judge", folder / "judge" / "checkpoint"))
    }
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("sft", "rlhf"):
        completer = build_completer(run.stage(kind).checkpoint_dir)
        task, batch = OpenTask(WordProblems()), stream.batch_at(0)
        groups = collect_rollouts(completer, tokenizer, task, batch, group_size=4, params=params, seed=1)
        found[kind] = {
            name: [fmean(verdict.reward for verdict in row) for row in grader(groups)]
            for name, grader in graders.items()
        }
    return found


def scores(run: RunDir, kind: str) -> dict[str, list[float]]:
    """Sampled answers of a stage to each held-out word problem: 1 where right."""
    (path,) = (run.path / "eval").glob(f"*-{kind}.jsonl")
    found: dict[str, list[float]] = {}
    for record in load_records(path):
        if record.repeat != GREEDY:
            found.setdefault(record.example_id, []).append(float(record.correct))
    return found


def spent(run: RunDir) -> dict[str, float]:
    """CPU-seconds and lengths of the reinforcement learning of a run."""
    stages = [stage for kind in ("rlvr", "rlhf") if (stage := run.stage(kind)).result_path.is_file()]
    rows = [row for stage in stages for row in read_jsonl(stage.metrics_path)]
    return {
        "cpu_s": sum(stage.read_result()["cpu_s"] for stage in stages),
        "length_mean": fmean(row["rollout/length_mean"] for row in rows),
    }


def gain(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The mean difference of two lists of rewards of the same prompts, with its interval."""
    return mean_interval([b - a for a, b in zip(before, after, strict=True)]).to_dict()


def compare_quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both ways for every seed; accuracies, rewards, and paired differences (joint minus two stages)."""
    result: dict[str, Any] = {"seeds": []}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        runs: dict[str, RunDir] = {}
        told: dict[str, Any] = {"seed": seed}
        opened: dict[str, dict[str, dict[str, list[float]]]] = {}
        for way in WAYS:
            started = runs["two stages"].path if runs else arguments.start
            recipe, runs[way] = train(arguments.quality, way, seed, arguments.set, started)
            opened[way] = open_rewards(recipe, runs[way], arguments.open_prompts)
            told[way] = {
                "accuracy": mean_interval([fmean(row) for row in scores(runs[way], "rlhf").values()]).to_dict(),
                **{
                    f"{kind}_{k}": mean_interval(v).to_dict()
                    for kind in opened[way]
                    for k, v in opened[way][kind].items()
                },
                **{f"{k}_gain": gain(opened[way]["sft"][k], opened[way]["rlhf"][k]) for k in opened[way]["sft"]},
                **spent(runs[way]),
            }
        told["sft_accuracy"] = mean_interval([fmean(row) for row in scores(runs["joint"], "sft").values()]).to_dict()
        two, joint = (scores(runs[way], "rlhf") for way in ("two stages", "joint"))
        told["accuracy_difference"] = paired_difference(two, joint).to_dict()
        for name in ("reward_model", "judge"):
            told[f"{name}_difference"] = gain(*(opened[way]["rlhf"][name] for way in WAYS))
        result["seeds"].append(told)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
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
    parser.add_argument("--quality", type=Path, help="train both ways in this folder, and compare what comes out")
    parser.add_argument("--seeds", type=int, default=1, help="repeats of that comparison")
    parser.add_argument("--start", type=Path, help="run of rlhf-tiny whose SFT and reward model the first seed takes")
    parser.add_argument("--open-prompts", type=int, default=100, help="held-out prompts to answer")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for the recipe of both ways")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    rows = measure(arguments)
    names = list(rows["joint"])
    print("| step | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for kind in KINDS:
        cells = [f"{fmean(v):.3g} ± {stdev(v) if len(v) > 1 else 0:.2g}" for v in rows[kind].values()]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    result: dict[str, Any] = {"benchmark": "joint_vs_two_stage", "lengths": rows}
    if arguments.quality:
        result["quality"] = compare_quality(arguments)
        for told in result["quality"]["seeds"]:
            for way in WAYS:
                for name in ("reward_model", "judge"):
                    gap = told[way][f"{name}_gain"]
                    print(f"seed {told['seed']}, {way}: {name} {gap['value']:+.3f}", end=" ")
                    print(f"({gap['low']:+.3f} to {gap['high']:+.3f}) since SFT")
            for name in ("accuracy", "reward_model", "judge"):
                gap = told[f"{name}_difference"]
                print(f"seed {told['seed']}: {name}, joint minus two stages {gap['value']:+.3f}", end=" ")
                print(f"({gap['low']:+.3f} to {gap['high']:+.3f})")
    result["settings"] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
    }
    result["cpu_s"] = round(time.process_time() - began, 1)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
