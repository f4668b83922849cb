"""What the test processes do: the stages of a recipe that sample, from fine-tuning to learning from preferences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.rlhf import RlhfConfig
from tafkir.recipe.schema import ParallelConfig
from tafkir.records import Completion, Example, Message, Verdict
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tafkir.train.copies import open_copies
from tafkir.train.rlhf import GradedRollouts
from tafkir.train.rollout import Rollout, RolloutGroup

SETTINGS = (
    "threads=1",
    "kernels=torch",
    "data.max_steps=2",
    "pretrain.steps=2",
    "pretrain.story_share=0",
    "sft.steps=4",
    "sft.batch_problems=4",
    "sft.story_share=0",
    "sft.checkpoint_every=2",
    "sft.select.problems=5",
    "sft.select.max_tokens=6",
    "preferences.max_length=120",
    "reward.steps=3",
    "reward.batch_pairs=8",
    "reward.judge_share=0.4",
    "reward.log_every=1",
    "rlvr=",
    "rlhf.steps=3",
    "rlhf.prompts_per_step=5",
    "rlhf.group_size=3",
    "rlhf.max_completion_tokens=6",
    "rlhf.log_every=1",
    "rlhf.verifiable_share=0.4",
    "rlhf.guard.judge=true",
    "rlhf.guard.tolerance=100",
    "rlhf.guard.kl_budget=1000",
    "rlhf.learning_rate=3e-3",
    "rlhf.warmup_steps=0",
    "eval=",
    "report=",
)


def run_chain(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run the recipe `smoke` with these settings; what it says and wrote, on rank 0."""
    loaded = resolve_recipe(load_recipe(["smoke"], [*SETTINGS, *settings]))
    run = RunDir(folder)
    results = run_recipe(loaded, run, select_stages(loaded.recipe))
    if not results:
        return {}
    weights = load_checkpoint(run.stage("rlhf").checkpoint_dir).decoder.state_dict()
    return {
        "select": results["sft"]["select"],
        "heldout": results["reward"]["heldout"]["accuracy"],
        "guard": results["rlhf"]["guard"],
        "rows": {kind: list(read_jsonl(run.stage(kind).metrics_path)) for kind in ("sft", "reward", "rlhf")},
        "kept": sorted(path.name for path in run.stage("rlhf").rollouts_dir.iterdir()),
        "weights": {name: value.clone() for name, value in weights.items()},
    }


class _Source:
    """Two groups of one answer each, the same in every process."""

    def __call__(self, step: int) -> list[RolloutGroup]:
        ungraded = Verdict("error", 0.0, None, "")
        return [
            RolloutGroup(
                Example(str(n), "t", "train", "", "", {"conversation": (Message("user", "?"),)}),
                (1,),
                (Rollout(Completion(str(n), (2,), (-1.0,), "stop"), "text", ungraded),) * 2,
            )
            for n in range(3)
        ]

    def numbers(self) -> dict[str, Any]:
        return {}

    def state(self) -> None:
        return None

    def load_state(self, state: Any) -> None:
        return


def ask_an_endpoint(log: Path) -> list[float]:
    """The rewards of a step whose answers an endpoint grades; every call is written down."""

    def grade(groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
        with log.open("a") as file:
            file.write(json.dumps([group.example.id for group in groups]) + "\n")
        return [[Verdict("graded", float(group.example.id) + n, None, "") for n in range(2)] for group in groups]

    rollouts = GradedRollouts(_Source(), grade, RlhfConfig(), ranks=open_copies(ParallelConfig()))
    return [rollout.verdict.reward for group in rollouts(0) for rollout in group.rollouts]
