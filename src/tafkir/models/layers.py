"""Small trainable parts: linear map, RMSNorm and the dense SwiGLU block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.ops.moe import swiglu
from tafkir.ops.norm import rms_norm

__all__ = ["Embedding", "Linear", "RMSNorm", "SwiGLU"]


class Embedding(nn.Module):
    """A table of vectors; `weight` is [rows, width] and left uninitialised."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Linear(nn.Module):
    """x W^T without a bias; `weight` is [out, in] and left uninitialised."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up in one matrix, gate rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_ND)))  # type: ignore[no-any-return]  # nn.Module call
