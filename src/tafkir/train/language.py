"""The next-token step that pre-training and supervised fine-tuning share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tafkir.data.packing import PackedBatch, pack_documents
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import next_token_loss
from tafkir.train.loop import StepOutput, Trainer, router_metrics

__all__ = ["Document", "language_loss", "language_step", "split_evenly"]

Document = tuple[Sequence[int], Sequence[bool] | None]
"""Token ids, and for each whether it is a target (None: every token but the first)."""


Item = TypeVar("Item")


def split_evenly(items: Sequence[Item], pieces: int) -> list[Sequence[Item]]:
    """At most `pieces` runs of items, none empty, sizes apart by one at most."""
    bounds = [len(items) * i // pieces for i in range(pieces + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
