"""The multi-token-prediction loss beside the next-token loss, and what the layers are worth on held-out documents.

Shapes: M rows that a depth reads, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.data.packing import Document, PackedBatch, pack_documents
from tafkir.errors import TrainingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput, balance_routers
from tafkir.models.mtp import MtpOutput, MultiTokenPredictor, ShiftedBatch, shift_documents
from tafkir.ops.loss import CHUNK_TOKENS, IGNORE_INDEX, next_token_loss
from tafkir.recipe.schema import LanguageTable, TrainTable
from tafkir.runlog.metrics import Metric
from tafkir.train.ranks import OneProcess, Ranks

__all__ = ["MtpCounts", "MtpLoss", "measure_mtp", "mtp_loss_weight_at", "predict", "predictor_of", "run_decoder"]


def mtp_loss_weight_at(step: int, config: TrainTable) -> float:
    """λ of step `step` (from 0): `mtp_loss_weight`, then `mtp_final_loss_weight` after `mtp_switch_share` of the steps.

    DeepSeek-V3 takes 0.3 for 10T of 14.8T tokens, then 0.1 (arXiv 2412.19437, section 4.2); Ling 2.0 keeps 0.1.
    """
    if not isinstance(config, LanguageTable):
        return 0.0
    if config.mtp_final_loss_weight is not None and step >= config.mtp_switch_share * config.steps:
        return config.mtp_final_loss_weight
    return config.mtp_loss_weight


def predictor_of(decoder: Decoder) -> MultiTokenPredictor:
    """The decoder's layers.

    Raises:
        TrainingError: it has none.
    """
    if decoder.mtp is None:
        raise TrainingError(
            "the model has no multi-token-prediction layers",
            where="model.mtp",
            fix="give the recipe a [model.mtp] table",
        )
    return decoder.mtp


def _shift(decoder: Decoder, batch: PackedBatch, *, every_depth: bool = False) -> list[ShiftedBatch]:
    depth, device = predictor_of(decoder).shape.depth, decoder.embed_tokens.weight.device
    ids_N, positions_N, labels_N = (t.to(device) for t in (batch.input_ids_N, batch.positions_N, batch.labels_N))
    return shift_documents(ids_N, positions_N, labels_N, batch.cu_seqlens, depth, every_depth=every_depth)


def run_decoder(decoder: Decoder, batch: PackedBatch) -> DecoderOutput:
    """The decoder's own forward, on its own device."""
    device = decoder.embed_tokens.weight.device
    state = VarlenCausal(batch.cu_seqlens, device)
    out: DecoderOutput = decoder(batch.input_ids_N.to(device), batch.positions_N.to(device), state)
    return out


def predict(decoder: Decoder, out: DecoderOutput, shifted: Sequence[ShiftedBatch]) -> Iterator[MtpOutput]:
    """Each depth's output on its rows, computed when asked for."""
    outputs: Iterator[MtpOutput] = predictor_of(decoder)(out.hidden_ND, out.pre_norm_ND, decoder.embed_tokens, shifted)
    return outputs


class MtpCounts:
    """What one optimiser step adds up over its micro-batches and processes, by depth.

    Args:
        pieces: this process's micro-batches.
        ranks: all processes; they compute every depth together, those without a row for it as well.
    """

    def __init__(self, decoder: Decoder, pieces: Sequence[PackedBatch], ranks: Ranks | None = None) -> None:
        self.mtp, self.ranks = predictor_of(decoder), ranks or OneProcess()
        self.depth = self.mtp.shape.depth
        self.shifted = [_shift(decoder, piece, every_depth=self.ranks.sizes.world > 1) for piece in pieces]
        self.targets = [
            int(self.ranks.sum(sum(int((s[k].labels_M != IGNORE_INDEX).sum()) for s in self.shifted if len(s) > k)))
            for k in range(self.depth)
        ]
        self.losses = [0.0] * self.depth
        num_experts = self.mtp.config.num_experts
        self.loads = [torch.zeros(num_experts, dtype=torch.int64) for _ in self.mtp.routers]

    def add(self, k: int, loss: Tensor, output: MtpOutput, *, idle: bool = False) -> Tensor:
        """Note a depth's summed loss; returns its share of the step's loss, (1/D) loss_k / targets_k."""
        if idle:
            # Nothing, by way of the layer: its gradients are summed over all processes.
            return 0.0 * output.hidden_MD.sum()
        self.losses[k] += loss.item()
        if output.expert_ids_MA is not None:
            self.loads[k] = self.loads[k].to(loss.device) + torch.bincount(
                output.expert_ids_MA.reshape(-1), minlength=len(self.loads[k])
            )
        return loss / (max(1, self.targets[k]) * self.depth)

    def metrics(self, name: str) -> dict[str, float]:
        """Mean loss per target of every depth that had one."""
        return {
            f"{name}/{k + 1}": self.ranks.sum(loss) / targets
            for k, (loss, targets) in enumerate(zip(self.losses, self.targets, strict=True))
            if targets
        }

    def balance(self, rate: float) -> None:
        """Nudge the layers' own routers towards balance."""
        if rate > 0:
            balance_routers(self.mtp.routers, self.ranks.sum_loads(self.loads), rate)


class MtpLoss:
    """L = (λ/D) Σ_k CE_k of one optimiser step (arXiv 2412.19437, equations 24 and 25).

    CE_k is the mean over all targets of depth k in the step, whatever the micro-batches.
    """

    def __init__(
        self, decoder: Decoder, pieces: Sequence[PackedBatch], weight: float, ranks: Ranks | None = None
    ) -> None:
        self.decoder, self.weight = decoder, weight
        self.counts = MtpCounts(decoder, pieces, ranks)

    @staticmethod
    def of_step(
        decoder: Decoder, config: TrainTable, step: int, pieces: Sequence[PackedBatch], ranks: Ranks | None = None
    ) -> MtpLoss | None:
        """The loss of step `step` (from 0), or None where its λ is 0: then nothing is computed."""
        weight = mtp_loss_weight_at(step, config)
        return MtpLoss(decoder, pieces, weight, ranks) if weight > 0 else None

    def of_piece(self, index: int, out: DecoderOutput) -> Tensor:
        """The loss's part of one micro-batch, to be added to that of the next-token loss."""
        shifted = self.counts.shifted[index]
        total = out.hidden_ND.new_zeros(())
        for k, output in enumerate(predict(self.decoder, out, shifted)):
            loss = next_token_loss(output.hidden_MD, self.decoder.head_weight, shifted[k].labels_M)
            total = total + self.counts.add(k, loss, output, idle=shifted[k].idle)
        return self.weight * total

    def finish(self, rate: float) -> dict[str, Metric]:
        """After the optimiser's step: balance the layers' routers; returns what to write down."""
        self.counts.balance(rate)
        return {"train/mtp_loss_weight": self.weight, **self.counts.metrics("train/mtp_loss")}


@dataclass(frozen=True, slots=True)
class _Tally:
    loss: float = 0.0
    agreed: int = 0
    targets: int = 0


@torch.no_grad()
def measure_mtp(decoder: Decoder, documents: Sequence[Document], *, batch_size: int = 64) -> dict[str, float]:
    """What the layers are worth on held-out documents, at the positions that are targets.

    Returns:
        For every depth k that has targets: `mtp_acceptance/k`, how often its most probable token is also the
        decoder's one token later (with the true tokens in between: what greedy speculative decoding accepts at this
        depth once the depths before were right), and `mtp_loss/k`, its mean cross entropy on the text, in nats.
    """
    tallies = [_Tally() for _ in range(predictor_of(decoder).shape.depth)]
    head_VD = decoder.head_weight
    for start in range(0, len(documents), batch_size):
        piece = pack_documents(documents[start : start + batch_size])
        out = run_decoder(decoder, piece)
        shifted = _shift(decoder, piece)
        for k, output in enumerate(predict(decoder, out, shifted)):
            wanted = (shifted[k].labels_M != IGNORE_INDEX).nonzero().squeeze(1)
            drafted = _greedy(output.hidden_MD[wanted], head_VD)
            target = _greedy(out.hidden_ND[shifted[k].rows_M[wanted] + k + 1], head_VD)
            loss = next_token_loss(output.hidden_MD, head_VD, shifted[k].labels_M)
            before = tallies[k]
            tallies[k] = _Tally(
                before.loss + float(loss),
                before.agreed + int((drafted == target).sum()),
                before.targets + len(wanted),
            )
    found = {}
    for k, tally in enumerate(tallies, start=1):
        if tally.targets:
            found[f"mtp_acceptance/{k}"] = tally.agreed / tally.targets
            found[f"mtp_loss/{k}"] = tally.loss / tally.targets
    return found


def _greedy(hidden_MD: Tensor, head_VD: Tensor) -> Tensor:
    """The most probable token of each row, int64 [M], a chunk of logits at a time."""
    if not len(hidden_MD):
        return torch.zeros(0, dtype=torch.int64, device=hidden_MD.device)
    return torch.cat([F.linear(chunk, head_VD).argmax(-1) for chunk in hidden_MD.split(CHUNK_TOKENS)])
