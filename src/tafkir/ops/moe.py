"""SwiGLU, and the mixture of experts over stacked weights: a masked loop, and expert-sorted matmuls for speed.

Shapes: N tokens, D hidden, E experts, A active experts per token, I expert width, P = N * A token-expert pairs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native

__all__ = ["moe_experts", "moe_experts_reference", "swiglu", "swiglu_backward", "swiglu_reference"]


# Numbers that fit into a core's cache with what is computed of them.
_CACHED_NUMBERS = 1 << 15


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for a [..., 2I] input whose first half is the gate (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """Write the gradient with respect to the [..., 2I] input of `swiglu` into `out`."""
    width = grad.shape[-1]
    gate, up = gate_up[..., :width], gate_up[..., width:]
    sig = torch.sigmoid(gate)
    silu = sig * gate
    torch.mul(grad, silu, out=out[..., width:])
    # d silu(g) = sig + silu (1 - sig) = sig + silu - silu sig
    slope = torch.addcmul(sig, silu, sig, value=-1.0).add_(silu).mul_(up)
    torch.mul(grad, slope, out=out[..., :width])


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
        out = torch.empty_like(gate_up)
        _swiglu_backward(grad, gate_up, out)
        return out


class _NativeSwiGLU(torch.autograd.Function):
    """The same in one pass each way."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        native.call("tafkir_swiglu", gate_up, out.numel() // width, width, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        out, width = torch.empty_like(gate_up), grad.shape[-1]
        native.call("tafkir_swiglu_backward", grad.contiguous(), gate_up, grad.numel() // width, width, out)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """The same as `swiglu_reference`; only the input is kept for the backward."""
    if native.takes(gate_up):
        return cast(Tensor, _NativeSwiGLU.apply(gate_up.contiguous()))  # type: ignore[no-untyped-call]
    return cast(Tensor, _SwiGLU.apply(gate_up))  # type: ignore[no-untyped-call]


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient with respect to `swiglu`'s contiguous [..., 2I] input, for autograd functions that contain it."""
    out, width = torch.empty_like(gate_up), grad.shape[-1]
    if native.takes(grad, gate_up):
        native.call("tafkir_swiglu_backward", grad.contiguous(), gate_up, grad.numel() // width, width, out)
        return out
    # In pieces that stay in the cache, of which each op makes a pass; a single row is cut, too.
    single = gate_up.ndim == 1
    shaped = [x if single else x.view(-1, x.shape[-1]) for x in (grad.contiguous(), gate_up, out)]
    parts = (shaped[0], *(half for x in shaped[1:] for half in (x[..., :width], x[..., width:])))
    size = _CACHED_NUMBERS if single else max(1, _CACHED_NUMBERS // width)
    for grad_C, gate_C, up_C, to_gate_C, to_up_C in zip(*(part.split(size) for part in parts), strict=True):
        torch.mul(grad_C, F.silu(gate_C), out=to_up_C)
        torch.ops.aten.silu_backward.grad_input(grad_C * up_C, gate_C, grad_input=to_gate_C)
    return out


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
    """Pairs sorted by expert: each expert is a few steps on its own slice, which fits the cache.

    The routing weight multiplies the activation before the down projection, where a row is narrowest; its
    gradient is then the row sum of that product's gradient. Pairs return to tokens by a gather, not a scatter.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor
    ) -> Tensor:
        num_experts, width, hidden_size = gate_up_EID.shape[0], down_EDI.shape[2], x_ND.shape[1]
        flat_P = expert_ids_NA.reshape(-1)
        order_P = torch.sort(flat_P, stable=True).indices
        counts = torch.bincount(flat_P, minlength=num_experts).tolist()
        token_P = torch.div(order_P, expert_ids_NA.shape[1], rounding_mode="floor")
        weight_P1 = weights_NA.reshape(-1, 1).index_select(0, order_P).to(x_ND.dtype)
        x_PD = x_ND.new_empty(len(order_P), hidden_size)
        gate_up_P = x_ND.new_empty(len(order_P), 2 * width)
        scaled_PI = x_ND.new_empty(len(order_P), width)
        y_PD = x_ND.new_empty(len(order_P), hidden_size)
        pairs = (torch.split(t, counts) for t in (token_P, weight_P1, x_PD, gate_up_P, scaled_PI, y_PD))
        weights = (gate_up_EID.transpose(1, 2), down_EDI.transpose(1, 2))
        for token, weight, x, gate_up, scaled, y, w_in, w_out in zip(*pairs, *weights, strict=True):
            if len(token):
                torch.index_select(x_ND, 0, token, out=x)
                torch.mm(x, w_in, out=gate_up)
                torch.mul(F.silu(gate_up[:, :width]).mul_(gate_up[:, width:]), weight, out=scaled)
                torch.mm(scaled, w_out, out=y)
        inverse_P = torch.empty_like(order_P)
        inverse_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        inverse_NA = inverse_P.view_as(expert_ids_NA)
        ctx.counts = counts
        ctx.save_for_backward(
            x_PD, gate_up_EID, down_EDI, gate_up_P, scaled_PI, weight_P1, weights_NA, token_P, inverse_NA
        )
        return _sum_pairs(y_PD, inverse_NA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        (x_PD, gate_up_EID, down_EDI, gate_up_P, scaled_PI, weight_P1, weights_NA, token_P, inverse_NA) = (
            ctx.saved_tensors
        )
        grad_ND = grad_ND.contiguous()
        grad_gate_up, grad_down = torch.empty_like(gate_up_EID), torch.empty_like(down_EDI)
        grad_x_PD, grad_weight_P = torch.empty_like(x_PD), torch.empty_like(weight_P1)
        pairs = (
            torch.split(t, ctx.counts)
            for t in (token_P, weight_P1, x_PD, gate_up_P, scaled_PI, grad_x_PD, grad_weight_P)
        )
        weights = (gate_up_EID, down_EDI, grad_gate_up, grad_down)
        for token, weight, x, gate_up, scaled, grad_x, grad_weight, w_in, w_out, grad_in, grad_out in zip(
            *pairs, *weights, strict=True
        ):
            if not len(token):
                grad_in.zero_()
                grad_out.zero_()
                continue
            grad_y = grad_ND.index_select(0, token)
            torch.mm(grad_y.t(), scaled, out=grad_out)
            grad_hidden = _weighted_swiglu_backward(grad_y @ w_out, gate_up, weight, grad_weight)
            torch.mm(grad_hidden.t(), x, out=grad_in)
            torch.mm(grad_hidden, w_in, out=grad_x)
        grad_weights = grad_weight_P.view(-1)[inverse_NA].to(weights_NA.dtype)
        return _sum_pairs(grad_x_PD, inverse_NA), grad_gate_up, grad_down, None, grad_weights


class _NativeMoEExperts(torch.autograd.Function):
    """The same in one call each way; of what lies between, only the gate_up projection's output is kept."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor
    ) -> Tensor:
        (num_tokens, active), (num_experts, hidden_size, width) = expert_ids_NA.shape, down_EDI.shape
        num_pairs = num_tokens * active
        order_P, inverse_P = torch.empty(num_pairs, dtype=torch.long), torch.empty(num_pairs, dtype=torch.long)
        starts_E = torch.empty(num_experts + 1, dtype=torch.long)
        pairs = (order_P, inverse_P, starts_E)
        if native.call("tafkir_sort_pairs", expert_ids_NA, num_pairs, num_experts, *pairs, threads=False):
            raise IndexError(f"an expert id is out of range [0, {num_experts})")
        out_ND, gate_up_P = torch.empty_like(x_ND), x_ND.new_empty(num_pairs, 2 * width)
        scratch_PD = x_ND.new_empty(num_pairs, hidden_size)
        ctx.sizes = (num_tokens, active, num_experts, hidden_size, width)
        inputs = (x_ND, gate_up_EID, down_EDI, weights_NA, *pairs)
        native.call("tafkir_experts", *inputs, *ctx.sizes, gate_up_P, scratch_PD, out_ND)
        ctx.save_for_backward(*inputs, gate_up_P)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        *inputs, gate_up_P = ctx.saved_tensors
        grad_x, grad_gate_up, grad_down, grad_weights = (torch.empty_like(x) for x in inputs[:4])
        scratch_PD = grad_ND.new_empty(len(gate_up_P), grad_ND.shape[1])
        native.call(
            "tafkir_experts_backward",
            *(grad_ND.contiguous(), *inputs, *ctx.sizes, gate_up_P, scratch_PD),
            *(grad_x, grad_gate_up, grad_down, grad_weights),
        )
        return grad_x, grad_gate_up, grad_down, None, grad_weights


def _weighted_swiglu_backward(grad: Tensor, gate_up: Tensor, weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Through weight * swiglu(gate_up): write d weight into `grad_weight` [C, 1], return d gate_up [C, 2I]."""
    width = grad.shape[1]
    torch.sum(F.silu(gate_up[:, :width]).mul_(gate_up[:, width:]).mul_(grad), 1, keepdim=True, out=grad_weight)
    out = torch.empty_like(gate_up)
    _swiglu_backward(grad.mul_(weight), gate_up, out)
    return out


def _sum_pairs(pairs_PD: Tensor, inverse_NA: Tensor) -> Tensor:
    """Add up each token's pairs in the order of its expert slots (no scatter, so no race and the same bits)."""
    if pairs_PD.dtype == torch.float32:
        return F.embedding_bag(inverse_NA, pairs_PD, mode="sum")
    return pairs_PD[inverse_NA].sum(1)


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
    tensors = (x_ND, gate_up_EID, down_EDI, weights_NA)
    if native.takes(*tensors, mixes_rows=True):
        x_ND, gate_up_EID, down_EDI, weights_NA = (x.contiguous() for x in tensors)
        ids_NA = expert_ids_NA.long().contiguous()
        out = _NativeMoEExperts.apply(x_ND, gate_up_EID, down_EDI, ids_NA, weights_NA)  # type: ignore[no-untyped-call]
        return cast(Tensor, out)
    return cast(Tensor, _MoEExperts.apply(x_ND, gate_up_EID, down_EDI, expert_ids_NA, weights_NA))  # type: ignore[no-untyped-call]
