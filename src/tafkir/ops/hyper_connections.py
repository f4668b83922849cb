"""Hyper-connections: mapping n residual streams to a sublayer's input and its output back, beside their references.

Shapes: N tokens, n streams, D hidden, M = n^2 + 2n map entries in the order [pre | post | res], n x n row-major.
`res_Nij` weighs stream j in new stream i.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops import native
from tafkir.ops.sinkhorn import NATIVE_STREAMS, sinkhorn_reference

__all__ = [
    "Maps",
    "Reading",
    "Write",
    "deepseek_v4_exit",
    "deepseek_v4_maps_reference",
    "deepseek_v4_res",
    "gated_maps",
    "hc_maps",
    "mhc_maps_reference",
    "project_and_read",
    "project_and_read_reference",
    "read_streams",
    "read_streams_reference",
    "write_and_read",
    "write_streams",
    "write_streams_reference",
]


class Maps(NamedTuple):
    """What one sublayer does with the streams: H_pre [N, n], H_post [N, n], H_res [N, n, n], all float32."""

    pre_Nn: Tensor
    post_Nn: Tensor
    res_Nij: Tensor


def _native_takes(x_NnD: Tensor, *others: Tensor) -> bool:
    return x_NnD.shape[1] in NATIVE_STREAMS and native.takes(x_NnD, *others, mixes_rows=True)


def split_maps(flat_NM: Tensor, num_streams: int) -> Maps:
    """The three parts of [N, M]."""
    pre, post, res = flat_NM.split([num_streams, num_streams, num_streams**2], dim=-1)
    return Maps(pre, post, res.unflatten(-1, (num_streams, num_streams)))


def _gates(alpha_3: Tensor, num_streams: int) -> Tensor:
    """alpha_pre, alpha_post and alpha_res, each repeated over its entries: [M]."""
    counts = (num_streams, num_streams, num_streams**2)
    return torch.cat([alpha_1.expand(count) for alpha_1, count in zip(alpha_3.split(1), counts, strict=True)])


def hc_maps(x_NnD: Tensor, theta_KD: Tensor, bias_M: Tensor, alpha_3: Tensor, eps: float) -> Maps:
    """Hyper-connections without constraints (arXiv 2512.24880, equation 5; arXiv 2409.19606, equations 10-13).

    H = alpha tanh(theta RMSNorm(x)^T) + b, each stream normalised by itself.

    Args:
        theta_KD: [n + 2, D], rows theta_pre, theta_post, then the n of theta_res; row i of the latter makes row i of
            H_res, one entry per stream.
    """
    num = x_NnD.shape[1]
    normed = x_NnD.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    gated_NKn = torch.tanh(torch.einsum("kd,nid->nki", theta_KD, normed))
    return split_maps(gated_NKn.flatten(1) * _gates(alpha_3, num) + bias_M, num)


def _normed_projection(x_NnD: Tensor, phi_MP: Tensor, eps: float) -> Tensor:
    flat = x_NnD.flatten(1).float()
    return (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)) @ phi_MP.T


def mhc_maps_reference(x_NnD: Tensor, phi_MP: Tensor, bias_M: Tensor, alpha_3: Tensor, iters: int, eps: float) -> Maps:
    """Manifold-constrained hyper-connections as the paper writes them (arXiv 2512.24880, equations 7 to 9).

    One RMSNorm over all n D entries (its weight absorbed in phi), no tanh; sigmoid, 2 sigmoid, Sinkhorn.

    Args:
        phi_MP: [M, n D].
    """
    num = x_NnD.shape[1]
    raw = split_maps(_normed_projection(x_NnD, phi_MP, eps) * _gates(alpha_3, num) + bias_M, num)
    return Maps(torch.sigmoid(raw.pre_Nn), 2 * torch.sigmoid(raw.post_Nn), sinkhorn_reference(raw.res_Nij, iters))


def deepseek_v4_res(logits_Nji: Tensor, iters: int, eps: float) -> Tensor:
    """H_res [N, i, j] from DeepSeek-V4's stored `comb` logits, which are transposed: `comb[j, i]` weighs j in i.

    softmax over the last dim plus eps, columns, then `iters - 1` times rows and columns, eps in every denominator.
    """
    comb = torch.softmax(logits_Nji, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb.mT


def deepseek_v4_maps_reference(
    x_NnD: Tensor, fn_MP: Tensor, base_M: Tensor, scale_3: Tensor, iters: int, hc_eps: float, norm_eps: float
) -> Maps:
    """The maps of a DeepSeek-V4 checkpoint (arXiv 2606.19348): eps on pre and in Sinkhorn, comb transposed."""
    num = x_NnD.shape[1]
    raw = split_maps(_normed_projection(x_NnD, fn_MP, norm_eps) * _gates(scale_3, num) + base_M, num)
    res = deepseek_v4_res(raw.res_Nij, iters, hc_eps)
    return Maps(torch.sigmoid(raw.pre_Nn) + hc_eps, 2 * torch.sigmoid(raw.post_Nn), res)


def deepseek_v4_exit(
    x_NnD: Tensor, fn_nP: Tensor, base_n: Tensor, scale_1: Tensor, hc_eps: float, norm_eps: float
) -> Tensor:
    """DeepSeek-V4's `hc_head`: the streams, weighed by sigmoid(scale x_hat fn + base) + eps, summed to [N, D]."""
    pre = torch.sigmoid(_normed_projection(x_NnD, fn_nP, norm_eps) * scale_1 + base_n) + hc_eps
    return read_streams_reference(x_NnD, pre)


def read_streams_reference(x_NnD: Tensor, pre_Nn: Tensor) -> Tensor:
    """The sublayer's input H_pre X, [N, D], in x's dtype."""
    return (pre_Nn.unsqueeze(-1) * x_NnD).sum(1).to(x_NnD.dtype)


class _NativeRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NnD: Tensor, pre_Nn: Tensor) -> Tensor:
        ctx.save_for_backward(x_NnD, pre_Nn)
        u_ND = x_NnD.new_empty(x_NnD.shape[0], x_NnD.shape[2])
        native.call("tafkir_read_streams", x_NnD, pre_Nn, *x_NnD.shape, u_ND)
        return u_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
        x_NnD, pre_Nn = ctx.saved_tensors
        grad_N1D = grad_ND.unsqueeze(1)
        return pre_Nn.unsqueeze(-1) * grad_N1D, torch.bmm(grad_N1D, x_NnD.mT).squeeze(1)


def read_streams(x_NnD: Tensor, pre_Nn: Tensor) -> Tensor:
    """`read_streams_reference` in one pass."""
    if _native_takes(x_NnD, pre_Nn):
        return cast(Tensor, _NativeRead.apply(x_NnD.contiguous(), pre_Nn.contiguous()))  # type: ignore[no-untyped-call]
    return torch.bmm(pre_Nn.unsqueeze(1), x_NnD.float()).squeeze(1).to(x_NnD.dtype)


def write_streams_reference(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
    """Equation 3: H_res X + H_post^T y, in x's dtype."""
    mixed = torch.einsum("nij,njd->nid", res_Nij, x_NnD.float())
    return (mixed + post_Nn.unsqueeze(-1) * y_ND.float().unsqueeze(1)).to(x_NnD.dtype)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
        ctx.save_for_backward(x_NnD, y_ND, post_Nn, res_Nij)
        out = post_Nn.unsqueeze(-1) * y_ND.float().unsqueeze(1)
        return out.baddbmm_(res_Nij, x_NnD.float()).to(x_NnD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NnD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_NnD, y_ND, post_Nn, res_Nij = ctx.saved_tensors
        grad = grad_NnD.contiguous().float()
        grad_x = torch.bmm(res_Nij.mT, grad).to(x_NnD.dtype)
        grad_y = torch.bmm(post_Nn.unsqueeze(1), grad).squeeze(1).to(y_ND.dtype)
        # A row times a transposed block is twice as fast on the CPU as the block times a column.
        grad_post = torch.bmm(y_ND.float().unsqueeze(1), grad.mT).squeeze(1)
        return grad_x, grad_y, grad_post, torch.bmm(grad, x_NnD.float().mT)


class _NativeWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
        ctx.save_for_backward(x_NnD, y_ND, post_Nn, res_Nij)
        out = torch.empty_like(x_NnD)
        native.call("tafkir_write_streams", x_NnD, y_ND, post_Nn, res_Nij, *x_NnD.shape, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NnD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in inputs)
        native.call("tafkir_write_streams_backward", grad_NnD.contiguous(), *inputs, *inputs[0].shape, *grads)
        return cast(tuple[Tensor, Tensor, Tensor, Tensor], grads)


class Write(NamedTuple):
    """What `write_streams` takes: the streams [N, n, D], the sublayer's output [N, D], H_post and H_res."""

    x_NnD: Tensor
    y_ND: Tensor
    post_Nn: Tensor
    res_Nij: Tensor


def write_streams(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, res_Nij: Tensor) -> Tensor:
    """`write_streams_reference` with a hand-written backward.

    Args:
        x_NnD: [N, n, D], any floating dtype; summed in float32.
        y_ND: [N, D], the sublayer's output.
        post_Nn, res_Nij: float32.
    """
    function = _NativeWrite if _native_takes(x_NnD, y_ND, post_Nn, res_Nij) else _Write
    out = function.apply(x_NnD.contiguous(), y_ND.contiguous(), post_Nn.contiguous(), res_Nij.contiguous())  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


def project_and_read_reference(
    x_NnD: Tensor, phi_MP: Tensor, bias_n: Tensor, alpha_pre: Tensor, norm_eps: float, pre_eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all streams, the projection of every map, and the reading that its first n entries ask for.

    Returns:
        x_hat phi^T, [N, M] float32, before gates and biases; and u = (sigmoid(alpha z_pre + b) + pre_eps) X, [N, D].
    """
    z_NM = _normed_projection(x_NnD, phi_MP, norm_eps)
    pre_Nn = torch.sigmoid(alpha_pre * z_NM[:, : x_NnD.shape[1]] + bias_n) + pre_eps
    return z_NM, read_streams_reference(x_NnD, pre_Nn)


class Reading(NamedTuple):
    """What `project_and_read` gives.

    Attributes:
        z_NM: x_hat phi^T before gates and biases, float32.
        u_ND: the sublayer's input, in x's dtype.
        x_NnD: the streams themselves.
        pre_Nn: H_pre, float32, without a gradient (that flows through u).
    """

    z_NM: Tensor
    u_ND: Tensor
    x_NnD: Tensor
    pre_Nn: Tensor


class _ProjectAndRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NnD: Tensor,
        phi_MP: Tensor,
        bias_n: Tensor,
        alpha_pre: Tensor,
        norm_eps: float,
        pre_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat_NP = x_NnD.flatten(1).float()
        # x_hat phi^T = (x phi^T) / r: the norm is applied to M numbers a token, not to n D (paper, section 4.3.1).
        rstd_N1 = torch.linalg.vector_norm(flat_NP, dim=-1, keepdim=True)
        rstd_N1 = rstd_N1.square_().div_(flat_NP.shape[1]).add_(norm_eps).rsqrt_()
        z_NM = (flat_NP @ phi_MP.T).mul_(rstd_N1)
        gate_Nn = torch.sigmoid(alpha_pre * z_NM[:, : x_NnD.shape[1]] + bias_n)
        pre_Nn = gate_Nn + pre_eps
        ctx.save_for_backward(x_NnD, phi_MP, alpha_pre, rstd_N1, z_NM, gate_Nn, pre_Nn)
        ctx.mark_non_differentiable(pre_Nn)
        return z_NM, read_streams(x_NnD, pre_Nn), x_NnD, pre_Nn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_u: Tensor, grad_x: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_NnD, phi_MP, alpha_pre, rstd_N1, z_NM, gate_Nn, pre_Nn = ctx.saved_tensors
        num = x_NnD.shape[1]
        x, flat_NP, grad_u = x_NnD.float(), x_NnD.flatten(1).float(), grad_u.float()
        grad_pre = torch.bmm(grad_u.unsqueeze(1), x.mT).squeeze(1)
        grad_pre *= gate_Nn * (1 - gate_Nn)
        grad_z = grad_z.clone()
        grad_z[:, :num] += alpha_pre * grad_pre
        scaled_NM = grad_z * rstd_N1
        # d rstd = -rstd^3 x dx / P, and z already holds one rstd.
        norm_N1 = (grad_z * z_NM).sum(-1, keepdim=True).mul_(rstd_N1.square()).div_(-flat_NP.shape[1])
        total = torch.addcmul(grad_x.float(), pre_Nn.unsqueeze(-1), grad_u.unsqueeze(1))
        total.flatten(1).addmm_(scaled_NM, phi_MP).addcmul_(flat_NP, norm_N1)
        grads = (total.to(x_NnD.dtype), scaled_NM.T @ flat_NP, grad_pre.sum(0))
        return *grads, (grad_pre * z_NM[:, :num]).sum().view_as(alpha_pre), None, None


class _NativeProjectAndRead(torch.autograd.Function):
    """The same in the compiled kernels: a block of tokens stays in the cache for all that happens to its streams."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NnD: Tensor,
        phi_MP: Tensor,
        bias_n: Tensor,
        alpha_pre: Tensor,
        norm_eps: float,
        pre_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = _empty_reading(x_NnD, len(phi_MP))
        native.call("tafkir_project_and_read", x_NnD, phi_MP, bias_n, alpha_pre, norm_eps, pre_eps, *x_NnD.shape, *out)
        z_NM, u_ND, gate_Nn, pre_Nn, rstd_N = out
        ctx.save_for_backward(x_NnD, phi_MP, alpha_pre, rstd_N, z_NM, gate_Nn, pre_Nn)
        ctx.mark_non_differentiable(pre_Nn)
        return z_NM, u_ND, x_NnD, pre_Nn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_u: Tensor, grad_x: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = x_NnD, phi_MP, alpha_pre, _, z_NM, _, pre_Nn = ctx.saved_tensors
        total, grad_phi, grad_pre = torch.empty_like(x_NnD), torch.empty_like(phi_MP), torch.empty_like(pre_Nn)
        above = (grad.contiguous() for grad in (grad_z, grad_u, grad_x))
        native.call("tafkir_project_and_read_backward", *above, *saved, *x_NnD.shape, total, grad_phi, grad_pre)
        return total, grad_phi, *_gate_gradients(grad_pre, z_NM, alpha_pre), None, None


class _NativeWriteAndRead(torch.autograd.Function):
    """`write_streams` and what reads next, while the new streams are in the cache; so too backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NnD: Tensor,
        y_ND: Tensor,
        post_Nn: Tensor,
        res_Nij: Tensor,
        phi_MP: Tensor,
        bias_n: Tensor,
        alpha_pre: Tensor,
        norm_eps: float,
        pre_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        new_NnD, out = torch.empty_like(x_NnD), _empty_reading(x_NnD, len(phi_MP))
        written, how = (x_NnD, y_ND, post_Nn, res_Nij), (phi_MP, bias_n, alpha_pre, norm_eps, pre_eps)
        native.call("tafkir_write_and_read", *written, *how, *x_NnD.shape, new_NnD, *out)
        z_NM, u_ND, gate_Nn, pre_Nn, rstd_N = out
        ctx.save_for_backward(new_NnD, phi_MP, alpha_pre, rstd_N, z_NM, gate_Nn, pre_Nn, *written)
        ctx.mark_non_differentiable(pre_Nn)
        return z_NM, u_ND, new_NnD, pre_Nn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_u: Tensor, grad_x: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = _, phi_MP, alpha_pre, _, z_NM, _, pre_Nn, *written = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in written]
        grad_phi, grad_pre = torch.empty_like(phi_MP), torch.empty_like(pre_Nn)
        above = (grad.contiguous() for grad in (grad_z, grad_u, grad_x))
        sizes = written[0].shape
        native.call("tafkir_write_and_read_backward", *above, *saved, *sizes, *grads, grad_phi, grad_pre)
        return *grads, grad_phi, *_gate_gradients(grad_pre, z_NM, alpha_pre), None, None


def _empty_reading(x_NnD: Tensor, maps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z [N, M], u [N, D], gate and pre [N, n], rstd [N]: what a reading leaves behind."""
    tokens, num, hidden = x_NnD.shape
    shapes = ((tokens, maps), (tokens, hidden), (tokens, num), (tokens, num), (tokens,))
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple(x_NnD.new_empty(shape) for shape in shapes))


def _gate_gradients(grad_pre_Nn: Tensor, z_NM: Tensor, alpha_pre: Tensor) -> tuple[Tensor, Tensor]:
    """Of pre's bias and gate, from that of what its sigmoid takes."""
    grad_alpha = (grad_pre_Nn * z_NM[:, : grad_pre_Nn.shape[1]]).sum().view_as(alpha_pre)
    return grad_pre_Nn.sum(0), grad_alpha


def project_and_read(
    x_NnD: Tensor, phi_MP: Tensor, bias_n: Tensor, alpha_pre: Tensor, norm_eps: float, pre_eps: float
) -> Reading:
    """`project_and_read_reference` with a hand-written backward that meets the streams once.

    Args:
        x_NnD: [N, n, D], any floating dtype.
        phi_MP: float32 [M, n D], rows [pre | post | res].
        bias_n: float32 [n], the bias of pre.
        alpha_pre: float32, one number.
        norm_eps: of the RMSNorm over n D entries.
        pre_eps: added to the sigmoid; 0 in the paper, hc_eps in DeepSeek-V4.

    `write_streams` takes the streams that come back, so that its gradient meets the others in one sum instead of a
    pass of its own.
    """
    taken = _native_takes(x_NnD, phi_MP, bias_n, alpha_pre) and _has_all_maps(x_NnD, phi_MP)
    function = _NativeProjectAndRead if taken else _ProjectAndRead
    out = function.apply(x_NnD.contiguous(), phi_MP.contiguous(), bias_n, alpha_pre, norm_eps, pre_eps)  # type: ignore[no-untyped-call]
    return Reading(*out)


def write_and_read(
    written: Write,
    phi_MP: Tensor,
    bias_n: Tensor,
    alpha_pre: Tensor,
    norm_eps: float,
    pre_eps: float,
) -> Reading:
    """`project_and_read` of the streams that `write_streams` makes; compiled, each stream is met once for both."""
    if _native_takes(*written, phi_MP, bias_n, alpha_pre) and _has_all_maps(written.x_NnD, phi_MP):
        plain = (part.contiguous() for part in (*written, phi_MP))
        return Reading(*_NativeWriteAndRead.apply(*plain, bias_n, alpha_pre, norm_eps, pre_eps))  # type: ignore[no-untyped-call]
    return project_and_read(write_streams(*written), phi_MP, bias_n, alpha_pre, norm_eps, pre_eps)


def _has_all_maps(x_NnD: Tensor, phi_MP: Tensor) -> bool:
    num = x_NnD.shape[1]
    return phi_MP.shape[0] == num * num + 2 * num


def gated_maps(z_NM: Tensor, bias_M: Tensor, alpha_3: Tensor, num_streams: int) -> Maps:
    """alpha z + b, in three parts."""
    return split_maps(z_NM * _gates(alpha_3, num_streams) + bias_M, num_streams)
