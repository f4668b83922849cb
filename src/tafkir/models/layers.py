"""Small trainable parts: linear map, RMSNorm and the dense SwiGLU block."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.ops.moe import swiglu
from tafkir.ops.norm import rms_norm

__all__ = ["Embedding", "FreshWeights", "Linear", "RMSNorm", "SwiGLU"]


@runtime_checkable
class FreshWeights(Protocol):
    """A module that knows better than `init_weights` how its own parameters and buffers begin."""

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """Fill what the module itself holds, in place; its children are filled on their own."""
        ...


class Embedding(nn.Module):
    """A table of vectors; `weight` is [rows, width] and left uninitialised."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Linear(nn.Module):
    """x W^T, plus a bias where asked for; `weight` is [out, in] and left uninitialised, as is `bias`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """Normal weights, a bias of zero."""
        self.weight.normal_(0.0, std, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """Ones."""
        self.weight.fill_(1.0)

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
