"""What is kept of a step's rollouts: one row per completion, with all that the update knew of it.

T: sampled tokens of the groups that were learned from, all completions one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tafkir.records import Verdict
from tafkir.runlog.metrics import Metric
from tafkir.runlog.rollouts import RolloutLog
from tafkir.train.rollout import Rollout, RolloutGroup

__all__ = ["Learned", "record_rollouts"]

_DECIMALS = 5

_VERDICT = tuple(field.name for field in fields(Verdict) if field.name != "failure")
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode

_Tokens = tuple[list[float | None], list[int]]


@dataclass(frozen=True, slots=True)
class Learned:
    """What an update came to, and what it knew of each token.

    Attributes:
        metrics: for the step's row.
        advantages_PG: one advantage per completion of each group.
        kept: places of the groups that were learned from, in the order of the tokens.
        train_logprobs_T: log-probabilities of their tokens under the training engine, before the update.
        masked_T: which of their tokens the acceptance region dropped.
    """

    metrics: Mapping[str, Metric]
    advantages_PG: Tensor
    kept: Sequence[int] = ()
    train_logprobs_T: Tensor | None = None
    masked_T: Tensor | None = None


def record_rollouts(log: RolloutLog, step: int, groups: Sequence[RolloutGroup], learned: Learned) -> None:
    """Write the rollouts of one step, where any are kept.

    A row holds `step`, `group` and `completion` (their places), `id`, `source`, `question`, `prompt_ids`,
    `token_ids`, `text`, `logprobs` (of the sampling engine) and `train_logprobs` (of the training engine, before the
    update; null where the group was left out), both rounded to 1e-5 nats and null where not finite, `masked` (places
    of the tokens that the acceptance region dropped), `advantage`, `reward` and the other parts of the verdict,
    `finish_reason`, and `versions`: [policy version, number of tokens] for each stretch of the completion.

    Args:
        step: finished steps once this one is done, as in `metrics.jsonl`.
        learned: what the update knew of them.
    """
    if log.is_on:
        log.write(step, _rows(step, groups, _round(learned.advantages_PG).tolist(), _per_completion(groups, learned)))


def _per_completion(groups: Sequence[RolloutGroup], learned: Learned) -> dict[tuple[int, int], _Tokens]:
    """Training log-probabilities and masked places by (group, completion), for the groups that were learned from."""
    if learned.train_logprobs_T is None or learned.masked_T is None:
        return {}
    logprobs, masked = _numbers(learned.train_logprobs_T), learned.masked_T.cpu()
    places = iter([*masked.nonzero().flatten().tolist(), len(logprobs)])
    place = next(places)
    found: dict[tuple[int, int], _Tokens] = {}
    start = 0
    for i in learned.kept:
        for j, rollout in enumerate(groups[i].rollouts):
            end = start + len(rollout.completion.token_ids)
            dropped = []
            while place < end:
                dropped.append(place - start)
                place = next(places)
            found[i, j] = logprobs[start:end], dropped
            start = end
    return found


def _rows(
    step: int,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    trained: Mapping[tuple[int, int], _Tokens],
) -> Iterator[str]:
    sampled = _numbers(torch.tensor([x for g in groups for r in g.rollouts for x in r.completion.logprobs]))
    start = 0
    for i, group in enumerate(groups):
        example = group.example
        shared = {"step": step, "group": i, "id": example.id, "source": example.source, "question": example.question}
        # Written once for all completions of the group: most of a row is its prompt.
        head = _encode(shared | {"prompt_ids": group.prompt_ids})[:-1]
        for j, rollout in enumerate(group.rollouts):
            end = start + len(rollout.completion.logprobs)
            train_logprobs, masked = trained.get((i, j), (None, []))
            row = {
                "completion": j,
                **_facts(rollout),
                "advantage": advantages[i][j],
                "logprobs": sampled[start:end],
                "train_logprobs": train_logprobs,
                "masked": masked,
            }
            start = end
            yield f"{head}, {_encode(row)[1:]}"


def _facts(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    runs = [[completion.policy_version, len(completion.token_ids)]]
    if completion.token_versions:
        runs = [[version, len(list(run))] for version, run in groupby(completion.token_versions)]
    return {
        **{name: getattr(rollout.verdict, name) for name in _VERDICT},
        **({"failure": rollout.verdict.failure} if rollout.verdict.failure else {}),
        "text": rollout.text,
        "finish_reason": completion.finish_reason,
        "versions": runs,
        "token_ids": completion.token_ids,
    }


def _round(values: Tensor) -> Tensor:
    return values.detach().cpu().double().round(decimals=_DECIMALS)


def _numbers(values_T: Tensor) -> list[float | None]:
    """Rounded values; JSON knows no infinity."""
    values: list[float] = _round(values_T).tolist()
    return list(values) if values_T.isfinite().all() else [x if math.isfinite(x) else None for x in values]
