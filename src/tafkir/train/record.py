"""What is kept of a step's rollouts: one row per completion, with all that the update knew of it.

T: sampled tokens of the groups that were learned from, all completions one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tafkir.runlog.metrics import Metric
from tafkir.runlog.rollouts import RolloutLog
from tafkir.train.rollout import Rollout, RolloutGroup

__all__ = ["Learned", "record_rollouts"]

_DECIMALS = 5

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
    keys = [(i, j) for i in learned.kept for j in range(len(groups[i].rollouts))]
    lengths = [len(groups[i].rollouts[j].completion.token_ids) for i, j in keys]
    logprobs = _round(learned.train_logprobs_T).split(lengths)
    masks = learned.masked_T.cpu().split(lengths)
    return {
        key: (_numbers(x), mask.nonzero().flatten().tolist())
        for key, x, mask in zip(keys, logprobs, masks, strict=True)
    }


def _rows(
    step: int,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    trained: Mapping[tuple[int, int], _Tokens],
) -> Iterator[str]:
    for i, group in enumerate(groups):
        example = group.example
        shared = {"step": step, "group": i, "id": example.id, "source": example.source, "question": example.question}
        # Written once for all completions of the group: most of a row is its prompt.
        head = json.dumps(shared | {"prompt_ids": group.prompt_ids}, ensure_ascii=False)[:-1]
        sampled = torch.tensor([x for r in group.rollouts for x in r.completion.logprobs])
        sampled_G = _round(sampled).split([len(r.completion.logprobs) for r in group.rollouts])
        for j, rollout in enumerate(group.rollouts):
            train_logprobs, masked = trained.get((i, j), (None, []))
            row = {
                "completion": j,
                **_facts(rollout),
                "advantage": advantages[i][j],
                "logprobs": _numbers(sampled_G[j]),
                "train_logprobs": train_logprobs,
                "masked": masked,
            }
            yield f"{head}, {json.dumps(row, ensure_ascii=False)[1:]}"


def _facts(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    versions = completion.token_versions or (completion.policy_version,) * len(completion.token_ids)
    return {
        **asdict(rollout.verdict),
        "text": rollout.text,
        "finish_reason": completion.finish_reason,
        "versions": [[version, len(list(run))] for version, run in groupby(versions)],
        "token_ids": completion.token_ids,
    }


def _round(logprobs_T: Tensor) -> Tensor:
    return logprobs_T.detach().cpu().double().round(decimals=_DECIMALS)


def _numbers(values_T: Tensor) -> list[float | None]:
    values: list[float] = values_T.tolist()
    # JSON knows no infinity.
    return list(values) if values_T.isfinite().all() else [x if math.isfinite(x) else None for x in values]
