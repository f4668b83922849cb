"""Parts of the tiny recursive model: blocks that norm after each sublayer, the table of puzzle vectors, fresh weights.

Shapes: B batch, S positions, D hidden, H heads, K head dim, P puzzle ids, E numbers of a puzzle vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.layers import Linear, SwiGLU
from tafkir.ops.post_norm import post_norm, swiglu_post_norm
from tafkir.ops.split_heads import Angles, attend, split_heads
from tafkir.recipe.trm import TrmShape

__all__ = ["PuzzleTable", "SolverNetwork", "truncated_normal_"]

Matrices = tuple[Tensor, ...]
"""Of a block: its mixer's, then gate_up and down of its SwiGLU; in the dtype of the passes."""

# Standard deviation of a standard normal cut at -2 and 2.
_CUT_STD = 0.8796256610342398


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Normal within two standard deviations, widened so that `std` is the deviation of what is drawn."""
    nn.init.trunc_normal_(tensor, a=-2.0, b=2.0, generator=generator)
    return tensor.mul_(std / _CUT_STD)


class _SwigluSublayer(SwiGLU):
    """rms(x + swiglu(x)) along one dim."""

    def __init__(self, shape: TrmShape, width: int, dim: int) -> None:
        super().__init__(width, shape.intermediate_size(width))
        self.eps, self.dim = shape.rms_norm_eps, dim

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj.weight, self.down_proj.weight

    def forward(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        return swiglu_post_norm(x, gate_up, down, self.eps, 0 if self.dim == 0 else -1)


class _AttentionSublayer(nn.Module):
    """rms(x + attention(x)): every position sees every other one."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.num_heads, self.eps = shape.num_attention_heads, shape.rms_norm_eps
        width = shape.num_attention_heads * shape.head_dim
        self.qkv_proj = Linear(shape.hidden_size, 3 * width)
        self.o_proj = Linear(width, shape.hidden_size)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.qkv_proj.weight, self.o_proj.weight

    def forward(self, x_BSD: Tensor, qkv: Tensor, out: Tensor, angles: Angles | None) -> Tensor:
        mixed_BHSK = attend(*split_heads(F.linear(x_BSD, qkv), self.num_heads, angles))
        return post_norm(x_BSD, F.linear(mixed_BHSK.transpose(1, 2).flatten(2), out), self.eps)


class _NeighbourSublayer(nn.Module):
    """rms(x + f(x)), f a filter over a cell and the eight around it, each of the D numbers by itself; 0 outside.

    Not in the paper; after recurrent convolutional solvers of mazes (arXiv 2106.04537, 2202.05826).
    """

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.columns, self.eps = shape.columns, shape.rms_norm_eps
        self.filters = nn.Parameter(torch.empty(shape.hidden_size, 3, 3))

    def matrices(self) -> tuple[Tensor]:
        return (self.filters,)

    def forward(self, x_BSD: Tensor, filters: Tensor) -> Tensor:
        grid_BDRC = x_BSD.unflatten(1, (-1, self.columns)).permute(0, 3, 1, 2)
        mixed_BDRC = F.conv2d(grid_BDRC, filters.unsqueeze(1), padding=1, groups=len(filters))
        return post_norm(x_BSD, mixed_BDRC.permute(0, 2, 3, 1).flatten(1, 2), self.eps)


class _Block(nn.Module):
    """Positions are mixed, then each one is transformed by itself. The mlp mixer has the positions first: [S, B, D]."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.attention = _AttentionSublayer(shape) if shape.mixer == "attention" else None
        self.token_mlp = _SwigluSublayer(shape, shape.num_positions, 0) if shape.mixer == "mlp" else None
        self.neighbours = _NeighbourSublayer(shape) if shape.mixer == "neighbours" else None
        self.mlp = _SwigluSublayer(shape, shape.hidden_size, -1)

    def matrices(self) -> tuple[Tensor, ...]:
        mixer = self.attention or self.token_mlp or self.neighbours
        assert mixer is not None
        return *mixer.matrices(), *self.mlp.matrices()

    def forward(self, x: Tensor, matrices: Matrices, angles: Angles | None) -> Tensor:
        *mixing, gate_up, down = matrices
        if self.attention is not None:
            x = self.attention(x, *mixing, angles)
        if self.token_mlp is not None:
            x = self.token_mlp(x, *mixing)
        if self.neighbours is not None:
            x = self.neighbours(x, *mixing)
        out: Tensor = self.mlp(x, gate_up, down)
        return out


class SolverNetwork(nn.Module):
    """The few blocks that every update of y and z goes through."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.num_hidden_layers))

    def matrices(self, dtype: torch.dtype) -> list[Matrices]:
        """The blocks' matrices in another dtype, differentiable: converted once for all passes of a step."""
        return [tuple(matrix.to(dtype) for matrix in layer.matrices()) for layer in self.layers]  # type: ignore[operator]

    def forward(self, x: Tensor, angles: Angles | None = None, matrices: Sequence[Matrices] | None = None) -> Tensor:
        for layer, own in zip(self.layers, matrices or self.matrices(x.dtype), strict=True):
            x = layer(x, own, angles)
        return x


class PuzzleTable(nn.Module):
    """One vector for each puzzle id, of which a step touches few: `weight` [P, E] is a buffer, no parameter.

    In training each lookup is a copy that collects its gradient, and is kept in `touched` until the optimiser has
    taken it (`train.optim.SparseSignSgd`).
    """

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, width))
        self.touched: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids_B: Tensor) -> Tensor:
        vectors_BE = self.weight[ids_B]
        if self.training and torch.is_grad_enabled():
            vectors_BE = vectors_BE.requires_grad_()
            self.touched.append((ids_B, vectors_BE))
        return vectors_BE
