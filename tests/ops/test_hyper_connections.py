"""Sinkhorn and the stream mixing: equation 9 in float64, transformers' DeepSeek-V4 modules, fast against reference.

Each known defect of other implementations (wrong order of the parts, comb not transposed, H_res not applied, softmax
start, eps left out, RMSNorm per stream) has a test that fails with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.ops import hyper_connections as hc
from tafkir.ops.sinkhorn import sinkhorn, sinkhorn_reference

pytestmark = pytest.mark.usefixtures("kernels")

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same(fast: Callable[..., Any], slow: Callable[..., Any], inputs: Sequence[Tensor], tol: float = 2e-5) -> None:
    """Values and the gradients of a random projection agree, relative to their size."""
    results = []
    for function in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        total = sum((out * normal(99 + i, *out.shape)).sum() for i, out in enumerate(outs))
        results.append([out.detach() for out in (*outs, *torch.autograd.grad(total, leaves))])
    for ours, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tol)


@quick
@given(
    tokens=st.integers(1, 40),
    streams=st.sampled_from([1, 2, 3, 4, 4, 4, 6]),
    iters=st.integers(1, 20),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=seeds,
)
def test_sinkhorn_equals_equation_9_in_float64(tokens: int, streams: int, iters: int, scale: float, seed: int) -> None:
    logits = normal(seed, tokens, streams, streams, scale=scale)
    weight = normal(seed + 1, *logits.shape)
    exact, ours = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, got = sinkhorn_reference(exact, iters), sinkhorn(ours, iters)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert exact.grad is not None and ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=2e-5)


def test_columns_come_first_and_rows_last() -> None:
    """Rows are exact after any number of iterations; columns carry what is left. (The other order is the transpose.)"""
    logits = normal(0, 50, 4, 4, scale=3.0)
    matrix = sinkhorn(logits, 2)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(50, 4))
    assert float((matrix.sum(-2) - 1).abs().max()) > 1e-2
    assert float((sinkhorn(logits.mT, 2).mT - matrix).abs().max()) > 1e-2


def test_twenty_iterations_are_nearly_doubly_stochastic() -> None:
    matrix = sinkhorn(normal(0, 200, 4, 4), 20)
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(200, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(200, 4), rtol=0, atol=1e-3)


def test_the_start_is_exp_not_a_softmax_over_rows() -> None:
    """A softmax over rows first would be another algorithm: one more row step at the beginning."""
    logits = normal(3, 20, 4, 4, scale=2.0)
    wrong = sinkhorn_reference(torch.softmax(logits, -1).log(), 3)
    assert float((sinkhorn(logits, 3) - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [200.0, 1e4])
def test_logits_that_overflow_exp_still_give_equation_9(scale: float) -> None:
    """The first iteration goes through logarithms; float64 logarithms are the oracle."""
    logits = normal(1, 30, 4, 4, scale=scale)
    logs = logits.double()
    for _ in range(20):
        logs = logs - logs.logsumexp(-2, keepdim=True)
        logs = logs - logs.logsumexp(-1, keepdim=True)
    assert not sinkhorn_reference(logits, 20).isfinite().all()
    leaf = logits.clone().requires_grad_()
    matrix = sinkhorn(leaf, 20)
    torch.testing.assert_close(matrix.double(), logs.exp(), rtol=0, atol=1e-5 * scale / 200)
    matrix.square().sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = normal(0, 3, 4, 4)
    logits[1, 2, 3] = bad
    with pytest.raises(TrainingError, match=r"Sinkhorn's input overflowed.*Fix: lower the learning rate"):
        sinkhorn(logits, 20)


def v4_modules(streams: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """transformers' own hyper-connection and head with random weights."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(hc_mult=streams, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-5, hidden_size=hidden)
    modules = modeling.DeepseekV4HyperConnection(config), modeling.DeepseekV4HyperHead(config)
    with torch.no_grad():
        for i, parameter in enumerate(p for module in modules for p in module.parameters()):
            parameter.copy_(normal(seed + i, *parameter.shape, scale=0.3 if parameter.ndim == 2 else 1.0))
    return modules


@pytest.mark.parametrize(("streams", "seed"), [(4, 0), (4, 10), (2, 20)])
def test_deepseek_v4_maps_equal_transformers(streams: int, seed: int) -> None:
    """Order of the parts, transposed comb, eps on pre, one RMSNorm over all streams: each off by far more if wrong."""
    oracle, head = v4_modules(streams, 24, seed)
    x = normal(seed + 50, 33, streams, 24, scale=2.0)
    y = normal(seed + 51, 33, 24)
    with torch.no_grad():
        post, comb, collapsed = oracle(x.unsqueeze(0))
        expected = post[0].unsqueeze(-1) * y.unsqueeze(1) + torch.einsum("njd,nji->nid", x, comb[0])
        maps = hc.deepseek_v4_maps_reference(x, oracle.fn, oracle.base, oracle.scale, 20, 1e-6, 1e-5)
        close = {"rtol": 0, "atol": 5e-6}
        torch.testing.assert_close(maps.post_Nn, post[0], **close)
        torch.testing.assert_close(maps.res_Nij, comb[0].mT, **close)
        torch.testing.assert_close(hc.read_streams(x, maps.pre_Nn), collapsed[0], **close)
        torch.testing.assert_close(hc.write_streams(x, y, maps.post_Nn, maps.res_Nij), expected, **close)
        got = hc.deepseek_v4_exit(x, head.hc_fn, head.hc_base, head.hc_scale, 1e-6, 1e-5)
        torch.testing.assert_close(got, head(x.unsqueeze(0))[0], **close)
        read = hc.project_and_read(x, oracle.fn, oracle.base[:streams], oracle.scale[0], 1e-5, 1e-6)
        torch.testing.assert_close(read.u_ND, collapsed[0], **close)


def mhc_inputs(tokens: int, streams: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps = streams * streams + 2 * streams
    x, phi = normal(seed, tokens, streams, hidden, scale=3.0), normal(seed + 1, maps, streams * hidden, scale=0.3)
    return x, phi, normal(seed + 2, maps), normal(seed + 3, 3)


def test_the_papers_form_and_deepseek_v4s_agree_up_to_eps() -> None:
    """Two spellings of one algorithm: V4 stores comb transposed, so its rows are the paper's columns."""
    x, phi, bias, alpha = mhc_inputs(40, 4, 16, 0)
    ours = hc.mhc_maps_reference(x, phi, bias, alpha, 20, 1e-6)
    order = torch.cat([torch.arange(8), 8 + torch.arange(16).view(4, 4).T.flatten()])
    theirs = hc.deepseek_v4_maps_reference(x, phi[order], bias[order], alpha, 20, 1e-6, 1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    untransposed = hc.deepseek_v4_maps_reference(x, phi, bias, alpha, 20, 1e-6, 1e-6)
    assert float((ours.res_Nij - untransposed.res_Nij).abs().max()) > 0.05


def test_mhc_maps_equal_the_equations_in_plain_python() -> None:
    """Equations 7 to 9, token by token in float64: parts in the order pre, post, res; one norm over all streams."""
    x, phi, bias, alpha = (t.double() for t in mhc_inputs(5, 3, 4, 7))
    maps = hc.mhc_maps_reference(x.float(), phi.float(), bias.float(), alpha.float(), 20, 1e-6)
    for token, streams in enumerate(x):
        flat = [float(v) for v in streams.flatten()]
        rms = (sum(v * v for v in flat) / len(flat) + 1e-6) ** 0.5
        z = [sum(v / rms * float(w) for v, w in zip(flat, row, strict=True)) for row in phi]
        raw = [float(alpha[0 if k < 3 else 1 if k < 6 else 2]) * z[k] + float(bias[k]) for k in range(15)]
        sigmoid = torch.tensor(raw[:6]).double().sigmoid()
        torch.testing.assert_close(maps.pre_Nn[token].double(), sigmoid[:3], rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.post_Nn[token].double(), 2 * sigmoid[3:], rtol=0, atol=1e-5)
        res = sinkhorn_reference(torch.tensor(raw[6:]).double().view(3, 3), 20)
        torch.testing.assert_close(maps.res_Nij[token].double(), res, rtol=0, atol=1e-5)


def test_hc_maps_equal_equation_5_in_plain_python() -> None:
    """Each stream is normalised by itself; tanh; nothing bounds the sums of H_res."""
    num, hidden = 3, 4
    x, theta, bias, alpha = normal(0, 5, num, hidden), normal(1, num + 2, hidden), normal(2, 15), normal(3, 3)
    maps = hc.hc_maps(x, theta, bias, alpha, 1e-6)
    for token, streams in enumerate(x):
        normed = [s / (s.square().mean() + 1e-6).sqrt() for s in streams]
        for i in range(num):
            pre = alpha[0] * torch.tanh(theta[0] @ normed[i]) + bias[i]
            post = alpha[1] * torch.tanh(theta[1] @ normed[i]) + bias[num + i]
            torch.testing.assert_close(maps.pre_Nn[token, i], pre)
            torch.testing.assert_close(maps.post_Nn[token, i], post)
            for j in range(num):
                res = alpha[2] * torch.tanh(theta[2 + i] @ normed[j]) + bias[2 * num + i * num + j]
                torch.testing.assert_close(maps.res_Nij[token, i, j], res)


def test_writing_is_equation_3() -> None:
    """H_res mixes the streams (row i makes new stream i), H_post adds the output to each."""
    x, y, post = normal(0, 2, 3, 5), normal(1, 2, 5), normal(2, 2, 3)
    res = normal(3, 2, 3, 3)
    out = hc.write_streams(x, y, post, res)
    for token in range(2):
        for i in range(3):
            expected = sum(res[token, i, j] * x[token, j] for j in range(3)) + post[token, i] * y[token]
            torch.testing.assert_close(out[token, i], expected)
    torch.testing.assert_close(hc.read_streams(x, post)[1], sum(post[1, j] * x[1, j] for j in range(3)))


@quick
@given(tokens=st.integers(1, 70), streams=st.sampled_from([1, 2, 3, 4, 4, 4, 5]), hidden=st.integers(1, 40), seed=seeds)
def test_fast_writing_equals_the_reference(tokens: int, streams: int, hidden: int, seed: int) -> None:
    shapes = ((tokens, streams, hidden), (tokens, hidden), (tokens, streams), (tokens, streams, streams))
    same(hc.write_streams, hc.write_streams_reference, [normal(seed + i, *shape) for i, shape in enumerate(shapes)])


@quick
@given(
    tokens=st.integers(1, 70),
    streams=st.sampled_from([1, 2, 3, 4, 4, 4, 5]),
    hidden=st.integers(1, 40),
    pre_eps=st.sampled_from([0.0, 0.1]),
    seed=seeds,
)
def test_fast_reading_equals_the_reference(tokens: int, streams: int, hidden: int, pre_eps: float, seed: int) -> None:
    x, phi, bias, alpha = mhc_inputs(tokens, streams, hidden, seed)

    def fast(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        return hc.project_and_read(x, phi, bias, alpha, 1e-6, pre_eps)[:3]

    def slow(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        return *hc.project_and_read_reference(x, phi, bias, alpha, 1e-6, pre_eps), x * 1.0

    same(fast, slow, [x, phi, bias[:streams], alpha[0]], 1e-4)


@quick
@given(
    tokens=st.integers(1, 70),
    streams=st.sampled_from([1, 2, 3, 4, 4, 4, 5]),
    hidden=st.integers(1, 40),
    pre_eps=st.sampled_from([0.0, 0.1]),
    seed=seeds,
)
def test_writing_and_reading_at_once_equals_one_after_the_other(
    tokens: int, streams: int, hidden: int, pre_eps: float, seed: int
) -> None:
    x, phi, bias, alpha = mhc_inputs(tokens, streams, hidden, seed)
    y, post = normal(seed + 7, tokens, hidden), normal(seed + 8, tokens, streams)
    res = normal(seed + 9, tokens, streams, streams)

    def at_once(*parts: Tensor) -> tuple[Tensor, ...]:
        return hc.write_and_read(hc.Write(*parts[:4]), *parts[4:], 1e-6, pre_eps)[:3]

    def in_turn(x: Tensor, y: Tensor, post: Tensor, res: Tensor, *how: Tensor) -> tuple[Tensor, ...]:
        new = hc.write_streams_reference(x, y, post, res)
        return *hc.project_and_read_reference(new, *how, 1e-6, pre_eps), new * 1.0

    same(at_once, in_turn, [x, y, post, res, phi, bias[:streams], alpha[0]], 1e-4)


def test_low_precision_streams_stay_near_and_keep_their_dtype() -> None:
    x, phi, bias, alpha = mhc_inputs(20, 4, 16, 0)
    y = normal(9, 20, 16)
    maps = hc.mhc_maps_reference(x, phi, bias, alpha, 20, 1e-6)
    got = hc.project_and_read(x.bfloat16(), phi, bias[:4], alpha[0], 1e-6, 0.0)
    out = hc.write_streams(x.bfloat16(), y.bfloat16(), maps.post_Nn, maps.res_Nij)
    assert got.u_ND.dtype == out.dtype == torch.bfloat16 and got.z_NM.dtype == torch.float32
    for low, exact in ((got.u_ND, hc.read_streams(x, maps.pre_Nn)), (out, hc.write_streams(x, y, *maps[1:]))):
        assert float((low.float() - exact).norm() / exact.norm()) < 0.01
