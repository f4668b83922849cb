"""What a mixture of tasks adds to a training stage: its prompts, its numbers, and the curriculum that it feeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.data.loader import PromptStream
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import RecipeError
from tafkir.protocols import Completer, Task
from tafkir.recipe.rl import RlvrConfig
from tafkir.records import SamplingParams
from tafkir.runlog.metrics import Metric
from tafkir.tasks.mixture import MixtureStream, Prompted, TaskMixture, kind_of
from tafkir.tasks.reward import FAILURES, RewardedTask, RewardFile
from tafkir.train.curriculum import Curriculum
from tafkir.train.pass_rate import KeptPrompts, measure_pass_rates
from tafkir.train.rollout import PromptBatch, RolloutGroup, RolloutSource

__all__ = ["TaskRollouts", "TaskSource", "open_tasks"]


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Task and prompts of a stage.

    Attributes:
        task: grades; with a user's rewards where the recipe names a file.
        prompts: the problems of each step.
        curriculum: chooses their levels, where the recipe asks for one.
        is_mixture: whether the recipe names tasks.
    """

    task: Task
    prompts: PromptBatch
    curriculum: Curriculum | None
    is_mixture: bool

    def watch(self, source: RolloutSource) -> RolloutSource:
        """The same rollouts, with the tasks' numbers, and the curriculum told of them."""
        is_plain = not self.is_mixture and not isinstance(self.task, RewardedTask)
        return source if is_plain else TaskRollouts(source, self)


class TaskRollouts:
    """A `RolloutSource` that counts by kind of task, and feeds the curriculum; its state is saved with the source's."""

    def __init__(self, source: RolloutSource, tasks: TaskSource) -> None:
        self.source, self.tasks = source, tasks
        self._numbers: dict[str, Metric] = {}

    def __call__(self, step: int) -> Sequence[RolloutGroup]:
        groups = self.source(step)
        self._numbers = _numbers(groups, self.tasks.curriculum) if self.tasks.is_mixture else {}
        if isinstance(self.tasks.task, RewardedTask):
            # Verdicts say it themselves: they may come from graders in other processes.
            failures = [rollout.verdict.failure for group in groups for rollout in group.rollouts]
            self._numbers |= {f"reward/{kind}": float(failures.count(kind)) for kind in FAILURES}
        return groups

    def numbers(self) -> Mapping[str, Metric]:
        return {**self.source.numbers(), **self._numbers}

    def state(self) -> Any:
        """None where neither the source nor a curriculum has anything to go on from."""
        curriculum = self.tasks.curriculum
        found = {"source": self.source.state(), "curriculum": curriculum.state() if curriculum else None}
        return found if any(each is not None for each in found.values()) else None

    def load_state(self, state: Any) -> None:
        if state["source"] is not None:
            self.source.load_state(state["source"])
        if state["curriculum"] is not None and self.tasks.curriculum is not None:
            self.tasks.curriculum.load_state(state["curriculum"])


def _numbers(groups: Sequence[RolloutGroup], curriculum: Curriculum | None) -> dict[str, Metric]:
    """Accuracy and mean level of each kind in a step; the curriculum takes in those of its current levels."""
    by_kind: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        by_kind.setdefault(kind_of(group.example), []).append(group)
    numbers: dict[str, Metric] = {}
    for kind, own in sorted(by_kind.items()):
        passed = [rollout.verdict.correct for group in own for rollout in group.rollouts]
        levels = [int(group.example.extra.get("level", 1)) for group in own]
        numbers[f"tasks/{kind}/accuracy"] = sum(passed) / len(passed)
        numbers[f"tasks/{kind}/level_mean"] = sum(levels) / len(levels)
        if curriculum is not None and kind in curriculum.difficulty:
            level = curriculum.current(kind)
            numbers[f"tasks/{kind}/curriculum_level"] = float(level)
            counted = [g for g, of in zip(own, levels, strict=True) if of == level and not g.is_ungraded]
            curriculum.record(kind, [rollout.verdict.correct for group in counted for rollout in group.rollouts])
    return numbers


def _check(config: RlvrConfig) -> None:
    if config.curriculum is None:
        return
    if not config.tasks:
        what, fix = "a curriculum needs tasks with levels", "add [[rlvr.tasks]] tables"
    elif config.pass_rate is not None:
        what, fix = "problems are chosen by pass rate or by a curriculum, not by both", "remove one of the tables"
    elif config.long_tail.token_budget or config.long_tail.staleness:
        what, fix = "a curriculum needs the rollouts of the step before", "set token_budget and staleness to 0"
    else:
        return
    raise RecipeError(what, where="rlvr.curriculum", fix=fix)


def open_tasks(
    config: RlvrConfig,
    tokenizer: Tokenizer,
    completer: Completer,
    word_problems: Task,
    word_stream: PromptStream,
    *,
    folder: Path,
    seed: int,
) -> TaskSource:
    """The tasks that a stage learns from, as its recipe says; the word problems alone where it says nothing.

    Args:
        completer: the first policy, for the pass rates.
        word_problems: grades the recipe's word problems.
        word_stream: the recipe's word problems.
        folder: the stage's directory, which keeps the pass rates.

    Raises:
        BackendUnavailable: code is asked for, and there is no sandbox here.
        GradingError: the reward file does not work.
        DataError: no problem has a pass rate in the band.
        RecipeError: two settings exclude each other.
    """
    _check(config)
    curriculum: Curriculum | None = None
    task: Task = word_problems
    at: Callable[[int], Prompted] = word_stream.at
    prompts: PromptBatch = word_stream.batch_at
    if config.tasks:
        mixture = TaskMixture(config.tasks, word_problems)
        difficulty: Mapping[str, Sequence[int]] = {
            each.kind: each.difficulty for each in config.tasks if each.kind in mixture.drawn
        }
        curriculum = Curriculum(difficulty, config.curriculum) if config.curriculum else None
        stream = MixtureStream(
            mixture,
            tokenizer,
            per_step=config.prompts_per_step,
            seed=seed,
            levels=curriculum.level if curriculum else None,
            word_problem=word_stream.at,
        )
        task, at, prompts = mixture, stream.at, stream.batch_at
    if config.reward_file is not None:
        task = RewardedTask(task, RewardFile(config.reward_file, timeout_s=config.reward_timeout_s))
    if config.pass_rate is not None:
        rates, graded = config.pass_rate, task
        params = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_completion_tokens,
            stop_token_ids=(tokenizer.turn_end_id,),
        )
        prompts = KeptPrompts(
            at,
            lambda pool: measure_pass_rates(
                completer, tokenizer, graded, pool, samples=rates.samples, params=params, seed=seed
            ),
            rates,
            folder,
            per_step=config.prompts_per_step,
            seed=seed,
        ).batch_at
    return TaskSource(task, prompts, curriculum, bool(config.tasks))
