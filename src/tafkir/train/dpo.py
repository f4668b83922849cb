"""Learning from preference pairs directly: DPO and its offline relatives, each loss a few lines.

Shapes: P pairs, S = 2 P answers, T answer tokens. Log-probabilities of an answer are sums over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.data.preference import EncodedPair, PairStream
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import linear_logprobs
from tafkir.recipe.rlhf import DpoConfig
from tafkir.train.language import split_evenly
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics
from tafkir.train.pairs import AnswerBatch, build_pair_batch, score_pairs_in_shares
from tafkir.train.ranks import OneProcess, Ranks

__all__ = [
    "KtoReference",
    "PairLogprobs",
    "answer_logprobs",
    "dpo_loss",
    "dpo_step",
    "ipo_loss",
    "kto_loss",
    "measure_dpo",
    "orpo_loss",
    "preference_loss",
    "reference_logprobs",
    "robust_dpo_loss",
    "simpo_loss",
]


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """Log-probabilities of both sides of P pairs under the policy and under the reference, and their lengths."""

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_lengths_P: Tensor
    rejected_lengths_P: Tensor

    def margins(self) -> Tensor:
        """h = log [pi(y_w) / pi_ref(y_w)] - log [pi(y_l) / pi_ref(y_l)], (P,)."""
        return (self.chosen_P - self.ref_chosen_P) - (self.rejected_P - self.ref_rejected_P)


def dpo_loss(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7); smoothed, conservative DPO (Mitchell 2023, equation 3).

    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), with h the margin of the log-ratios.

    Returns:
        One loss a pair, (P,).
    """
    logits_P = beta * pairs.margins()
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def robust_dpo_loss(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409, equation 12): unbiased where eps of the labels are wrong."""
    logits_P = beta * pairs.margins()
    clean_P = (1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)
    return -clean_P / (1 - 2 * label_smoothing)


def ipo_loss(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2, with h of means over tokens.

    The authors confirmed the means to TRL, which the equation leaves open.
    """
    chosen_P = (pairs.chosen_P - pairs.ref_chosen_P) / pairs.chosen_lengths_P
    rejected_P = (pairs.rejected_P - pairs.ref_rejected_P) / pairs.rejected_lengths_P
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def simpo_loss(pairs: PairLogprobs, *, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6): no reference, means over tokens, target margin gamma."""
    margin_P = pairs.chosen_P / pairs.chosen_lengths_P - pairs.rejected_P / pairs.rejected_lengths_P
    return -F.logsigmoid(beta * margin_P - gamma)


def orpo_loss(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, equations 4, 6, 7): the chosen side's NLL plus beta times -log sigmoid
    of the log odds ratio, both of means over tokens; no reference.
    """
    chosen_P, rejected_P = pairs.chosen_P / pairs.chosen_lengths_P, pairs.rejected_P / pairs.rejected_lengths_P
    log_odds_P = (chosen_P - rejected_P) - (_log1m_exp(chosen_P) - _log1m_exp(rejected_P))
    return -chosen_P - beta * F.logsigmoid(log_odds_P)


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, in the form that keeps digits on either side of -log 2 (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def kto_loss(pairs: PairLogprobs, *, beta: float, divergence: Tensor) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8): each side by itself is desirable or it is not.

    Mean of 1 - sigmoid(beta (h_w - z)) and 1 - sigmoid(beta (z - h_l)), with h the log-ratio of one answer. Chosen and
    rejected answers are equal in number, so both weights lambda are one.

    Args:
        divergence: z, the estimate of KL(pi || pi_ref), of the whole step and without a gradient; not below zero.
    """
    chosen_P = torch.sigmoid(beta * (pairs.chosen_P - pairs.ref_chosen_P - divergence))
    rejected_P = torch.sigmoid(beta * (divergence - (pairs.rejected_P - pairs.ref_rejected_P)))
    return 1 - (chosen_P + rejected_P) / 2


def preference_loss(pairs: PairLogprobs, config: DpoConfig, divergence: Tensor | None = None) -> Tensor:
    """The loss that the recipe names, one value a pair; KTO's needs its estimate of the divergence."""
    if config.loss == "kto":
        assert divergence is not None
        return kto_loss(pairs, beta=config.beta, divergence=divergence)
    if config.loss == "robust":
        return robust_dpo_loss(pairs, beta=config.beta, label_smoothing=config.label_smoothing)
    if config.loss == "ipo":
        return ipo_loss(pairs, beta=config.beta)
    if config.loss == "simpo":
        return simpo_loss(pairs, beta=config.beta, gamma=config.simpo_gamma)
    if config.loss == "orpo":
        return orpo_loss(pairs, beta=config.beta)
    return dpo_loss(pairs, beta=config.beta, label_smoothing=config.label_smoothing)


def answer_logprobs(decoder: Decoder, batch: AnswerBatch) -> tuple[Tensor, DecoderOutput]:
    """Log-probabilities (S,) of whole answers, float32, and the forward that gave them."""
    out = decoder(batch.input_ids_N, batch.positions_N, batch.attention)
    hidden_TD = out.hidden_ND.index_select(0, batch.source_T)
    logprobs_T = linear_logprobs(hidden_TD, decoder.head_weight, batch.targets_T, 1.0)
    return logprobs_T.new_zeros(batch.lengths_S.numel()).index_add(0, batch.sequence_T, logprobs_T), out


def reference_logprobs(decoder: Decoder, pairs: Sequence[EncodedPair], ranks: Ranks | None = None) -> Tensor:
    """Log-probabilities (P, 2) of the chosen and rejected side of each pair, without a gradient.

    Args:
        ranks: processes that hold the decoder together; they share the pairs out, and each gets all.
    """
    return score_pairs_in_shares(pairs, lambda batch: answer_logprobs(decoder, batch)[0], ranks or OneProcess())


class KtoReference:
    """KTO's reference point z: how far the policy is from the reference on answers that belong to other prompts.

    z = max(0, mean of log pi(y') - log pi_ref(y')) over the step's pairs (section 4.1), y' both answers of the pair
    that comes next in the data: so the reference is asked once, whichever pairs share a step.

    Args:
        reference: the decoder as it is before the first step.
        pairs: all that steps draw from.
        ranks: see `reference_logprobs`.
    """

    def __init__(self, reference: Decoder, pairs: Sequence[EncodedPair], ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        others = [*pairs[1:], *pairs[:1]]
        self.mismatched = [
            replace(pair, chosen_ids=other.chosen_ids, rejected_ids=other.rejected_ids)
            for pair, other in zip(pairs, others, strict=True)
        ]
        self.reference_P2 = reference_logprobs(reference, self.mismatched, ranks)

    def divergence(self, decoder: Decoder, indices: Sequence[int]) -> Tensor:
        """z over the pairs at `indices`, a scalar."""
        own_P2 = reference_logprobs(decoder, [self.mismatched[i] for i in indices], self.ranks)
        return (own_P2 - self.reference_P2[list(indices)]).mean().clamp(min=0)


def dpo_step(
    trainer: Trainer,
    stream: PairStream,
    reference_P2: Tensor,
    config: DpoConfig,
    kto: KtoReference | None = None,
) -> Callable[[int], StepOutput]:
    """A step function: mean preference loss over the pairs of the step, whatever the micro-batches.

    Args:
        reference_P2: `reference_logprobs` of `stream.pairs`.
        kto: of `stream.pairs`, where the loss is KTO's.
    """

    ranks = trainer.ranks

    def step(step: int) -> StepOutput:
        indices = stream.indices_at(step)
        divergence = kto.divergence(trainer.decoder, indices) if kto is not None else None
        total, tokens = 0.0, 0
        loads: list[Tensor] = []
        # Of each pair, the margin h and the log-ratio of the chosen side.
        seen_P2 = torch.zeros(len(indices), 2)
        for part in ranks.own(split_evenly(range(len(indices)), config.micro_batches * ranks.sizes.data_shards)):
            own = [indices[i] for i in part]
            batch = build_pair_batch([stream.pairs[i] for i in own])
            logprobs_S, out = answer_logprobs(trainer.decoder, batch)
            pairs = _pair_logprobs(logprobs_S, reference_P2[own], batch.lengths_S)
            loss = preference_loss(pairs, config, divergence).sum() / len(indices)
            loss.backward()
            total += loss.item()
            tokens += batch.input_ids_N.numel()
            loads = add_loads(loads, out.expert_load)
            seen_P2[list(part)] = torch.stack([pairs.margins(), pairs.chosen_P - pairs.ref_chosen_P], 1).detach()
        total, loads, tokens = ranks.sum(total), ranks.sum_loads(loads), int(ranks.sum(tokens))
        norm = trainer.update(loads, where=f"dpo step {step + 1}")
        margins_P, chosen_P = ranks.sum_tensor(seen_P2).unbind(1)
        accuracy = float((margins_P > 0).float().mean())
        return StepOutput(
            metrics={
                "train/loss": total,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                "dpo/accuracy": accuracy,
                "dpo/margin": config.beta * float(margins_P.mean()),
                # Below zero, the preferred answers themselves become less likely: DPO's known failure.
                "dpo/chosen_reward": config.beta * float(chosen_P.mean()),
                **({} if divergence is None else {"dpo/divergence": float(divergence)}),
                **router_metrics(loads),
            },
            tokens=tokens,
            shown={"loss": total, "accuracy": accuracy},
        )

    return step


@torch.no_grad()
def measure_dpo(
    decoder: Decoder,
    pairs: Sequence[EncodedPair],
    reference_P2: Tensor,
    config: DpoConfig,
    kto: KtoReference | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the margin h of each pair, (P,) both, without training on them."""
    divergence = kto.divergence(decoder, range(len(pairs))) if kto is not None else None
    logprobs_S = reference_logprobs(decoder, pairs, ranks).view(-1)
    lengths_S = torch.tensor([len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    seen = _pair_logprobs(logprobs_S, reference_P2, lengths_S)
    return preference_loss(seen, config, divergence), seen.margins()


def _pair_logprobs(logprobs_S: Tensor, reference_P2: Tensor, lengths_S: Tensor) -> PairLogprobs:
    own_P2, lengths_P2 = logprobs_S.view(-1, 2), lengths_S.view(-1, 2)
    return PairLogprobs(
        own_P2[:, 0], own_P2[:, 1], reference_P2[:, 0], reference_P2[:, 1], lengths_P2[:, 0], lengths_P2[:, 1]
    )
