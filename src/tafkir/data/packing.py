"""Documents to one flat batch: no padding, positions that restart, labels that never cross a boundary.

Shape suffix: N tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Document", "PackedBatch", "pack_documents"]

Document = tuple[Sequence[int], Sequence[bool] | None]
"""Token ids, and for each whether it is a target (None: every token but the first)."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Documents one after the other, shortest first.

    Attributes:
        input_ids_N: int64 token ids.
        positions_N: int64, from 0 in every document.
        cu_seqlens: document boundaries; first 0, last N.
        labels_N: int64; `labels_N[i]` is the token that position i has to predict (the next one of its document),
            or -100 where nothing is to be learnt.
        order: for each document of the batch, its index in the list that was given.
    """

    input_ids_N: Tensor
    positions_N: Tensor
    cu_seqlens: tuple[int, ...]
    labels_N: Tensor
    order: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Positions that have something to predict."""
        return int((self.labels_N != -100).sum())


def pack_documents(documents: Sequence[Document]) -> PackedBatch:
    """Lay documents out in one row, sorted by length so that attention pads little.

    Args:
        documents: non-empty token lists, each with its mask of targets.
    """
    order = sorted(range(len(documents)), key=lambda i: len(documents[i][0]))
    input_ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    cu_seqlens = [0]
    for i in order:
        ids, mask = documents[i]
        input_ids += ids
        positions += range(len(ids))
        if mask is None:
            labels += ids[1:]
        else:
            labels += [id if wanted else -100 for id, wanted in zip(ids[1:], mask[1:], strict=True)]
        labels.append(-100)
        cu_seqlens.append(len(input_ids))
    return PackedBatch(
        torch.tensor(input_ids, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        tuple(cu_seqlens),
        torch.tensor(labels, dtype=torch.int64),
        tuple(order),
    )
