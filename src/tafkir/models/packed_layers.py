"""Linear maps, embeddings and experts whose matrices stay as a checkpoint stores them; activations are float32.

Shapes: N tokens, D hidden, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.ops.moe import swiglu
from tafkir.ops.packed import PackedMatrix, packed_linear, packed_values

__all__ = ["PackedEmbedding", "PackedExperts", "PackedLinear"]


class PackedLinear(nn.Module):
    """x W^T over parts that stand one after the other, plus a bias where there is one."""

    def __init__(self, parts: Sequence[PackedMatrix], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.parts, self.bias = tuple(parts), bias

    @property
    def weight(self) -> Tensor:
        """What the parts are worth, float32 [out, in]; made anew each time."""
        return torch.cat([packed_values(part) for part in self.parts])

    def forward(self, x: Tensor) -> Tensor:
        out = packed_linear(x.reshape(-1, x.shape[-1]), self.parts).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(nn.Module):
    """A table of vectors in its stored dtype, handed out in float32."""

    def __init__(self, table: PackedMatrix) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        """One number of the dtype and on the device of what is handed out."""
        return self.table.codes.new_zeros(1, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table.codes).float()


class PackedExperts(nn.Module):
    """`Experts`, each with matrices of its own: `gate_up[e]` in parts, `down[e]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up: list[tuple[PackedMatrix, ...]] = []
        self.down: list[tuple[PackedMatrix, ...]] = []

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        out_ND = torch.zeros_like(x_ND)
        for expert in expert_ids_NA.unique().tolist():
            token, slot = (expert_ids_NA == expert).nonzero(as_tuple=True)
            hidden = swiglu(packed_linear(x_ND[token], self.gate_up[expert]))
            hidden *= weights_NA[token, slot].unsqueeze(1)
            out_ND.index_add_(0, token, packed_linear(hidden, self.down[expert]))
        return out_ND
