"""One policy update's loss and gradients, its groups shared out to the processes of a gloo group; for the tests."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tafkir.models.build import build_decoder
from tafkir.ops.loss import linear_logprobs
from tafkir.recipe.rl import PolicyLossTable
from tafkir.records import Completion, Example, Verdict
from tafkir.train.batch import build_rl_batch
from tafkir.train.losses import policy_loss
from tafkir.train.rollout import Rollout, RolloutGroup
from tests.train.conftest import CONFIG

GROUPS = ((5, [3, 7, 1]), (2, [4, 4, 9]), (9, [1, 2, 6]), (3, [8, 5, 2]), (1, [2, 10, 3]))
"""Tokens of each prompt, and of its completions."""


def make_groups() -> tuple[list[RolloutGroup], list[list[float]]]:
    """Groups of made-up rollouts with their advantages; the sampling engine is up to two nats off."""
    draw = torch.Generator().manual_seed(11)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, CONFIG.vocab_size, (count,), generator=draw).tolist())

    groups, advantages = [], []
    for prompt, lengths in GROUPS:
        rollouts = []
        for length in lengths:
            logprobs = tuple((-2.0 - 3.0 * torch.rand(length, generator=draw)).tolist())
            rollouts.append(
                Rollout(Completion("r", ids(length), logprobs, "stop"), "", Verdict("wrong", 0.0, None, ""))
            )
        groups.append(RolloutGroup(Example("p", "test", "train", "", ""), ids(prompt), tuple(rollouts)))
        advantages.append(torch.randn(len(lengths), generator=draw).tolist())
    return groups, advantages


def update(keys: dict[str, Any], pieces: int = 1) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of the whole step, whatever the number of processes and micro-batches."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    groups, advantages = make_groups()
    own = list(range(len(groups)))[rank::world]
    counts = torch.tensor([sum(len(groups[i].rollouts) for i in own), sum(_tokens(groups[i]) for i in own)])
    _add_up(counts, world)
    decoder = build_decoder(CONFIG, 5)
    config, total = PolicyLossTable.model_validate(keys), torch.zeros((), dtype=torch.float64)
    for first in range(pieces):
        part = own[first::pieces]
        if not part:
            continue
        batch = build_rl_batch([groups[i] for i in part], [advantages[i] for i in part])
        out = decoder(batch.input_ids_N, batch.positions_N, batch.attention)
        hidden_TD = out.hidden_ND.index_select(0, batch.source_T)
        logprobs_T = linear_logprobs(hidden_TD, decoder.head_weight, batch.targets_T)
        result = policy_loss(
            logprobs_T,
            logprobs_T.detach() - 0.1,
            batch.sampling_logprobs_T,
            batch.advantages_T,
            batch.sequence_T,
            batch.lengths_S,
            config=config,
            num_sequences=int(counts[0]),
            num_tokens=int(counts[1]),
        )
        result.loss.backward()
        total += result.loss.detach().double()
    _add_up(total, world)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in decoder.parameters()]
    for grad in grads:
        _add_up(grad, world)
    return float(total), grads


def _tokens(group: RolloutGroup) -> int:
    return sum(len(rollout.completion.token_ids) for rollout in group.rollouts)


def _add_up(value: Tensor, world: int) -> None:
    if world > 1:
        torch.distributed.all_reduce(value)
