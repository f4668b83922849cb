"""SwiGLU, and the mixture of experts over stacked weights: a masked loop, and expert-sorted matmuls for speed.

Shapes: N tokens, D hidden, E experts, A active experts per token, I expert width, P = N * A token-expert pairs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["moe_experts", "moe_experts_reference", "swiglu", "swiglu_reference"]


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for a [..., 2I] input whose first half is the gate (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient with respect to the [..., 2I] input of `swiglu`."""
    width = grad.shape[-1]
    gate, up = gate_up[..., :width], gate_up[..., width:]
    out = torch.empty_like(gate_up)
    sig = torch.sigmoid(gate)
    silu = sig * gate
    torch.mul(grad, silu, out=out[..., width:])
    # d silu(g) = sig + silu (1 - sig) = sig + silu - silu sig
    slope = torch.addcmul(sig, silu, sig, value=-1.0).add_(silu)
    torch.mul(grad, up, out=out[..., :width]).mul_(slope)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward(grad, gate_up)


def swiglu(gate_up: Tensor) -> Tensor:
    """The same as `swiglu_reference`; only the input is kept for the backward."""
    return cast(Tensor, _SwiGLU.apply(gate_up))  # type: ignore[no-untyped-call]


def moe_experts_reference(
    x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Sum over a token's experts of weight * down(swiglu(gate_up(x))), one expert at a time."""
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EID.shape[0]):
        token, slot = (expert_ids_NA == expert).nonzero(as_tuple=True)
        hidden = swiglu_reference(F.linear(x_ND[token], gate_up_EID[expert]))
        y = F.linear(hidden, down_EDI[expert]) * weights_NA[token, slot].unsqueeze(1).to(x_ND.dtype)
        out_ND = out_ND.index_add(0, token, y)
    return out_ND


class _MoEExperts(torch.autograd.Function):
    """Pairs sorted by expert, so that each expert is one matmul on a slice; pairs return to tokens by a gather.

    The routing weight multiplies the activation before the down projection, where a row is narrowest; its
    gradient is then the row sum of that product's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor
    ) -> Tensor:
        num_experts, double_width, hidden_size = gate_up_EID.shape
        active = expert_ids_NA.shape[1]
        flat_P = expert_ids_NA.reshape(-1)
        order_P = torch.sort(flat_P, stable=True).indices
        slices = _expert_slices(flat_P, num_experts)
        token_P = torch.div(order_P, active, rounding_mode="floor")
        weight_P1 = weights_NA.reshape(-1, 1).index_select(0, order_P).to(x_ND.dtype)
        x_PD = x_ND.index_select(0, token_P)
        gate_up_P = x_ND.new_empty(len(order_P), double_width)
        y_PD = x_ND.new_empty(len(order_P), hidden_size)
        for expert, start, stop in slices:
            torch.mm(x_PD[start:stop], gate_up_EID[expert].t(), out=gate_up_P[start:stop])
        width = double_width // 2
        scaled_PI = F.silu(gate_up_P[:, :width]).mul_(gate_up_P[:, width:]).mul_(weight_P1)
        for expert, start, stop in slices:
            torch.mm(scaled_PI[start:stop], down_EDI[expert].t(), out=y_PD[start:stop])
        inverse_P = torch.empty_like(order_P)
        inverse_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        ctx.slices, ctx.active, ctx.weights_dtype = slices, active, weights_NA.dtype
        ctx.save_for_backward(x_PD, gate_up_EID, down_EDI, gate_up_P, scaled_PI, weight_P1, token_P, inverse_P)
        return _sum_pairs(y_PD, inverse_P, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        x_PD, gate_up_EID, down_EDI, gate_up_P, scaled_PI, weight_P1, token_P, inverse_P = ctx.saved_tensors
        width = scaled_PI.shape[1]
        grad_PD = grad_ND.index_select(0, token_P)
        grad_scaled_PI = torch.empty_like(scaled_PI)
        grad_down = torch.zeros_like(down_EDI)
        for expert, start, stop in ctx.slices:
            torch.mm(grad_PD[start:stop], down_EDI[expert], out=grad_scaled_PI[start:stop])
            torch.mm(grad_PD[start:stop].t(), scaled_PI[start:stop], out=grad_down[expert])
        act_PI = F.silu(gate_up_P[:, :width]).mul_(gate_up_P[:, width:])
        grad_weight_P = act_PI.mul_(grad_scaled_PI).sum(1)
        grad_gate_up_P = _swiglu_backward(grad_scaled_PI.mul_(weight_P1), gate_up_P)
        grad_gate_up = torch.zeros_like(gate_up_EID)
        grad_x_PD = torch.empty_like(x_PD)
        for expert, start, stop in ctx.slices:
            torch.mm(grad_gate_up_P[start:stop], gate_up_EID[expert], out=grad_x_PD[start:stop])
            torch.mm(grad_gate_up_P[start:stop].t(), x_PD[start:stop], out=grad_gate_up[expert])
        grad_weights = grad_weight_P.index_select(0, inverse_P).view(-1, ctx.active).to(ctx.weights_dtype)
        return _sum_pairs(grad_x_PD, inverse_P, ctx.active), grad_gate_up, grad_down, None, grad_weights


def _expert_slices(flat_P: Tensor, num_experts: int) -> list[tuple[int, int, int]]:
    """(expert, start, stop) in the expert-sorted order, for experts that got a token."""
    slices, start = [], 0
    for expert, count in enumerate(torch.bincount(flat_P, minlength=num_experts).tolist()):
        if count:
            slices.append((expert, start, start + count))
        start += count
    return slices


def _sum_pairs(pairs_PD: Tensor, inverse_P: Tensor, active: int) -> Tensor:
    """Add up each token's pairs, in the order of its expert slots (no scatter, so no race and the same bits)."""
    return pairs_PD.index_select(0, inverse_P).view(-1, active, pairs_PD.shape[1]).sum(1)


def moe_experts(
    x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """The routed experts' weighted sum; the same numbers as `moe_experts_reference`.

    Args:
        x_ND: tokens.
        gate_up_EID: [E, 2I, D], gate rows first.
        down_EDI: [E, D, I].
        expert_ids_NA: int64, each token's experts, all different.
        weights_NA: the experts' weights, float32.

    Returns:
        [N, D] in x's dtype.
    """
    return cast(Tensor, _MoEExperts.apply(x_ND, gate_up_EID, down_EDI, expert_ids_NA, weights_NA))  # type: ignore[no-untyped-call]
