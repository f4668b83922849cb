"""Rollout sources that do not wait for the longest completion: a pool under a token budget, and older weights.

Both are a `RolloutSource` like the synchronous one, feed the same loss, and keep what is unfinished in the stage's
saved state: a run that is killed goes on with the very same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import BackendUnavailable, RecipeError
from tafkir.protocols import Completer, PausingCompleter, Task
from tafkir.recipe.rl import PolicyTable
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Completion, Example, Request
from tafkir.runlog.metrics import Metric
from tafkir.train.ranks import Ranks
from tafkir.train.rollout import PromptBatch, RolloutGroup, RolloutSource, SynchronousRollouts, grade_group
from tafkir.train.rollout_state import (
    load_completion,
    load_example,
    load_group,
    save_completion,
    save_example,
    save_group,
)

__all__ = ["PooledRollouts", "StaleRollouts", "join_pieces", "lag_numbers", "open_rollouts"]


def open_rollouts(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    prompts: PromptBatch,
    config: PolicyTable,
    *,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
    seed: int,
    ranks: Ranks | None = None,
) -> RolloutSource:
    """The source that the recipe's `long_tail` table asks for; see `SynchronousRollouts` for the arguments.

    A pool under a token budget is one process's.

    Raises:
        RecipeError: two settings exclude each other.
        BackendUnavailable: the completer cannot stop and go on.
    """
    tail = config.long_tail
    if tail.token_budget and config.max_resamples:
        raise RecipeError(
            "a token budget samples no problems again",
            where="long_tail.token_budget, max_resamples",
            fix="set max_resamples to 0: new problems enter the pool by themselves",
        )
    if tail.token_budget and not isinstance(completer, PausingCompleter):
        raise BackendUnavailable(
            "this engine cannot stop and go on with what it has begun",
            where="long_tail.token_budget",
            expected="a completer with cancel_all, such as the engine in this process",
            fix="set token_budget to 0",
        )
    shared = (completer, tokenizer, task, prompts, config)
    if tail.token_budget:
        source: SynchronousRollouts = PooledRollouts(*shared, weights=weights, seed=seed)
    else:
        source = SynchronousRollouts(*shared, weights=weights, seed=seed, ranks=ranks)
    return StaleRollouts(source, tail.staleness, config.steps) if tail.staleness else source


def join_pieces(done: Completion, piece: Completion) -> Completion:
    """A completion and its continuation in one, each token with the version of the weights that sampled it.

    Where experts are recorded, a token's are those that it went to when it was first fed.
    """
    experts = done.expert_ids if piece.expert_ids is None else piece.expert_ids
    if done.expert_ids is not None and piece.expert_ids is not None:
        experts = torch.cat((done.expert_ids, piece.expert_ids[len(done.expert_ids) :]))
    old = done.token_versions or (done.policy_version,) * len(done.token_ids)
    versions = old + (piece.policy_version,) * len(piece.token_ids)
    return replace(
        piece,
        request_id=done.request_id,
        token_ids=done.token_ids + piece.token_ids,
        logprobs=done.logprobs + piece.logprobs,
        token_versions=versions if len(set(versions)) > 1 else (),
        policy_version=versions[-1] if versions else piece.policy_version,
        expert_ids=experts,
    )


def lag_numbers(groups: Sequence[RolloutGroup], step: int) -> dict[str, Metric]:
    """How old the weights are that sampled what `step` learns from: steps of lag, and the share of tokens with any."""
    lags = [
        step - version
        for group in groups
        for rollout in group.rollouts
        for version in (
            rollout.completion.token_versions
            or (rollout.completion.policy_version,) * len(rollout.completion.token_ids)
        )
    ]
    count = max(1, len(lags))
    return {
        "rollout/stale_tokens": sum(lag > 0 for lag in lags) / count,
        "rollout/lag_mean": sum(lags) / count,
        "rollout/lag_max": float(max(lags, default=0)),
    }


@dataclass(slots=True)
class _Pending:
    """A problem in the pool. A completion that is not finished yet has the finish reason "cancelled"."""

    number: int
    example: Example
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    cuts: int = 0

    @property
    def is_finished(self) -> bool:
        return all(done.finish_reason != "cancelled" for done in self.completions)

    @property
    def num_tokens(self) -> int:
        return sum(len(done.token_ids) for done in self.completions)


class PooledRollouts(SynchronousRollouts):
    """C3PO++ (arXiv 2510.18855, algorithm 1): sampling ends at a budget of finished tokens.

    A pool of Ω problems is rolled out at once. As soon as finished groups hold Φ tokens (`token_budget`), sampling
    stops and the step learns from them. What is unfinished stays, and goes on in the next step with the new weights,
    at the next draw of its own random stream, oldest problems first. A group that was cut more than σ
    (`max_retention`) times is dropped, and new problems take the free places.

    The paper budgets single rollouts. Here a rollout counts once its group is whole, because its advantage needs all
    of them: short completions then never enter a step without the long ones of the same problem.

    Problem n is that of the synchronous order, `prompts(n // P)[n % P]`, and so are its random streams.
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
    ) -> None:
        super().__init__(completer, tokenizer, task, prompts, config, weights=weights, seed=seed)
        assert isinstance(completer, PausingCompleter)
        self._engine: PausingCompleter = completer
        self._pool: list[_Pending] = []
        self._next = 0
        self._batch: tuple[int, Sequence[tuple[Example, Sequence[int]]]] | None = None
        self._numbers: dict[str, Metric] = {}

    def sample(self, step: int) -> list[RolloutGroup]:
        """The groups that finished under the budget, in the order of their problems."""
        tail = self.config.long_tail
        # A curriculum may have moved on since the last step; a resumed run must not know what it said before.
        self._batch = None
        dropped = [pending for pending in self._pool if pending.cuts > tail.max_retention]
        self._pool = [pending for pending in self._pool if pending.cuts <= tail.max_retention]
        while len(self._pool) < (tail.pool_prompts or self.config.prompts_per_step):
            self._pool.append(self._fresh(self._next))
            self._next += 1
        finished = self._run(tail.token_budget)
        groups = [
            grade_group(self.tokenizer, self.task, pending.example, pending.prompt_ids, pending.completions)
            for pending in finished
        ]
        self._pool = [pending for pending in self._pool if not pending.is_finished]
        for pending in self._pool:
            pending.cuts += 1
        self._numbers = {
            "rollout/finished_groups": float(len(finished)),
            "rollout/carried_groups": float(len(self._pool)),
            "rollout/carried_tokens": float(sum(pending.num_tokens for pending in self._pool)),
            "rollout/dropped_groups": float(len(dropped)),
            "rollout/dropped_tokens": float(sum(pending.num_tokens for pending in dropped)),
            "rollout/cuts_mean": sum(pending.cuts for pending in finished) / max(1, len(finished)),
            **lag_numbers(groups, step),
        }
        return groups

    def numbers(self) -> dict[str, Metric]:
        return dict(self._numbers)

    def state(self) -> dict[str, Any]:
        """The pool, down to the log-probability and the policy version of every token."""
        pool = [
            {
                "number": pending.number,
                "example": save_example(pending.example),
                "prompt_ids": pending.prompt_ids,
                "cuts": pending.cuts,
                "completions": [save_completion(done) for done in pending.completions],
            }
            for pending in self._pool
        ]
        return {"next": self._next, "pool": pool}

    def load_state(self, state: Any) -> None:
        self._next = state["next"]
        self._pool = [
            _Pending(
                saved["number"],
                load_example(saved["example"]),
                tuple(saved["prompt_ids"]),
                [load_completion(done) for done in saved["completions"]],
                saved["cuts"],
            )
            for saved in state["pool"]
        ]

    def _fresh(self, number: int) -> _Pending:
        step, place = divmod(number, self.config.prompts_per_step)
        if self._batch is None or self._batch[0] != step:
            self._batch = step, self.prompts(step)
        example, prompt_ids = self._batch[1][place]
        empty = [Completion(self._id(number, j), (), (), "cancelled") for j in range(self.config.group_size)]
        return _Pending(number, example, tuple(prompt_ids), empty)

    def _run(self, budget: int) -> list[_Pending]:
        """Sample until the budget is reached; the pending problems that are finished then."""
        places = {self._id(p.number, j): (p, j) for p in self._pool for j in range(self.config.group_size)}
        requests = [
            self._request(pending, j)
            for pending in self._pool
            for j, done in enumerate(pending.completions)
            if done.finish_reason == "cancelled"
        ]

        def take(piece: Completion) -> _Pending:
            pending, j = places[piece.request_id]
            pending.completions[j] = join_pieces(pending.completions[j], piece)
            return pending

        tokens, stopped = 0, False
        for piece in self._engine.complete(requests):
            pending = take(piece)
            tokens += pending.num_tokens if pending.is_finished else 0
            if tokens >= budget and not stopped:
                # Whatever ended in the same step of the engine still comes, and the loop then ends.
                stopped = True
                for partial in self._engine.cancel_all():
                    take(partial)
        return [pending for pending in self._pool if pending.is_finished]

    def _request(self, pending: _Pending, j: int) -> Request:
        step, place = divmod(pending.number, self.config.prompts_per_step)
        seed = derive_seed(derive_seed(self.seed, "rollout", step), place, j)
        params = replace(self.params, seed=seed)
        prefix = pending.completions[j].token_ids
        return Request(self._id(pending.number, j), pending.prompt_ids, params, prefix)

    @staticmethod
    def _id(number: int, j: int) -> str:
        return f"{number}.{j}"


class StaleRollouts:
    """Rollouts of weights that are `staleness` steps old, as an engine beside the trainer would deliver them.

    Step n begins with sampling what step n + staleness will learn from, with the weights as they are then; the first
    steps learn from the weights that the stage starts with. That is the order of an asynchronous fleet with exactly
    this lag, in one process and with the same result every time. Tokens keep the log-probabilities of the weights that
    sampled them, so that k of the loss holds both the lag and the engines' difference.

    Args:
        source: what samples.
        staleness: steps between a rollout's weights and the step that learns from it.
        steps: steps of the stage; nothing is sampled for steps that never come.
    """

    def __init__(self, source: SynchronousRollouts, staleness: int, steps: int) -> None:
        self.source, self.staleness, self.steps = source, staleness, steps
        self._sampled = 0
        self._queue: deque[tuple[list[RolloutGroup], dict[str, Metric]]] = deque()
        self._numbers: dict[str, Metric] = {}

    def __call__(self, step: int) -> list[RolloutGroup]:
        if self._sampled < min(step + self.staleness + 1, self.steps):
            self.source.refresh(step)
        while self._sampled < min(step + self.staleness + 1, self.steps):
            groups = self.source.sample(self._sampled)
            self._queue.append((groups, {**self.source.numbers(), **lag_numbers(groups, self._sampled)}))
            self._sampled += 1
        groups, self._numbers = self._queue.popleft()
        return groups

    def numbers(self) -> dict[str, Metric]:
        return dict(self._numbers)

    def state(self) -> dict[str, Any]:
        """The rollouts that wait for their step, with their verdicts, and what the source itself carries."""
        queue = [[[save_group(group) for group in groups], numbers] for groups, numbers in self._queue]
        return {"sampled": self._sampled, "queue": queue, "source": self.source.state()}

    def load_state(self, state: Any) -> None:
        self._sampled = state["sampled"]
        self._queue = deque(([load_group(saved) for saved in groups], numbers) for groups, numbers in state["queue"])
        if state["source"] is not None:
            self.source.load_state(state["source"])
