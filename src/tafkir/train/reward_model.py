"""The Bradley-Terry reward model: its loss, its step, and the rewards of answers under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.data.preference import EncodedPair
from tafkir.models.reward import RewardModel
from tafkir.recipe.rlhf import RewardConfig
from tafkir.train.language import split_evenly
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics
from tafkir.train.pairs import (
    SCORE_BATCH,
    AnswerBatch,
    build_answer_batch,
    build_pair_batch,
    score_pairs_in_shares,
)
from tafkir.train.ranks import OneProcess, Ranks

__all__ = ["PairBatch", "ScoredPair", "bradley_terry_loss", "reward_step", "score_answers", "score_pairs"]

PairBatch = Callable[[int], Sequence[EncodedPair]]
"""The pairs of a step; a function of the step number alone."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """The rewards of a pair's two sides, and their lengths in tokens."""

    id: str
    source: str
    chosen_reward: float
    rejected_reward: float
    chosen_tokens: int
    rejected_tokens: int


def bradley_terry_loss(chosen_P: Tensor, rejected_P: Tensor, center_coef: float = 0.0) -> Tensor:
    """Summed negative log-likelihood that the chosen side wins: -log sigmoid(r_chosen - r_rejected).

    Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155, equation 1). `center_coef` adds
    `center_coef * (r_chosen + r_rejected)^2` (Eisenstein et al. 2023, arXiv 2312.09244, appendix), which fixes the
    constant that the likelihood leaves free.

    Args:
        chosen_P, rejected_P: rewards of P pairs.
    """
    loss_P = -F.logsigmoid(chosen_P - rejected_P)
    if center_coef > 0:
        loss_P = loss_P + center_coef * (chosen_P + rejected_P).square()
    return loss_P.sum()


def reward_step(trainer: Trainer, pairs: PairBatch, config: RewardConfig) -> Callable[[int], StepOutput]:
    """A step function: mean Bradley-Terry loss over the pairs of the step, whatever the micro-batches."""
    model, ranks = trainer.decoder, trainer.ranks
    assert isinstance(model, RewardModel)

    def step(step: int) -> StepOutput:
        batch = pairs(step)
        total, tokens = 0.0, 0
        loads: list[Tensor] = []
        rewards_P2 = torch.zeros(len(batch), 2)
        parts = split_evenly(range(len(batch)), config.micro_batches * ranks.sizes.data_shards)
        for part in ranks.own(parts):
            piece = build_pair_batch([batch[i] for i in part])
            out = model(piece.input_ids_N, piece.positions_N, piece.attention)
            own_P2 = model.rewards(out, piece.last_S).view(-1, 2)
            loss = bradley_terry_loss(own_P2[:, 0], own_P2[:, 1], config.center_coef) / len(batch)
            loss.backward()
            total += loss.item()
            tokens += piece.input_ids_N.numel()
            loads = add_loads(loads, out.expert_load)
            rewards_P2[list(part)] = own_P2.detach()
        total, loads, tokens = ranks.sum(total), ranks.sum_loads(loads), int(ranks.sum(tokens))
        norm = trainer.update(loads, where=f"reward step {step + 1}")
        rewards_P2 = ranks.sum_tensor(rewards_P2)
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        accuracy = float((margin_P > 0).float().mean())
        return StepOutput(
            metrics={
                "train/loss": total,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                "reward/accuracy": accuracy,
                "reward/margin": float(margin_P.mean()),
                "reward/mean": float(rewards_P2.mean()),
                "reward/std": float(rewards_P2.std()),
                **router_metrics(loads),
            },
            tokens=tokens,
            shown={"loss": total, "accuracy": accuracy},
        )

    return step


@torch.no_grad()
def score_answers(
    model: RewardModel, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    """Rewards of the answers to each prompt, by tokens; an answer that is empty has no reward and is not allowed."""
    rewards: list[list[float]] = []
    for start in range(0, len(groups), SCORE_BATCH):
        part = groups[start : start + SCORE_BATCH]
        values = iter(_forward(model, build_answer_batch(part)).tolist())
        rewards += [[next(values) for _ in answers] for _, answers in part]
    return rewards


def _forward(model: RewardModel, batch: AnswerBatch) -> Tensor:
    return model.rewards(model(batch.input_ids_N, batch.positions_N, batch.attention), batch.last_S)


def score_pairs(model: RewardModel, pairs: Sequence[EncodedPair], ranks: Ranks | None = None) -> list[ScoredPair]:
    """The rewards of both sides of each pair; with `ranks`, which share them out, all of them on each."""
    rewards_P2 = score_pairs_in_shares(pairs, partial(_forward, model), ranks or OneProcess())
    return [
        ScoredPair(pair.pair.id, pair.pair.source, chosen, rejected, len(pair.chosen_ids), len(pair.rejected_ids))
        for pair, (chosen, rejected) in zip(pairs, rewards_P2.tolist(), strict=True)
    ]
