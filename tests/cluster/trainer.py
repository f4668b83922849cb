"""A run of reinforcement learning on its own, which may kill itself in mid-step: `python -m tests.cluster.trainer`.

Arguments: a folder with `base` (a checkpoint) and `sums.jsonl`, the run's name, then overrides of the recipe.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tafkir.cli.rollouts import grading_sharer, rollout_builder
from tafkir.protocols import Completer
from tafkir.recipe.load import load_recipe
from tafkir.recipe.rollout import RolloutConfig
from tafkir.recipe.stage import StageContext
from tafkir.records import Completion, Request
from tafkir.runlog.rundir import RunDir
from tafkir.train.stages import run_rlvr

__all__ = ["NUM_GROUP", "NUM_PROMPTS", "NUM_STEPS", "train"]

NUM_STEPS, NUM_PROMPTS, NUM_GROUP = 4, 6, 3


class Mortal:
    """A completer that kills the process when it has given out half of a step's completions."""

    def __init__(self, completer: Completer, deadly_step: int) -> None:
        self._completer, self._deadly_step, self._step = completer, deadly_step, 0

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for i, completion in enumerate(self._completer.complete(requests)):
            if self._step == self._deadly_step and i == len(requests) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield completion

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return self._completer.score(token_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._step = version
        self._completer.load_weights(weights, version)

    def close(self) -> None:
        if (close := getattr(self._completer, "close", None)) is not None:
            close()


def train(folder: Path, name: str, overrides: Sequence[str], *, deadly_step: int = -1) -> RunDir:
    """Run the stage rlvr of the smoke recipe from `folder/base`; it goes on where an earlier process stopped."""
    own = [
        f'data.sources=["{folder / "sums.jsonl"}"]',
        "data.augment.renumber=0.0",
        f"rlvr.steps={NUM_STEPS}",
        f"rlvr.prompts_per_step={NUM_PROMPTS}",
        f"rlvr.group_size={NUM_GROUP}",
        "rlvr.drop_zero_variance=false",
        "rlvr.learning_rate=1e-2",
        "rlvr.save_every=1",
        "rlvr.keep_rollouts=all",
    ]
    recipe = load_recipe(["smoke"], [*own, *overrides]).recipe
    run = RunDir(folder / name)
    stage = run.stage("rlvr")
    stage.make()
    build = rollout_builder(recipe, "rlvr", stage.path)
    made: list[Mortal] = []

    def build_mortal(checkpoint: Path, rollout: RolloutConfig | None = None) -> Completer:
        made.append(Mortal(build(checkpoint), deadly_step))
        return made[-1]

    share = grading_sharer(recipe)
    run_rlvr(StageContext(recipe, run, stage, folder / "base", recipe.seed, build_mortal, share))
    for completer in made:
        completer.close()
    return run


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3:], deadly_step=2)
