"""What the test processes do: the same few steps of reinforcement learning, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tafkir.engine.engine import Engine
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rl import RlvrConfig
from tafkir.recipe.schema import ParallelConfig
from tafkir.records import Example, Verdict
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rollouts import Keep, RolloutLog
from tafkir.runlog.rundir import StageDir
from tafkir.train.copies import open_copies
from tafkir.train.long_tail import open_rollouts
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.monitor import MismatchMonitor
from tafkir.train.rlvr import RlvrStep
from tests.parallel.jobs import MODEL


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    turn_end_id = 0

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Sums:
    """Rewards low numbers; problem 7 is solved by no one, and is left out."""

    name = "sums"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        reward = 0.0 if example.id == "7" else sum(int(number) for number in text.split()) / 1000
        return Verdict("wrong", reward, None, "")


class _Stop(Exception):
    """Ends a training as a kill would, without the wait."""


def train(
    folder: Path, table: dict[str, Any], *, stop: int | None = None, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """Train, resuming from `folder`; the metric rows, the kept rollouts and (on rank 0) the weights that came out.

    Args:
        stop: end before this step, counted from 0, and return nothing.
    """
    keys = {"steps": 3, "warmup_steps": 0, "learning_rate": 3e-3, "save_every": 1, "log_every": 1}
    keys |= {"prompts_per_step": 5, "group_size": 4, "max_completion_tokens": 6, "monitor": {"warn": 1e-9}}
    config = RlvrConfig.model_validate({**keys, **table})
    ranks = open_copies(ParallelConfig())
    trainer = Trainer(build_decoder(model, seed=3), config, ranks)
    engine = Engine(build_decoder(model, seed=3), eos_ids=(0,), record_experts=True)
    rollouts = open_rollouts(
        engine,
        Numbers(),  # type: ignore[arg-type]  # has what is asked of a tokenizer
        Sums(),  # type: ignore[arg-type]  # grades, and has no examples of its own
        lambda step: [
            (Example(str(n), "t", "train", "", ""), [1 + n % 60, 2, 3][: 1 + n % 3])
            for n in range(5 * step, 5 * step + 5)
        ],
        config,
        weights=lambda: trainer.decoder.state_dict().items(),
        seed=1,
        ranks=ranks,
    )
    stage = StageDir(folder, "rlvr")
    monitor = MismatchMonitor(
        config.monitor, config.acceptance, path=folder / "mismatch.jsonl" if ranks.is_main else None
    )
    log = RolloutLog(stage.rollouts_dir, Keep.parse("all" if ranks.is_main else "none"))
    one_step = RlvrStep(trainer, rollouts, config, reference=None, log=log, monitor=monitor)

    def step(number: int) -> StepOutput:
        if number == stop:
            raise _Stop
        return one_step(number)

    try:
        fit(trainer, stage, step, carried={"rollouts": rollouts, "monitor": monitor}, label="rlvr")
    except _Stop:
        return {}
    whole = ranks.whole(trainer.decoder)
    return {
        "rows": list(read_jsonl(stage.metrics_path)) if ranks.is_main else None,
        "kept": [list(log.read(number)) for number in log.steps()] if ranks.is_main else None,
        "weights": {k: v.detach().clone() for k, v in whole.state_dict().items()} if whole is not None else None,
    }
