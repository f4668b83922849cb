"""The next-token step that pre-training and supervised fine-tuning share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tafkir.data.packing import Document, PackedBatch, pack_documents
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import next_token_loss
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics

__all__ = ["DocumentBatch", "language_loss", "language_step", "split_evenly", "validation_loss"]

DocumentBatch = Callable[[int], Sequence[Document]]
"""The documents of a step; a function of the step number alone."""

Item = TypeVar("Item")


def split_evenly(items: Sequence[Item], pieces: int) -> list[Sequence[Item]]:
    """At most `pieces` runs of items, none empty, sizes apart by one at most."""
    bounds = [len(items) * i // pieces for i in range(pieces + 1)]
    return [items[a:b] for a, b in pairwise(bounds) if b > a]


def language_loss(decoder: Decoder, batch: PackedBatch) -> tuple[Tensor, DecoderOutput]:
    """Summed cross entropy of the batch's targets, and the forward that gave it."""
    out = decoder(batch.input_ids_N, batch.positions_N, VarlenCausal(batch.cu_seqlens))
    return next_token_loss(out.hidden_ND, decoder.head_weight, batch.labels_N), out


def language_step(trainer: Trainer, documents: DocumentBatch, *, label: str) -> Callable[[int], StepOutput]:
    """A step function: mean next-token loss over all targets of the step, whatever the micro-batches."""

    def step(step: int) -> StepOutput:
        pieces = [pack_documents(part) for part in split_evenly(documents(step), trainer.config.micro_batches)]
        targets = sum(piece.num_targets for piece in pieces)
        total = 0.0
        loads: list[Tensor] = []
        for piece in pieces:
            loss, out = language_loss(trainer.decoder, piece)
            (loss / targets).backward()
            total += loss.item()
            loads = add_loads(loads, out.expert_load)
        norm = trainer.update(loads, where=f"{label} step {step + 1}")
        tokens = sum(piece.input_ids_N.numel() for piece in pieces)
        return StepOutput(
            metrics={
                "train/loss": total / targets,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                **router_metrics(loads),
            },
            tokens=tokens,
            shown={"loss": total / targets},
        )

    return step


@torch.no_grad()
def validation_loss(decoder: Decoder, documents: Sequence[Document], *, batch_size: int = 64) -> float:
    """Mean next-token loss over the targets of all documents, in nats per token."""
    total, targets = 0.0, 0
    for start in range(0, len(documents), batch_size):
        batch = pack_documents(documents[start : start + batch_size])
        total += float(language_loss(decoder, batch)[0])
        targets += batch.num_targets
    return total / max(1, targets)
