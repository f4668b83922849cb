"""The next-token step that pre-training and supervised fine-tuning share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tafkir.data.packing import Document, PackedBatch, pack_documents
from tafkir.errors import DataError, RecipeError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import next_token_loss
from tafkir.recipe.schema import LanguageTable
from tafkir.train.loop import StepOutput, Trainer, add_loads, router_metrics
from tafkir.train.mtp import MtpLoss
from tafkir.train.ranks import OneProcess, Ranks
from tafkir.train.router_losses import RouterLosses

__all__ = ["DocumentBatch", "fill_rows", "language_loss", "language_step", "split_evenly", "validation_loss"]

DocumentBatch = Callable[[int], Sequence[Document]]
"""The documents of a step; a function of the step number alone."""

Item = TypeVar("Item")


def split_evenly(items: Sequence[Item], pieces: int) -> list[Sequence[Item]]:
    """At most `pieces` runs of items, none empty, sizes apart by one at most."""
    bounds = [len(items) * i // pieces for i in range(pieces + 1)]
    return [items[a:b] for a, b in pairwise(bounds) if b > a]


def fill_rows(documents: Sequence[Document], limit: int) -> list[Sequence[Document]]:
    """Documents in their order, in rows of at most `limit` tokens; 0 is one row.

    Raises:
        DataError: a document alone is longer.
    """
    if not limit:
        return [documents]
    rows: list[list[Document]] = []
    room = 0
    for document in documents:
        size = len(document[0])
        if size > limit:
            raise DataError(
                f"a document of {size} tokens does not fit a packed row of {limit}", fix="raise pack_tokens"
            )
        if size > room:
            rows.append([])
            room = limit
        rows[-1].append(document)
        room -= size
    return list(rows)


def language_loss(decoder: Decoder, batch: PackedBatch) -> tuple[Tensor, DecoderOutput]:
    """Summed cross entropy of the batch's targets, and the forward that gave it."""
    device = decoder.embed_tokens.weight.device
    state = VarlenCausal(batch.cu_seqlens, device)
    out = decoder(batch.input_ids_N.to(device), batch.positions_N.to(device), state)
    return next_token_loss(out.hidden_ND, decoder.head_weight, batch.labels_N.to(device)), out


def language_step(trainer: Trainer, documents: DocumentBatch, *, label: str) -> Callable[[int], StepOutput]:
    """A step function: mean next-token loss over all targets of the step, whatever the micro-batches and the ranks."""
    ranks = trainer.ranks
    limit = trainer.config.pack_tokens if isinstance(trainer.config, LanguageTable) else 0
    if limit and ranks.sizes.world > 1:
        raise RecipeError(
            "packed rows of a set size are for one process: ranks would have different numbers of them",
            where=f"{label}.pack_tokens",
            fix="set it to 0, and micro_batches to what memory takes",
        )

    def step(step: int) -> StepOutput:
        parts = split_evenly(documents(step), trainer.config.micro_batches * ranks.sizes.data_shards)
        pieces = [pack_documents(row) for part in ranks.own(parts) for row in fill_rows(part, limit)]
        targets = ranks.sum(sum(piece.num_targets for piece in pieces))
        mtp = MtpLoss.of_step(trainer.decoder, trainer.config, step, pieces, ranks)
        routers = RouterLosses.of_step(trainer.decoder, trainer.config, pieces, ranks.sum)
        total = 0.0
        loads: list[Tensor] = []
        for i, piece in enumerate(pieces):
            loss, out = language_loss(trainer.decoder, piece)
            objective = loss / targets
            if mtp is not None:
                objective = objective + mtp.of_piece(i, out)
            if routers is not None:
                objective = objective + routers.of_piece(piece, out)
            objective.backward()
            total += loss.item()
            loads = add_loads(loads, out.expert_load)
        total, loads = ranks.sum(total), ranks.sum_loads(loads)
        norm = trainer.update(loads, where=f"{label} step {step + 1}")
        extra = mtp.finish(trainer.config.expert_bias_update_rate) if mtp is not None else {}
        tokens = int(ranks.sum(sum(piece.input_ids_N.numel() for piece in pieces)))
        return StepOutput(
            metrics={
                "train/loss": total / targets,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                **extra,
                **router_metrics(loads),
                **(routers.metrics() if routers is not None else {}),
            },
            tokens=tokens,
            shown={"loss": total / targets},
        )

    return step


@torch.no_grad()
def validation_loss(
    decoder: Decoder, documents: Sequence[Document], *, batch_size: int = 64, ranks: Ranks | None = None
) -> float:
    """Mean next-token loss over the targets of all documents, in nats per token."""
    ranks = ranks or OneProcess()
    total, targets = 0.0, 0
    stride = batch_size * ranks.sizes.data_shards
    for start in range(0, len(documents), stride):
        parts = split_evenly(documents[start : start + stride], ranks.sizes.data_shards)
        mine = ranks.own(parts)
        # Sharded weights are gathered by all ranks at once, so one without documents computes and does not count.
        batch = pack_documents((mine or parts)[0])
        loss = float(language_loss(decoder, batch)[0])
        if mine:
            total += loss
            targets += batch.num_targets
    return ranks.sum(total) / max(1, ranks.sum(targets))
