"""Keys and values of what drafts tokens: few layers, one row a sequence, and whatever was guessed is written over.

Shapes: B sequences, N tokens of all of them one after the other, T most tokens of one, S cached length, H query heads,
G key-value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.engine.sequence import Sequence
from tafkir.engine.store import bucket

__all__ = ["DraftCache", "DraftView"]


class DraftCache:
    """Rows of keys and values that grow in powers of two.

    Args:
        num_layers: of the drafter.
        first_layer: number of its first one; MTP layers count on from the decoder's.
    """

    def __init__(self, num_layers: int, first_layer: int = 0) -> None:
        self.first_layer = first_layer
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._rows: dict[Sequence, int] = {}
        self._free: list[int] = []

    def view(self, sequences: SequenceOf[Sequence], starts: SequenceOf[int], lengths: SequenceOf[int]) -> DraftView:
        """Attention for `lengths` new tokens of each sequence, written from `starts` on over what stands there."""
        assert all(lengths)
        for seq in sequences:
            if seq not in self._rows:
                self._rows[seq] = self._free.pop() if self._free else len(self._rows)
        return DraftView(self, [self._rows[seq] for seq in sequences], starts, lengths)

    def drop(self, seq: Sequence) -> None:
        """Give a sequence's row back."""
        if seq in self._rows:
            self._free.append(self._rows.pop(seq))

    def layer(self, layer_idx: int, like_NGK: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [rows, S, G, K], with room for every row and this length."""
        index = layer_idx - self.first_layer
        rows = len(self._rows) + len(self._free)
        old = self._layers[index]
        if old is None or old[0].shape[0] < rows or old[0].shape[1] < length:
            have = old[0].shape[:2] if old else (0, 0)
            shape = (max(have[0], 1 << (rows - 1).bit_length()), max(have[1], bucket(length)), *like_NGK.shape[1:])
            # Zeros, because a masked position still enters the matmul: NaN from fresh memory would spread.
            new = like_NGK.new_zeros(shape), like_NGK.new_zeros(shape)
            for before, after in zip(old or (), new, strict=False):
                after[: have[0], : have[1]] = before
            self._layers[index] = old = new
        return old


class DraftView:
    """Causal attention of new tokens over their sequence's row; implements `AttentionState`.

    Args:
        cache: where keys and values lie.
        rows, starts, lengths: of each sequence its row, where its new tokens are written, and how many there are.

    Attributes:
        place_N: int64, where each token is written in its row.
        last_B: int64, each sequence's last token in the batch.
    """

    def __init__(
        self, cache: DraftCache, rows: SequenceOf[int], starts: SequenceOf[int], lengths: SequenceOf[int]
    ) -> None:
        self._cache, self._rows, self._start = cache, rows, starts[0]
        self._alike = len(set(lengths)) == 1
        self._longest, self._end = max(lengths), max(a + n for a, n in zip(starts, lengths, strict=True))
        if len(rows) == 1:
            # The most common case, and one in which every small operation is felt.
            self.place_N = torch.arange(starts[0], self._end)
            self.last_B = torch.tensor([lengths[0] - 1])
            seen = torch.ones(lengths[0], self._end, dtype=torch.bool).tril(starts[0]) if lengths[0] > 1 else None
            self._mask = seen
            return
        lengths_B, starts_B = torch.tensor(lengths), torch.tensor(starts)
        self._rows_B = torch.tensor(rows)
        step_BT = torch.arange(self._longest).expand(len(rows), -1)
        self._taken_BT = step_BT < lengths_B.unsqueeze(1)
        place_BT = starts_B.unsqueeze(1) + step_BT
        self.place_N = place_BT[self._taken_BT]
        self._row_N = self._rows_B.repeat_interleave(lengths_B)
        self.last_B = lengths_B.cumsum(0) - 1
        self._mask = (torch.arange(self._end) <= place_BT.unsqueeze(2)).unsqueeze(1)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        keys, values = self._cache.layer(layer_idx, k_NGK, self._end)
        rows: slice | Tensor
        if len(self._rows) == 1:
            rows = slice(self._rows[0], self._rows[0] + 1)
            keys[self._rows[0], self._start : self._end] = k_NGK
            values[self._rows[0], self._start : self._end] = v_NGK
        else:
            rows = self._rows_B
            keys[self._row_N, self.place_N] = k_NGK
            values[self._row_N, self.place_N] = v_NGK
        if self._alike:
            q_BTHK = q_NHK.view(len(self._rows), self._longest, *q_NHK.shape[1:])
        else:
            q_BTHK = q_NHK.new_zeros(*self._taken_BT.shape, *q_NHK.shape[1:])
            q_BTHK[self._taken_BT] = q_NHK
        out_BTHK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            keys[rows, : self._end].transpose(1, 2),
            values[rows, : self._end].transpose(1, 2),
            attn_mask=self._mask,
            enable_gqa=q_NHK.shape[1] != k_NGK.shape[1],
        ).transpose(1, 2)
        return out_BTHK.flatten(0, 1) if self._alike else out_BTHK[self._taken_BT]
