"""The stream mixing and Sinkhorn as Triton kernels: one pass over the streams each, forward and backward.

Shapes: N tokens, n streams (a power of two), D hidden. One program per token; its maps stay in registers. Importing
this module needs the `triton` package.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops.hyper_connections import Reading

__all__ = ["project_and_read", "read_streams", "sinkhorn", "write_streams"]

_MAX_BLOCK = 1024


@triton.jit
def _load_rows(pointer, token, block, num: tl.constexpr, hidden, width: tl.constexpr):
    """A [n, width] piece of one token's streams in float32, zero past the end."""
    columns = block * width + tl.arange(0, width)
    offsets = (token * num + tl.arange(0, num))[:, None] * hidden + columns[None, :]
    return tl.load(pointer + offsets, mask=columns[None, :] < hidden, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, rows, token, block, num: tl.constexpr, hidden, width: tl.constexpr):
    columns = block * width + tl.arange(0, width)
    offsets = (token * num + tl.arange(0, num))[:, None] * hidden + columns[None, :]
    tl.store(pointer + offsets, rows.to(pointer.dtype.element_ty), mask=columns[None, :] < hidden)


@triton.jit
def _write_forward(x, y, post, res, out, hidden, num: tl.constexpr, width: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    streams = tl.arange(0, num)
    post_n = tl.load(post + token * num + streams)
    res_ij = tl.load(res + (token * num + streams)[:, None] * num + streams[None, :])
    for block in range(0, tl.cdiv(hidden, width)):
        columns = block * width + tl.arange(0, width)
        x_jd = _load_rows(x, token, block, num, hidden, width)
        y_d = tl.load(y + token * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        mixed = tl.sum(res_ij[:, :, None] * x_jd[None, :, :], axis=1) + post_n[:, None] * y_d[None, :]
        _store_rows(out, mixed, token, block, num, hidden, width)


@triton.jit
def _write_backward(
    grad, x, y, post, res, grad_x, grad_y, grad_post, grad_res, hidden, num: tl.constexpr, width: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    streams = tl.arange(0, num)
    squares = (token * num + streams)[:, None] * num + streams[None, :]
    post_n = tl.load(post + token * num + streams)
    res_ij = tl.load(res + squares)
    sum_post = tl.zeros((num,), tl.float32)
    sum_res = tl.zeros((num, num), tl.float32)
    for block in range(0, tl.cdiv(hidden, width)):
        columns = block * width + tl.arange(0, width)
        inside = columns < hidden
        g_id = _load_rows(grad, token, block, num, hidden, width)
        x_jd = _load_rows(x, token, block, num, hidden, width)
        y_d = tl.load(y + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        _store_rows(grad_x, tl.sum(res_ij[:, :, None] * g_id[:, None, :], axis=0), token, block, num, hidden, width)
        below = tl.sum(post_n[:, None] * g_id, axis=0)
        tl.store(grad_y + token * hidden + columns, below.to(grad_y.dtype.element_ty), mask=inside)
        sum_post += tl.sum(g_id * y_d[None, :], axis=1)
        sum_res += tl.sum(g_id[:, None, :] * x_jd[None, :, :], axis=2)
    tl.store(grad_post + token * num + streams, sum_post)
    tl.store(grad_res + squares, sum_res)


@triton.jit
def _read_forward(x, pre, out, hidden, num: tl.constexpr, width: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    pre_n = tl.load(pre + token * num + tl.arange(0, num))
    for block in range(0, tl.cdiv(hidden, width)):
        columns = block * width + tl.arange(0, width)
        u_d = tl.sum(pre_n[:, None] * _load_rows(x, token, block, num, hidden, width), axis=0)
        tl.store(out + token * hidden + columns, u_d.to(out.dtype.element_ty), mask=columns < hidden)


@triton.jit
def _read_backward(grad, x, pre, grad_x, grad_pre, hidden, num: tl.constexpr, width: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    streams = tl.arange(0, num)
    pre_n = tl.load(pre + token * num + streams)
    total = tl.zeros((num,), tl.float32)
    for block in range(0, tl.cdiv(hidden, width)):
        columns = block * width + tl.arange(0, width)
        g_d = tl.load(grad + token * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        total += tl.sum(_load_rows(x, token, block, num, hidden, width) * g_d[None, :], axis=1)
        _store_rows(grad_x, pre_n[:, None] * g_d[None, :], token, block, num, hidden, width)
    tl.store(grad_pre + token * num + streams, total)


@triton.jit
def _first_iteration(logits):
    """log T_c(M0) and M1 = T_r(T_c(M0)) of one [n, n] matrix; see `ops/sinkhorn.py`."""
    shifted = logits - tl.max(logits, axis=0)[None, :]
    log_columns = shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))[None, :]
    powers = tl.exp(log_columns - tl.max(log_columns, axis=1)[:, None])
    return log_columns, powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def _sinkhorn_forward(logits, out, num: tl.constexpr, iters: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    offsets = (token * num + tl.arange(0, num))[:, None] * num + tl.arange(0, num)[None, :]
    _, matrix = _first_iteration(tl.load(logits + offsets))
    for _step in range(iters - 1):
        matrix = matrix / tl.sum(matrix, axis=0)[None, :]
        matrix = matrix / tl.sum(matrix, axis=1)[:, None]
    tl.store(out + offsets, matrix)


@triton.jit
def _sinkhorn_backward(logits, grad, out, num: tl.constexpr, iters: tl.constexpr):
    """Walks back through the iterations; each is run again from the start, in registers: n^2 numbers, no memory."""
    token = tl.program_id(0).to(tl.int64)
    offsets = (token * num + tl.arange(0, num))[:, None] * num + tl.arange(0, num)[None, :]
    log_columns, m1 = _first_iteration(tl.load(logits + offsets))
    below = tl.load(grad + offsets)
    for back in range(iters - 1):
        matrix = m1
        for _step in range(iters - 2 - back):
            matrix = matrix / tl.sum(matrix, axis=0)[None, :]
            matrix = matrix / tl.sum(matrix, axis=1)[:, None]
        column_sums = tl.sum(matrix, axis=0)
        columns = matrix / column_sums[None, :]
        row_sums = tl.sum(columns, axis=1)
        rows = columns / row_sums[:, None]
        below = (below - tl.sum(below * rows, axis=1)[:, None]) / row_sums[:, None]
        below = (below - tl.sum(below * columns, axis=0)[None, :]) / column_sums[None, :]
    product = below * m1
    product = product - m1 * tl.sum(product, axis=1)[:, None]
    tl.store(out + offsets, product - tl.exp(log_columns) * tl.sum(product, axis=0)[None, :])


def _width(hidden: int) -> int:
    return min(_MAX_BLOCK, int(triton.next_power_of_2(hidden)))


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
        ctx.save_for_backward(x_NnD, y_ND, post_Nn, res_Nij)
        tokens, num, hidden = x_NnD.shape
        out = torch.empty_like(x_NnD)
        _write_forward[(tokens,)](x_NnD, y_ND, post_Nn, res_Nij, out, hidden, num, _width(hidden))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(tensor) for tensor in inputs)
        tokens, num, hidden = grad.shape
        _write_backward[(tokens,)](grad.contiguous(), *inputs, *grads, hidden, num, _width(hidden))
        return grads


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NnD: Tensor, pre_Nn: Tensor) -> Tensor:
        ctx.save_for_backward(x_NnD, pre_Nn)
        tokens, num, hidden = x_NnD.shape
        out = x_NnD.new_empty(tokens, hidden)
        _read_forward[(tokens,)](x_NnD, pre_Nn, out, hidden, num, _width(hidden))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x_NnD, pre_Nn = ctx.saved_tensors
        grad_x, grad_pre = torch.empty_like(x_NnD), torch.empty_like(pre_Nn)
        tokens, num, hidden = x_NnD.shape
        _read_backward[(tokens,)](grad.contiguous(), x_NnD, pre_Nn, grad_x, grad_pre, hidden, num, _width(hidden))
        return grad_x, grad_pre


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Nij: Tensor, iters: int) -> Tensor:
        ctx.iters = iters
        ctx.save_for_backward(logits_Nij)
        out = torch.empty_like(logits_Nij)
        _sinkhorn_forward[(len(out),)](logits_Nij, out, out.shape[-1], iters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits_Nij,) = ctx.saved_tensors
        out = torch.empty_like(logits_Nij)
        _sinkhorn_backward[(len(out),)](logits_Nij, grad.contiguous(), out, out.shape[-1], ctx.iters)
        return out, None


def write_streams(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
    """`ops.hyper_connections.write_streams` in one kernel: reads (n + 1) D, writes n D; backward (3n + 2) D."""
    out = _Write.apply(x_NnD.contiguous(), y_ND.contiguous(), post_Nn.contiguous(), res_Nij.contiguous())
    return cast(Tensor, out)


def read_streams(x_NnD: Tensor, pre_Nn: Tensor) -> Tensor:
    """`ops.hyper_connections.read_streams` in one kernel, with its backward."""
    return cast(Tensor, _Read.apply(x_NnD.contiguous(), pre_Nn.contiguous()))


def project_and_read(
    x_NnD: Tensor, phi_MP: Tensor, bias_n: Tensor, alpha_pre: Tensor, norm_eps: float, pre_eps: float
) -> Reading:
    """`ops.hyper_connections.project_and_read`; norm and projection are torch's, the reading is one kernel."""
    flat_NP = x_NnD.flatten(1).float()
    z_NM = (flat_NP @ phi_MP.T) * torch.rsqrt(flat_NP.square().mean(-1, keepdim=True) + norm_eps)
    pre_Nn = torch.sigmoid(alpha_pre * z_NM[:, : x_NnD.shape[1]] + bias_n) + pre_eps
    return Reading(z_NM, read_streams(x_NnD, pre_Nn), x_NnD, pre_Nn)


def sinkhorn(logits_Nij: Tensor, iters: int) -> Tensor:
    """`ops.sinkhorn.sinkhorn` in one kernel, whose backward runs the iterations again without leaving the chip.

    Args:
        logits_Nij: [N, n, n] float32, n a power of two.
    """
    return cast(Tensor, _Sinkhorn.apply(logits_Nij.contiguous(), iters))
