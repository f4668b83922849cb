"""Reinforcement learning with verifiable rewards: GRPO advantages, the IcePop loss, rollouts from a `Completer`.

One step, one direction: prompts -> rollouts -> verdicts -> advantages -> batch -> loss -> update -> new weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.data.tokenizer import Tokenizer
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import linear_logprobs
from tafkir.protocols import Completer, Task
from tafkir.recipe.rl import RlvrConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, SamplingParams
from tafkir.runlog.metrics import Metric
from tafkir.train.advantages import grpo_advantages, zero_variance_groups
from tafkir.train.batch import RlBatch, build_rl_batch
from tafkir.train.language import split_evenly
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics
from tafkir.train.losses import policy_loss
from tafkir.train.mismatch import mismatch_metrics
from tafkir.train.rollout import RolloutGroup, collect_rollouts

__all__ = ["PromptBatch", "RlvrStep"]

PromptBatch = Callable[[int], Sequence[tuple[Example, Sequence[int]]]]
"""The problems of a step, each with its prompt tokens; a function of the step number alone."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """A micro-batch with the log-probabilities of the weights that sampled it."""

    batch: RlBatch
    old_logprobs_T: Tensor | None
    ref_logprobs_T: Tensor | None


class RlvrStep:
    """The step function of RLVR: `step(n)` samples, grades, and updates the policy.

    Args:
        trainer: the policy and its optimiser.
        completer: samples with weights of its own, refreshed through `load_weights` before every step.
        prompts: the problems of each step.
        reference: frozen first policy, needed when `config.kl.coef > 0`.
        seed: seed of the sampling streams.
    """

    def __init__(
        self,
        trainer: Trainer,
        completer: Completer,
        tokenizer: Tokenizer,
        task: Task,
        prompts: PromptBatch,
        config: RlvrConfig,
        *,
        reference: Decoder | None,
        seed: int,
    ) -> None:
        self.trainer, self.completer, self.tokenizer, self.task = trainer, completer, tokenizer, task
        self.prompts, self.config, self.reference, self.seed = prompts, config, reference, seed
        self.params = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_completion_tokens,
            stop_token_ids=(tokenizer.turn_end_id,),
        )

    def __call__(self, step: int) -> StepOutput:
        began = time.perf_counter()
        self.completer.load_weights(self.trainer.decoder.state_dict().items(), step)
        groups = collect_rollouts(
            self.completer,
            self.tokenizer,
            self.task,
            self.prompts(step),
            group_size=self.config.group_size,
            params=self.params,
            seed=derive_seed(self.seed, "rollout", step),
        )
        sampled = time.perf_counter()
        rewards_PG = torch.tensor([[r.verdict.reward for r in group.rollouts] for group in groups])
        metrics = rollout_metrics(groups, rewards_PG)
        metrics |= self.learn(groups, rewards_PG, where=f"rlvr step {step + 1}")
        return StepOutput(
            metrics=metrics,
            timings={"time/rollout_s": sampled - began, "time/train_s": time.perf_counter() - sampled},
            tokens=sum(len(r.completion.token_ids) for group in groups for r in group.rollouts),
            shown={"reward": float(rewards_PG.mean())},
        )

    def learn(self, groups: Sequence[RolloutGroup], rewards_PG: Tensor, *, where: str) -> dict[str, Metric]:
        """Turn graded groups into `updates_per_rollout` optimiser steps; returns the last one's metrics."""
        advantages_PG = grpo_advantages(rewards_PG, normalize_std=self.config.normalize_std)
        kept = list(range(len(groups)))
        if self.config.drop_zero_variance:
            kept = [i for i in kept if not zero_variance_groups(rewards_PG)[i]]
        if not kept:
            return {"train/skipped": 1.0}
        pieces = [
            self._score(build_rl_batch([groups[i] for i in part], advantages_PG[list(part)].tolist()))
            for part in split_evenly(kept, self.config.micro_batches)
        ]
        metrics: dict[str, Metric] = {}
        for _ in range(self.config.updates_per_rollout):
            metrics = self._update(pieces, where)
        return metrics

    def _score(self, batch: RlBatch) -> _Scored:
        """Log-probabilities that stay fixed while the batch is reused; the first update makes its own."""
        old = ref = None
        with torch.no_grad():
            if self.config.updates_per_rollout > 1:
                old, _ = self._logprobs(self.trainer.decoder, batch)
            if self.config.kl.coef > 0:
                assert self.reference is not None
                ref, _ = self._logprobs(self.reference, batch)
        return _Scored(batch, old, ref)

    def _logprobs(self, decoder: Decoder, batch: RlBatch) -> tuple[Tensor, DecoderOutput]:
        out = decoder(batch.input_ids_N, batch.positions_N, batch.attention)
        hidden_TD = out.hidden_ND.index_select(0, batch.source_T)
        return linear_logprobs(hidden_TD, decoder.head_weight, batch.targets_T, self.config.temperature), out

    def _update(self, pieces: Sequence[_Scored], where: str) -> dict[str, Metric]:
        config, decoder = self.config, self.trainer.decoder
        num_sequences = sum(piece.batch.lengths_S.numel() for piece in pieces)
        num_tokens = sum(piece.batch.targets_T.numel() for piece in pieces)
        loads: list[Tensor] = []
        total = clipped = nonfinite = 0.0
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        offset = 0
        for piece in pieces:
            batch = piece.batch
            logprobs_T, out = self._logprobs(decoder, batch)
            old_T = logprobs_T.detach() if piece.old_logprobs_T is None else piece.old_logprobs_T
            result = policy_loss(
                logprobs_T,
                old_T,
                batch.sampling_logprobs_T,
                batch.advantages_T,
                batch.sequence_T,
                batch.lengths_S,
                acceptance=config.acceptance,
                clip_eps_low=config.clip_eps_low,
                clip_eps_high=config.clip_eps_high,
                reduction=config.reduction,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                kl_coef=config.kl.coef,
                ref_logprobs_T=piece.ref_logprobs_T,
            )
            result.loss.backward()
            total += result.loss.item()
            clipped += float(result.clipped_T.sum())
            nonfinite += result.nonfinite
            loads = add_loads(loads, out.expert_load)
            seen.append((old_T, batch.sampling_logprobs_T, result.masked_T, batch.sequence_T + offset))
            offset += batch.lengths_S.numel()
        norm = self.trainer.update(loads, where=where)
        old_T, sampling_T, masked_T, sequence_T = (torch.cat(parts) for parts in zip(*seen, strict=True))
        return {
            "train/loss": total,
            "train/grad_norm": norm,
            "train/entropy": float(-old_T.mean()),
            "train/clip_fraction": clipped / num_tokens,
            "train/nonfinite_ratios": nonfinite,
            **mismatch_metrics(old_T, sampling_T, masked_T, sequence_T, num_sequences),
            **router_metrics(loads),
        }


def rollout_metrics(groups: Sequence[RolloutGroup], rewards_PG: Tensor) -> dict[str, Metric]:
    """What the rollouts of one step look like before any update."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    return {
        "rollout/reward_mean": float(rewards_PG.mean()),
        "rollout/accuracy": sum(r.verdict.correct for r in rollouts) / count,
        "rollout/length_mean": sum(len(r.completion.token_ids) for r in rollouts) / count,
        "rollout/truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / count,
        "rollout/unanswered": sum(r.verdict.outcome in ("no_answer", "length", "error") for r in rollouts) / count,
        "rollout/zero_variance_groups": float(zero_variance_groups(rewards_PG).float().mean()),
    }
