"""Chooses among the checkpoints of a stage by score and entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tafkir.data.chat import encode_prompt
from tafkir.data.sources import Problem
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError
from tafkir.intervals import mean_interval
from tafkir.protocols import Completer
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.selection import SelectConfig
from tafkir.recipe.stage import BuildCompleter, StageContext
from tafkir.records import SamplingParams
from tafkir.tasks.math import WordProblems
from tafkir.train.loop import Trainer
from tafkir.train.ranks import Ranks
from tafkir.train.rollout import collect_rollouts

__all__ = ["Candidate", "choose", "measure_candidates", "select_checkpoint"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint: share of right answers with its 95 % interval, and entropy of its tokens in nats."""

    step: int
    score: float
    low: float
    high: float
    entropy: float


def choose(candidates: Sequence[Candidate], entropy_floor: float) -> tuple[Candidate, str]:
    """The best score at or above the floor, of equals the earlier step; else the highest entropy. And why."""
    ordered = sorted(candidates, key=lambda each: each.step)
    above = [each for each in ordered if each.entropy >= entropy_floor]
    if above:
        return max(above, key=lambda each: each.score), "best score above the entropy floor"
    return max(ordered, key=lambda each: each.entropy), "no checkpoint is above the entropy floor: highest entropy"


def measure_candidates(
    paths: Mapping[int, Path],
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    config: SelectConfig,
    *,
    build_completer: BuildCompleter,
    seed: int,
    ranks: Ranks | None = None,
) -> list[Candidate]:
    """Let every checkpoint answer the same problems from the same random streams; `ranks` share the problems out.

    The entropy is -mean log p of the sampled tokens, which at temperature 1 estimates the mean entropy of the
    distributions that they were drawn from, without bias.

    Raises:
        DataError: there is no problem.
    """
    if not problems:
        raise DataError(
            "no validation problem to choose a checkpoint by", where="sft.select", fix="add rows with split validation"
        )
    return [
        _measure(step, build_completer(path), problems[: config.problems], tokenizer, config, seed, ranks)
        for step, path in sorted(paths.items())
    ]


def _measure(
    step: int,
    completer: Completer,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    config: SelectConfig,
    seed: int,
    ranks: Ranks | None,
) -> Candidate:
    groups = collect_rollouts(
        completer,
        tokenizer,
        WordProblems(),
        [(problem.as_example(), encode_prompt(tokenizer, problem.question)) for problem in problems],
        group_size=config.samples,
        params=SamplingParams(max_tokens=config.max_tokens, stop_token_ids=(tokenizer.turn_end_id,)),
        seed=derive_seed(seed, "select"),
        ranks=ranks,
    )
    scores = [sum(r.verdict.correct for r in group.rollouts) / len(group.rollouts) for group in groups]
    logprobs = [value for group in groups for r in group.rollouts for value in r.completion.logprobs]
    mean = mean_interval(scores) if len(scores) > 1 else None
    low, high = (max(0.0, mean.low), min(1.0, mean.high)) if mean else (0.0, 1.0)
    return Candidate(step, sum(scores) / len(scores), low, high, -sum(logprobs) / len(logprobs))


def select_checkpoint(
    ctx: StageContext, config: SelectConfig, trainer: Trainer, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Measure the checkpoints that a stage has kept, and give the decoder the weights of the chosen one.

    Returns:
        The chosen step, why, and every candidate.
    """
    # One process writes them, and all of them read: nobody looks before the last one is there.
    trainer.ranks.sum(0.0)
    paths = {int(path.name.removeprefix("step-")): path for path in ctx.stage.path.glob("checkpoints/step-*")}
    candidates = measure_candidates(
        paths,
        problems,
        tokenizer,
        config,
        build_completer=ctx.build_completer,
        seed=derive_seed(ctx.seed, ctx.stage.kind),
        ranks=trainer.ranks,
    )
    chosen, reason = choose(candidates, config.entropy_floor)
    trainer.ranks.reload(trainer.decoder, paths[chosen.step])
    return {"step": chosen.step, "reason": reason, "candidates": [asdict(each) for each in candidates]}
