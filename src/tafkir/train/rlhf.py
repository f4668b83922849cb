"""Reinforcement learning on answers that are better or worse: the step of RLVR with learned graders, and a guard.

One step, one direction: prompts -> rollouts -> graders -> failures left out -> the RLVR step -> guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import fmean
from typing import Any

import torch

from tafkir.checkpoint.load import RewardCheckpoint
from tafkir.data.loader import EpochOrder
from tafkir.data.preference import EncodedPair
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, TrainingError
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import linear_logprobs
from tafkir.protocols import Task
from tafkir.recipe.rlhf import RlhfConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, Message, Split, Verdict
from tafkir.runlog.metrics import Metric
from tafkir.tasks.arena import PairwiseJudge
from tafkir.tasks.judge import RubricJudge
from tafkir.train.batch import build_rl_batch
from tafkir.train.loop import StepOutput, Trainer
from tafkir.train.ranks import OneProcess, Ranks
from tafkir.train.reward_guard import RewardGuard
from tafkir.train.reward_model import score_answers
from tafkir.train.rlvr import RlvrStep
from tafkir.train.rollout import PromptBatch, RolloutGroup, RolloutSource

__all__ = [
    "GradedRollouts",
    "Grader",
    "OpenPrompts",
    "OpenTask",
    "PairwiseGrader",
    "RewardModelGrader",
    "RlhfStep",
    "RubricGrader",
]

_OPEN = "conversation"
"""In `Example.extra`: the messages of a prompt without a right answer."""

_SCORE_BATCH = 16

Grader = Callable[[Sequence[RolloutGroup]], list[list[Verdict]]]
"""Verdicts of every rollout of every group. An outcome "error" is an answer that could not be graded."""


class OpenPrompts:
    """The prompts of preference pairs, each once an epoch; those of a step depend on (seed, step) alone.

    Args:
        pairs: their answers are not read; equal prompts count once.
        verifiable: problems with a verifier to mix in, and how many a step.
        max_prompt_tokens: longer prompts are left out and counted in `overlong`.

    Raises:
        DataError: no prompt is left.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        *,
        prompts_per_step: int,
        max_prompt_tokens: int,
        seed: int,
        verifiable: PromptBatch | None = None,
    ) -> None:
        by_prompt = {pair.prompt_ids: pair for pair in pairs}
        self.prompts = [(_open_example(p), ids) for ids, p in by_prompt.items() if len(ids) <= max_prompt_tokens]
        self.overlong = len(by_prompt) - len(self.prompts)
        if not self.prompts:
            raise DataError(
                f"none of {len(by_prompt)} prompts leaves room for an answer",
                where="preferences.sources",
                expected=f"prompts of at most {max_prompt_tokens} tokens",
                fix="lower rlhf.max_completion_tokens, or add shorter prompts",
            )
        self.prompts_per_step, self.verifiable = prompts_per_step, verifiable
        self.order = EpochOrder(len(self.prompts), derive_seed(seed, "order"))

    def batch_at(self, step: int) -> list[tuple[Example, Sequence[int]]]:
        """The prompts of a step, problems with a verifier first."""
        first = step * self.prompts_per_step
        open_prompts = [self.prompts[self.order[i]] for i in range(first, first + self.prompts_per_step)]
        return [*(self.verifiable(step) if self.verifiable else ()), *open_prompts]


def _open_example(pair: EncodedPair) -> Example:
    prompt = pair.pair.prompt
    return Example(pair.pair.id, pair.pair.source, pair.pair.split, prompt[-1].content, "", {_OPEN: prompt})


class OpenTask:
    """A `Task` that leaves open prompts to the graders and hands problems to their own task."""

    name = "open"

    def __init__(self, verifiable: Task) -> None:
        self.verifiable = verifiable

    def examples(self, split: Split) -> Sequence[Example]:
        """The problems with a verifier."""
        return self.verifiable.examples(split)

    def prompt(self, example: Example) -> list[Message]:
        """The conversation of an open prompt, or the problem's own prompt."""
        return list(example.extra[_OPEN]) if _OPEN in example.extra else self.verifiable.prompt(example)

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """A problem's verdict; for an open prompt an "error" that a grader replaces."""
        if _OPEN in example.extra:
            return Verdict("error", 0.0, None, "", "not graded yet")
        return self.verifiable.grade(example, text, finished=finished)


class RewardModelGrader:
    """Grades by a reward model: in standard deviations from its mean, cut to `reward_clip`."""

    def __init__(self, reward: RewardCheckpoint, tokenizer: Tokenizer, config: RlhfConfig) -> None:
        self.model, self.end = reward.model, tokenizer.turn_end_id
        self.mean, self.std = (reward.reward_mean, reward.reward_std) if config.normalize_reward else (0.0, 1.0)
        self.clip = config.reward_clip

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
        """A reward that is not finite is an outcome "error"."""
        answers = [
            (group.prompt_ids, [self._closed(rollout.completion.token_ids) for rollout in group.rollouts])
            for group in groups
        ]
        return [[self._verdict(value) for value in values] for values in score_answers(self.model, answers)]

    def _closed(self, tokens: Sequence[int]) -> Sequence[int]:
        """The model has learnt to read a finished turn; one that was cut off is read as if it ended there."""
        return tokens if tokens and tokens[-1] == self.end else (*tokens, self.end)

    def _verdict(self, value: float) -> Verdict:
        if not math.isfinite(value):
            return Verdict("error", 0.0, None, "", f"the reward is {value}")
        reward = min(max((value - self.mean) / self.std, -self.clip), self.clip)
        return Verdict("graded", reward, None, "")


class RubricGrader:
    """Grades by a language model with a rubric."""

    def __init__(self, judge: RubricJudge) -> None:
        self.judge = judge

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
        items = [(group.example.extra[_OPEN], rollout.text) for group in groups for rollout in group.rollouts]
        verdicts = iter(self.judge.grade(items))
        return [[next(verdicts) for _ in group.rollouts] for group in groups]


class PairwiseGrader:
    """Grades by a language model that compares the answers to a prompt."""

    def __init__(self, judge: PairwiseJudge) -> None:
        self.judge = judge

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
        return self.judge.grade(
            [(group.example.extra[_OPEN], [rollout.text for rollout in group.rollouts]) for group in groups]
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What grading a step showed: the means that the guard watches, and everything for the metrics."""

    reward: float
    judged: float | None
    kl: float | None
    metrics: Mapping[str, Metric]


class GradedRollouts:
    """A `RolloutSource` that grades open prompts; groups with an answer that could not be graded are left out.

    Leaving out the whole group keeps the others' advantages what they are; a reward of 0 would not.

    Args:
        source: rollouts, problems with a verifier graded already.
        grader: grades the open prompts.
        judge: a held-out reward model whose rewards are only watched.
        reference: the first policy, where its KL is watched.
        ranks: processes that have all groups of a step each, and share the work of grading them.

    Attributes:
        seen: of the last step.
    """

    def __init__(
        self,
        source: RolloutSource,
        grader: Grader,
        config: RlhfConfig,
        *,
        judge: Grader | None = None,
        reference: Decoder | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.source, self.grader, self.config = source, grader, config
        self.judge, self.reference, self.ranks = judge, reference, ranks or OneProcess()
        self.seen = Seen(0.0, None, None, {})

    def numbers(self) -> Mapping[str, Metric]:
        """What the source and the graders say of the last step."""
        return {**self.source.numbers(), **self.seen.metrics}

    def state(self) -> Any:
        """The source's state."""
        return self.source.state()

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        self.source.load_state(state)

    def __call__(self, step: int) -> list[RolloutGroup]:
        groups = self.source(step)
        open_groups = [group for group in groups if _OPEN in group.example.extra]
        verifiable = [group for group in groups if _OPEN not in group.example.extra]
        graded = _with_verdicts(open_groups, self._grade(self.grader, open_groups))
        kept = [group for group in graded if all(r.verdict.outcome != "error" for r in group.rollouts)]
        self._check_failures(graded, step)
        rewards = [r.verdict.reward for group in kept for r in group.rollouts]
        metrics = self._describe(graded, kept, verifiable)
        judged = kl = None
        if self.judge is not None:
            judged = fmean(verdict.reward for row in self._grade(self.judge, kept) for verdict in row)
            metrics["rlhf/judge_reward"] = judged
        if self.reference is not None:
            kl = self._divergence([*verifiable, *kept], self.reference)
            metrics["rlhf/kl"] = kl
        self.seen = Seen(fmean(rewards), judged, kl, metrics)
        return [*verifiable, *kept]

    def _grade(self, grader: Grader, groups: Sequence[RolloutGroup]) -> list[list[Verdict]]:
        """Verdicts of all groups: a model grades in every process, an endpoint is asked by the first one alone."""
        numbered = list(enumerate(groups))
        if isinstance(grader, RewardModelGrader):
            own = self.ranks.own(numbered)
        else:
            own = numbered if self.ranks.is_main else []
        verdicts = grader([group for _, group in own]) if own else []
        rows = self.ranks.gather([(place, row) for (place, _), row in zip(own, verdicts, strict=True)])
        return [row for _, row in sorted(rows, key=itemgetter(0))]

    def _check_failures(self, graded: Sequence[RolloutGroup], step: int) -> None:
        verdicts = [rollout.verdict for group in graded for rollout in group.rollouts]
        failed = [verdict for verdict in verdicts if verdict.outcome == "error"]
        limit = self.config.judge.max_failures if self.config.judge is not None else 0.5
        none_left = all(any(r.verdict.outcome == "error" for r in group.rollouts) for group in graded)
        if none_left or len(failed) > limit * len(verdicts):
            raise TrainingError(
                f"{len(failed)} of {len(verdicts)} answers could not be graded; the first: {failed[0].reason}",
                where=f"rlhf step {step + 1}",
                fix="mend the grader, then run the command again: it goes on from its last state",
            )

    def _describe(
        self, graded: Sequence[RolloutGroup], kept: Sequence[RolloutGroup], verifiable: Sequence[RolloutGroup]
    ) -> dict[str, Metric]:
        rollouts = [rollout for group in kept for rollout in group.rollouts]
        rewards = torch.tensor([rollout.verdict.reward for rollout in rollouts])
        lengths = torch.tensor([float(len(rollout.completion.token_ids)) for rollout in rollouts])
        metrics: dict[str, Metric] = {
            "rlhf/reward": float(rewards.mean()),
            "rlhf/length": float(lengths.mean()),
            "rlhf/empty": sum(not rollout.text.strip() for rollout in rollouts) / len(rollouts),
            "rlhf/ungraded": float(
                sum(rollout.verdict.outcome == "error" for group in graded for rollout in group.rollouts)
            ),
            "rlhf/groups_left_out": float(len(graded) - len(kept)),
        }
        if float(rewards.std()) > 0 and float(lengths.std()) > 0:
            metrics["rlhf/reward_length_correlation"] = float(torch.corrcoef(torch.stack([rewards, lengths]))[0, 1])
        if verifiable:
            right = [rollout.verdict.correct for group in verifiable for rollout in group.rollouts]
            metrics["rlhf/verifiable_accuracy"] = sum(right) / len(right)
        return metrics

    @torch.no_grad()
    def _divergence(self, groups: Sequence[RolloutGroup], reference: Decoder) -> float:
        """KL(policy || first policy), nats a completion: the mean of log p - log p_ref over what was sampled."""
        total = 0.0
        for start in self.ranks.own(range(0, len(groups), _SCORE_BATCH)):
            part = groups[start : start + _SCORE_BATCH]
            batch = build_rl_batch(part, [[0.0] * len(group.rollouts) for group in part])
            out = reference(batch.input_ids_N, batch.positions_N, batch.attention)
            hidden_TD = out.hidden_ND.index_select(0, batch.source_T)
            ref_T = linear_logprobs(hidden_TD, reference.head_weight, batch.targets_T, self.config.temperature)
            total += float((batch.sampling_logprobs_T - ref_T).double().sum())
        return self.ranks.sum(total) / sum(len(group.rollouts) for group in groups)


def _with_verdicts(groups: Sequence[RolloutGroup], verdicts: Sequence[Sequence[Verdict]]) -> list[RolloutGroup]:
    return [
        replace(
            group, rollouts=tuple(replace(r, verdict=verdict) for r, verdict in zip(group.rollouts, row, strict=True))
        )
        for group, row in zip(groups, verdicts, strict=True)
    ]


class RlhfStep:
    """The step function of RLHF: the RLVR step on graded rollouts, until the guard stops it.

    After that its steps change nothing, so that the stage ends with the weights of the step at which it was stopped.
    """

    def __init__(self, trainer: Trainer, rollouts: GradedRollouts, step: RlvrStep, guard: RewardGuard) -> None:
        self.trainer, self.rollouts, self.step, self.guard = trainer, rollouts, step, guard

    def __call__(self, step: int) -> StepOutput:
        if self.guard.stopped:
            return StepOutput(metrics={"rlhf/stopped": 1.0})
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.guard.rate
        output = self.step(step)
        seen = self.rollouts.seen
        self.guard.observe(step, seen.reward, judged=seen.judged, kl=seen.kl)
        told = {"rlhf/rate": self.guard.rate, "rlhf/stopped": float(bool(self.guard.stopped))}
        return replace(output, metrics={**output.metrics, **told})
