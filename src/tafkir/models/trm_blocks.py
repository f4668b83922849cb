"""Parts of the tiny recursive model: blocks that norm after each sublayer, the table of puzzle vectors, fresh weights.

Shapes: B batch, S positions, D hidden, H heads, K head dim, P puzzle ids, E numbers of a puzzle vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.models.layers import Linear, SwiGLU
from tafkir.ops.post_norm import post_norm, swiglu_post_norm
from tafkir.ops.rope import apply_rope_reference
from tafkir.recipe.trm import TrmShape

__all__ = ["PuzzleTable", "SolverNetwork", "truncated_normal_"]

Angles = tuple[Tensor, Tensor]

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

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.weight.to(x.dtype), self.down_proj.weight.to(x.dtype)
        return swiglu_post_norm(x, gate_up, down, self.eps, 0 if self.dim == 0 else -1)


class _AttentionSublayer(nn.Module):
    """rms(x + attention(x)): every position sees every other one."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.num_heads, self.eps = shape.num_attention_heads, shape.rms_norm_eps
        width = shape.num_attention_heads * shape.head_dim
        self.qkv_proj = Linear(shape.hidden_size, 3 * width)
        self.o_proj = Linear(width, shape.hidden_size)

    def forward(self, x_BSD: Tensor, angles: Angles | None) -> Tensor:
        qkv = F.linear(x_BSD, self.qkv_proj.weight.to(x_BSD.dtype)).unflatten(-1, (3 * self.num_heads, -1))
        q_BSHK, k_BSHK, v_BSHK = qkv.chunk(3, dim=2)
        if angles is not None:
            q_BSHK, k_BSHK = apply_rope_reference(q_BSHK, *angles), apply_rope_reference(k_BSHK, *angles)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q_BSHK, k_BSHK, v_BSHK)))
        update = F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj.weight.to(x_BSD.dtype))
        return post_norm(x_BSD, update, self.eps)


class _Block(nn.Module):
    """Positions are mixed, then each one is transformed by itself. The mlp mixer has the positions first: [S, B, D]."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.attention = _AttentionSublayer(shape) if shape.mixer == "attention" else None
        self.token_mlp = _SwigluSublayer(shape, shape.num_positions, 0) if shape.mixer == "mlp" else None
        self.mlp = _SwigluSublayer(shape, shape.hidden_size, -1)

    def forward(self, x: Tensor, angles: Angles | None) -> Tensor:
        if self.attention is not None:
            x = self.attention(x, angles)
        if self.token_mlp is not None:
            x = self.token_mlp(x)
        out: Tensor = self.mlp(x)
        return out


class SolverNetwork(nn.Module):
    """The few blocks that every update of y and z goes through."""

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, x: Tensor, angles: Angles | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, angles)
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
