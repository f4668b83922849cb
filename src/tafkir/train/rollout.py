"""Rollouts: groups of graded completions, drawn from a `Completer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any, Protocol

from torch import Tensor

from tafkir.data.tokenizer import Tokenizer
from tafkir.protocols import BatchGrader, Completer, Counting, Grader, Task
from tafkir.recipe.rl import PolicyTable
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Answer, Completion, Example, Request, SamplingParams, Verdict
from tafkir.runlog.metrics import Metric
from tafkir.train.ranks import OneProcess, Ranks

__all__ = [
    "PromptBatch",
    "Rollout",
    "RolloutGroup",
    "RolloutSource",
    "SynchronousRollouts",
    "collect_rollouts",
    "grade_group",
    "grade_groups",
]

PromptBatch = Callable[[int], Sequence[tuple[Example, Sequence[int]]]]
"""The problems of a step, each with its prompt tokens; a function of the step number alone."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion with its text and verdict."""

    completion: Completion
    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions of one prompt, in the order of their seeds."""

    example: Example
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]

    @property
    def is_dull(self) -> bool:
        """All rewards are equal: the group teaches nothing."""
        return len({rollout.verdict.reward for rollout in self.rollouts}) <= 1

    @property
    def is_ungraded(self) -> bool:
        """A grader did not work for one of the completions, so that the others' advantages are not known."""
        return any(rollout.verdict.is_ungraded for rollout in self.rollouts)


class RolloutSource(Protocol):
    """The graded groups that a step learns from. Whatever makes them also hands the step's weights to its engine."""

    def __call__(self, step: int) -> Sequence[RolloutGroup]: ...

    def numbers(self) -> Mapping[str, Metric]:
        """What else there is to say about the rollouts of the last step, for its metrics."""
        ...

    def state(self) -> Any:
        """What the next steps depend on besides weights, as JSON; None where there is nothing."""
        ...

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        ...


class SynchronousRollouts:
    """A `RolloutSource`: every step samples all completions of its own problems with the weights that it begins with.

    Args:
        completer: samples with weights of its own, refreshed through `load_weights` before every step.
        task: grades.
        prompts: the problems of each step.
        config: group size, length limit and temperature.
        weights: the policy's weights as they are now.
        seed: seed of the sampling streams.
        ranks: processes that share the prompts out; each gets all groups.
    """

    def __init__(
        self,
        completer: Completer,
        tokenizer: Tokenizer,
        task: Task,
        prompts: PromptBatch,
        config: PolicyTable,
        *,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.completer, self.tokenizer, self.task, self.prompts = completer, tokenizer, task, prompts
        self.config, self.weights, self.seed = config, weights, seed
        self.params = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_completion_tokens,
            stop_token_ids=(tokenizer.turn_end_id,),
        )

    def __call__(self, step: int) -> list[RolloutGroup]:
        self.refresh(step)
        return self.sample(step)

    def refresh(self, step: int) -> None:
        """Hand the policy's weights, as they are at the beginning of `step`, to the engine."""
        self.completer.load_weights(self.weights(), step)

    def numbers(self) -> Mapping[str, Metric]:
        """What a pool of servers, workers or verifiers lost and made good; nothing otherwise."""
        pools = [pool for pool in (self.completer, self.task) if isinstance(pool, Counting)]
        return {name: value for pool in pools for name, value in pool.metrics().items()}

    def state(self) -> Any:
        return None

    def load_state(self, state: Any) -> None:
        """There is nothing to go on from: a step needs nothing of the step before."""

    def sample(self, step: int) -> list[RolloutGroup]:
        """The groups of `step`, sampled with the weights that the engine has."""
        groups = self._sample(self.prompts(step), derive_seed(self.seed, "rollout", step))
        # DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): problems of later epochs stand in for those whose
        # rewards are all equal, so that the batch is full; which problems depends on the step alone.
        for again in range(1, self.config.max_resamples + 1):
            dull = [i for i, group in enumerate(groups) if group.is_dull]
            if not dull:
                break
            prompts = self.prompts(step + again * self.config.steps)[: len(dull)]
            fresh = self._sample(prompts, derive_seed(self.seed, "rollout", step, again))
            for place, group in zip(dull, fresh, strict=False):
                groups[place] = group
        return groups

    def _sample(self, prompts: Sequence[tuple[Example, Sequence[int]]], seed: int) -> list[RolloutGroup]:
        return collect_rollouts(
            self.completer,
            self.tokenizer,
            self.task,
            prompts,
            group_size=self.config.group_size,
            params=self.params,
            seed=seed,
            ranks=self.ranks,
        )


def collect_rollouts(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[tuple[Example, Sequence[int]]],
    *,
    group_size: int,
    params: SamplingParams,
    seed: int,
    ranks: Ranks | None = None,
) -> list[RolloutGroup]:
    """Sample `group_size` completions per prompt and grade them.

    Args:
        prompts: each example with its prompt tokens.
        params: sampling parameters; the seed in them is ignored.
        seed: completion j of prompt i draws from the stream `derive_seed(seed, i, j)`.
        ranks: processes that share the prompts out; each gets all groups.

    Returns:
        One group per prompt, in the order given, whatever order the completions finish in.
    """
    ranks = ranks or OneProcess()
    own = ranks.own(list(enumerate(prompts)))
    requests = []
    for i, (_, prompt_ids) in own:
        for j in range(group_size):
            seeded = replace(params, seed=derive_seed(seed, i, j))
            requests.append(Request(str(i * group_size + j), tuple(prompt_ids), seeded))
    completions = {int(done.request_id): done for done in completer.complete(requests)}
    sampled = [
        (example, prompt_ids, [completions[i * group_size + j] for j in range(group_size)])
        for i, (example, prompt_ids) in own
    ]
    graded = zip((i for i, _ in own), grade_groups(tokenizer, task, sampled), strict=True)
    return [group for _, group in sorted(ranks.gather(list(graded)), key=itemgetter(0))]


def grade_group(
    tokenizer: Tokenizer, task: Task, example: Example, prompt_ids: Sequence[int], completions: Sequence[Completion]
) -> RolloutGroup:
    """All completions of one prompt with their texts and verdicts."""
    return grade_groups(tokenizer, task, [(example, prompt_ids, completions)])[0]


def grade_groups(
    tokenizer: Tokenizer, grader: Grader, sampled: Sequence[tuple[Example, Sequence[int], Sequence[Completion]]]
) -> list[RolloutGroup]:
    """Groups of an example, its prompt and its completions, graded; all at once where the grader can."""
    answers = [
        Answer(example, tokenizer.decode(list(completion.token_ids)), completion.finish_reason == "stop")
        for example, _, own in sampled
        for completion in own
    ]
    if isinstance(grader, BatchGrader):
        verdicts = grader.grade_all(answers)
    else:
        verdicts = [grader.grade(answer.example, answer.text, finished=answer.finished) for answer in answers]
    completions = [completion for _, _, own in sampled for completion in own]
    rollouts = map(Rollout, completions, [answer.text for answer in answers], verdicts)
    return [
        RolloutGroup(example, tuple(prompt_ids), tuple(islice(rollouts, len(own))))
        for example, prompt_ids, own in sampled
    ]
