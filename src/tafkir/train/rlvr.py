"""Reinforcement learning with verifiable rewards: graded rollouts, advantages, the policy loss, an update.

One step, one direction: prompts -> rollouts -> verdicts -> advantages -> batch -> loss -> update -> new weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import linear_logprobs
from tafkir.recipe.rl import PolicyTable
from tafkir.runlog.metrics import Metric
from tafkir.runlog.rollouts import RolloutLog
from tafkir.train.advantages import advantages, overlong_penalty, zero_variance_groups
from tafkir.train.batch import RlBatch, build_rl_batch
from tafkir.train.language import split_evenly
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics
from tafkir.train.losses import policy_loss
from tafkir.train.mismatch import EntropyProbe, mismatch_metrics
from tafkir.train.monitor import MismatchMonitor, SeenTokens
from tafkir.train.record import Learned, record_rollouts
from tafkir.train.replay import ExpertAgreement, compare_experts
from tafkir.train.rollout import RolloutGroup, RolloutSource

__all__ = ["RlvrStep"]


@dataclass(frozen=True, slots=True)
class _Scored:
    """A micro-batch with the log-probabilities of the weights that sampled it."""

    batch: RlBatch
    old_logprobs_T: Tensor | None
    ref_logprobs_T: Tensor | None


@dataclass(frozen=True, slots=True)
class _LearnedPiece:
    """What one micro-batch came to, as other processes are told of it."""

    loss: float
    clipped: float
    nonfinite: float
    loads: list[Tensor]
    entropy: EntropyProbe
    agreement: ExpertAgreement
    old_T: Tensor
    sampling_T: Tensor
    masked_T: Tensor
    sequence_T: Tensor
    num_sequences: int


class RlvrStep:
    """The step function of reinforcement learning: `step(n)` takes graded rollouts and updates the policy.

    Args:
        trainer: the policy and its optimiser.
        rollouts: the graded groups of each step.
        config: advantages, loss and updates.
        reference: frozen first policy, needed when `config.kl.coef > 0`.
        log: keeps every rollout with what the update knew of it.
        monitor: watches the mismatch; without one it is watched, and nothing is written.
    """

    def __init__(
        self,
        trainer: Trainer,
        rollouts: RolloutSource,
        config: PolicyTable,
        *,
        reference: Decoder | None,
        log: RolloutLog | None = None,
        monitor: MismatchMonitor | None = None,
    ) -> None:
        self.trainer, self.rollouts, self.config, self.reference = trainer, rollouts, config, reference
        self.log = log
        self.monitor = monitor or MismatchMonitor(config.monitor, config.acceptance)

    def __call__(self, step: int) -> StepOutput:
        began = time.perf_counter()
        groups, ungraded = _graded(self.rollouts(step), f"rlvr step {step + 1}")
        sampled = time.perf_counter()
        rewards_PG = _rewards(groups)
        learned = self.learn(groups, rewards_PG, where=f"rlvr step {step + 1}")
        if self.log is not None:
            record_rollouts(self.log, step + 1, groups, learned)
        lights, stop = self._watch(step + 1, groups, learned)
        return StepOutput(
            metrics={
                **rollout_metrics(groups, rewards_PG),
                **self.rollouts.numbers(),
                **learned.metrics,
                **lights,
                **ungraded,
            },
            timings={"time/rollout_s": sampled - began, "time/train_s": time.perf_counter() - sampled},
            tokens=sum(len(r.completion.token_ids) for group in groups for r in group.rollouts),
            shown={"reward": float(rewards_PG.mean())},
            stop=stop,
        )

    def _watch(
        self, step: int, groups: Sequence[RolloutGroup], learned: Learned
    ) -> tuple[dict[str, float], TrainingError | None]:
        """What the monitor says of a step that learned something."""
        if learned.train_logprobs_T is None or learned.masked_T is None:
            return {}, None
        kept = [groups[i] for i in learned.kept]
        sampled_T = torch.tensor([x for group in kept for r in group.rollouts for x in r.completion.logprobs])
        seen = SeenTokens(kept, learned.train_logprobs_T, sampled_T, learned.masked_T)
        return self.monitor.observe(step, learned.metrics, seen)

    def learn(self, groups: Sequence[RolloutGroup], rewards_PG: Tensor, *, where: str) -> Learned:
        """Turn graded groups into `updates_per_rollout` optimiser steps; returns what the last one knew."""
        config = self.config
        advantages_PG = self._advantages(groups, rewards_PG)
        kept = list(range(len(groups)))
        if config.drop_zero_variance:
            dull_P = zero_variance_groups(self._shaped(groups, rewards_PG))
            kept = [i for i in kept if not dull_P[i]]
        kept = [i for i in kept if any(r.completion.token_ids for r in groups[i].rollouts)]
        if not kept:
            return Learned({"train/skipped": 1.0}, advantages_PG)
        ranks = self.trainer.ranks
        parts = list(enumerate(split_evenly(kept, config.micro_batches * ranks.sizes.data_shards)))
        pieces = [
            (place, self._score(build_rl_batch([groups[i] for i in part], advantages_PG[list(part)].tolist())))
            for place, part in ranks.own(parts)
        ]
        lengths = [len(r.completion.token_ids) for i in kept for r in groups[i].rollouts]
        for _ in range(config.updates_per_rollout):
            metrics, train_logprobs_T, masked_T = self._update(pieces, len(lengths), sum(lengths), where)
        return Learned(metrics, advantages_PG, kept, train_logprobs_T, masked_T)

    def _shaped(self, groups: Sequence[RolloutGroup], rewards_PG: Tensor) -> Tensor:
        """Rewards with what overlong completions cost."""
        overlong = self.config.overlong
        if overlong.buffer_tokens == 0:
            return rewards_PG
        lengths_PG = torch.tensor([[len(r.completion.token_ids) for r in group.rollouts] for group in groups])
        limit = self.config.max_completion_tokens
        return rewards_PG + overlong_penalty(
            lengths_PG, max_tokens=limit, buffer_tokens=overlong.buffer_tokens, penalty=overlong.penalty
        )

    def _advantages(self, groups: Sequence[RolloutGroup], rewards_PG: Tensor) -> Tensor:
        advantages_PG = advantages(self.config.advantage, self._shaped(groups, rewards_PG))
        if not self.config.overlong.drop_truncated:
            return advantages_PG
        cut_PG = torch.tensor([[r.completion.finish_reason == "length" for r in group.rollouts] for group in groups])
        return torch.where(cut_PG, torch.zeros_like(advantages_PG), advantages_PG)

    def _score(self, batch: RlBatch) -> _Scored:
        """Log-probabilities that stay fixed while the batch is reused; the first update makes its own."""
        old = ref = None
        with torch.no_grad():
            if self.config.updates_per_rollout > 1:
                old, _ = self._logprobs(self.trainer.decoder, batch, self._replayed(batch))
            if self.config.kl.coef > 0:
                assert self.reference is not None
                ref, _ = self._logprobs(self.reference, batch)
        return _Scored(batch, old, ref)

    def _replayed(self, batch: RlBatch) -> Sequence[Tensor] | None:
        """The experts that the policy has to take; None leaves the choice to its routers."""
        if not self.config.rollout.replay_experts:
            return None
        if not batch.expert_ids:
            raise TrainingError(
                "the rollouts do not say which experts their tokens went to",
                where="rollout.replay_experts",
                fix="set it to false, or use the in-process engine",
            )
        return batch.expert_ids

    def _logprobs(
        self, decoder: Decoder, batch: RlBatch, replayed: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, DecoderOutput]:
        out = decoder(batch.input_ids_N, batch.positions_N, batch.attention, replayed)
        hidden_TD = out.hidden_ND.index_select(0, batch.source_T)
        return linear_logprobs(hidden_TD, decoder.head_weight, batch.targets_T, self.config.temperature), out

    def _update(
        self, pieces: Sequence[tuple[int, _Scored]], num_sequences: int, num_tokens: int, where: str
    ) -> tuple[dict[str, Metric], Tensor, Tensor]:
        """One optimiser step; its metrics, and of every token the training log-probability and whether it is masked.

        Args:
            pieces: this process's micro-batches with their places among all of them.
            num_sequences: completions of all processes.
            num_tokens: their tokens.
        """
        config, ranks = self.config, self.trainer.ranks
        loss_table = config.model_copy(update={"acceptance": self.monitor.acceptance})
        own = [(place, self._learn_piece(piece, loss_table, num_sequences, num_tokens)) for place, piece in pieces]
        facts = [fact for _, fact in sorted(ranks.gather(own), key=itemgetter(0))]
        loads: list[Tensor] = []
        agreement, offset = ExpertAgreement(), 0
        sequences: list[Tensor] = []
        for fact in facts:
            loads = add_loads(loads, fact.loads)
            agreement += fact.agreement
            sequences.append(fact.sequence_T + offset)
            offset += fact.num_sequences
        norm = self.trainer.update(loads, where=where)
        old_T, sampling_T, masked_T = (
            torch.cat(parts) for parts in zip(*((f.old_T, f.sampling_T, f.masked_T) for f in facts), strict=True)
        )
        metrics: dict[str, Metric] = {
            "train/loss": sum(fact.loss for fact in facts),
            "train/grad_norm": norm,
            "train/entropy": float(-old_T.mean()),
            "train/clip_fraction": sum(fact.clipped for fact in facts) / num_tokens,
            "train/nonfinite_ratios": sum(fact.nonfinite for fact in facts),
            **mismatch_metrics(
                old_T,
                sampling_T,
                masked_T,
                torch.cat(sequences),
                num_sequences,
                low=config.monitor.low,
                high=config.monitor.high,
            ),
            **EntropyProbe.joined(fact.entropy for fact in facts).metrics(),
            **agreement.metrics(),
            **router_metrics(loads),
        }
        return metrics, old_T, masked_T

    def _learn_piece(
        self, piece: _Scored, loss_table: PolicyTable, num_sequences: int, num_tokens: int
    ) -> _LearnedPiece:
        """Forward and backward of one micro-batch; its gradients add to what is there."""
        config, decoder, batch = self.config, self.trainer.decoder, piece.batch
        logprobs_T, out = self._logprobs(decoder, batch, self._replayed(batch))
        old_T = logprobs_T.detach() if piece.old_logprobs_T is None else piece.old_logprobs_T
        result = policy_loss(
            logprobs_T,
            old_T,
            batch.sampling_logprobs_T,
            batch.advantages_T,
            batch.sequence_T,
            batch.lengths_S,
            config=loss_table,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            ref_logprobs_T=piece.ref_logprobs_T,
        )
        result.loss.backward()
        entropy = EntropyProbe()
        hidden_TD = out.hidden_ND.detach().index_select(0, batch.source_T)
        entropy.add(hidden_TD, decoder.head_weight, result.masked_T, config.temperature)
        return _LearnedPiece(
            result.loss.item(),
            float(result.clipped_T.sum()),
            float(result.nonfinite),
            out.expert_load,
            entropy,
            compare_experts(out.expert_ids, batch.expert_ids),
            old_T,
            batch.sampling_logprobs_T,
            result.masked_T,
            batch.sequence_T,
            batch.lengths_S.numel(),
        )


def _graded(groups: Sequence[RolloutGroup], where: str) -> tuple[Sequence[RolloutGroup], dict[str, Metric]]:
    """The groups that graders worked for, and how many completions they did not; a reward of 0 would teach nonsense.

    Raises:
        TrainingError: they did not for most of the completions.
    """
    verdicts = [rollout.verdict for group in groups for rollout in group.rollouts]
    broken = [verdict for verdict in verdicts if verdict.is_ungraded]
    kept = [group for group in groups if not group.is_ungraded] if broken else groups
    if broken and (not kept or 2 * len(broken) > len(verdicts)):
        raise TrainingError(
            f"{len(broken)} of {len(verdicts)} answers could not be graded; the first: {broken[0].reason}",
            where=where,
            fix="mend the grader, then run the command again: it goes on from its last state",
        )
    return kept, {"rollout/ungraded": float(len(broken))} if broken else {}


def _rewards(groups: Sequence[RolloutGroup]) -> Tensor:
    """Rewards (P, G).

    Raises:
        TrainingError: one is not a finite number.
    """
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            if not math.isfinite(rollout.verdict.reward):
                raise TrainingError(
                    f"the reward of completion {place} is {rollout.verdict.reward}",
                    where=f"problem {group.example.id}",
                    expected="a finite number",
                    fix="let the grader give 0 and say why, instead",
                )
    return torch.tensor([[r.verdict.reward for r in group.rollouts] for group in groups])


def rollout_metrics(groups: Sequence[RolloutGroup], rewards_PG: Tensor) -> dict[str, Metric]:
    """What the rollouts of one step look like before any update."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    return {
        "rollout/reward_mean": float(rewards_PG.mean()),
        "rollout/accuracy": sum(r.verdict.correct for r in rollouts) / count,
        "rollout/length_mean": sum(len(r.completion.token_ids) for r in rollouts) / count,
        "rollout/truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / count,
        "rollout/empty": sum(not r.completion.token_ids for r in rollouts) / count,
        "rollout/unanswered": sum(r.verdict.outcome in ("no_answer", "length", "error") for r in rollouts) / count,
        "rollout/zero_variance_groups": float(zero_variance_groups(rewards_PG).float().mean()),
    }
