"""Sublayers with a norm after them, and the stable-max, against their slow references and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from tafkir.ops.post_norm import post_norm, post_norm_reference, swiglu_post_norm, swiglu_post_norm_reference
from tafkir.ops.rope import rope_table
from tafkir.ops.split_heads import attend, split_heads, split_heads_reference
from tafkir.ops.stable_max import IGNORE_INDEX, stable_max_loss, stable_max_loss_reference

pytestmark = pytest.mark.usefixtures("kernels")

Dim = Literal[0, -1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype, **more: object) -> list[Tensor]:
    """Value and gradients, from a fixed weight on every output."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves, **more)
    (out.float() * drawn(*out.shape, seed=9)).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def agree(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_post_norm(dim: Dim, dtype: torch.dtype, tolerance: float) -> None:
    x, update = drawn(5, 3, 16), drawn(5, 3, 16, seed=1)
    want = results(post_norm_reference, x, update, dtype=torch.float64, eps=1e-5, dim=dim)
    agree(results(post_norm, x, update, dtype=dtype, eps=1e-5, dim=dim), want, tolerance)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_swiglu_post_norm(monkeypatch: pytest.MonkeyPatch, dim: Dim, dtype: torch.dtype, tolerance: float) -> None:
    monkeypatch.setattr("tafkir.ops.post_norm._SMALL", 0)
    width = (6, 3, 10)[dim]
    x, gate_up, down = drawn(6, 3, 10), drawn(48, width, seed=1) * 0.4, drawn(width, 24, seed=2) * 0.3
    want = results(swiglu_post_norm_reference, x, gate_up, down, dtype=torch.float64, eps=1e-5, dim=dim)
    agree(results(swiglu_post_norm, x, gate_up, down, dtype=dtype, eps=1e-5, dim=dim), want, tolerance)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_split_heads(turned: bool, dtype: torch.dtype, tolerance: float) -> None:
    angles = rope_table(torch.arange(5), 8, 100.0) if turned else None

    def joined(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda x: torch.stack([part * (1 + i) for i, part in enumerate(function(x, 2, angles))])

    x = drawn(3, 5, 48)
    want = results(joined(split_heads_reference), x, dtype=torch.float64)
    agree(results(joined(split_heads), x, dtype=dtype), want, tolerance)
    q, k, v = split_heads(x, 2, angles)
    assert torch.equal(v[2, 1, 4], x[2, 4, 40:]) and q.shape == k.shape == (3, 2, 5, 8)


def test_attention_in_bfloat16() -> None:
    """Where its backward is our own, against torch's in float64."""
    parts = [drawn(2, 3, 7, 8, seed=seed) for seed in range(3)]
    want = results(torch.nn.functional.scaled_dot_product_attention, *parts, dtype=torch.float64)
    agree(results(attend, *parts, dtype=torch.bfloat16), want, 3e-2)
    agree(results(attend, *parts, dtype=torch.float32), want, 1e-5)


def test_a_number_that_is_none_stays_so(kernels: str) -> None:
    x, update = drawn(3, 8).bfloat16(), drawn(3, 8, seed=1).bfloat16()
    update[1, 2] = float("nan")
    found = post_norm(x, update, 1e-5).isnan()
    assert found[1].all() and not found[[0, 2]].any()


def test_a_sublayer_leaves_unit_root_mean_squares() -> None:
    x, gate_up, down = drawn(4, 7, 8), drawn(32, 8, seed=1), drawn(8, 16, seed=2)
    out = swiglu_post_norm(x, gate_up, down, 1e-6)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4, 7), rtol=1e-4, atol=1e-4)
    mixed = swiglu_post_norm(x, drawn(32, 4, seed=3), drawn(4, 16, seed=4), 1e-6, 0)
    torch.testing.assert_close(mixed.square().mean(0), torch.ones(7, 8), rtol=1e-4, atol=1e-4)


def test_the_stable_max_by_hand() -> None:
    """s(0) = 1, s(1) = 2, s(-1) = 1/2: their shares of 3.5."""
    loss = stable_max_loss(torch.tensor([[0.0, 1.0, -1.0]]).expand(3, 3), torch.arange(3))
    torch.testing.assert_close(loss.exp(), torch.tensor([3.5, 1.75, 7.0]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_the_stable_max_in_float32(scale: float) -> None:
    logits, labels = drawn(4, 9, 11) * scale, torch.arange(36).view(4, 9) % 12 - 1
    labels[labels < 0] = IGNORE_INDEX
    want = results(lambda v: stable_max_loss_reference(v, labels), logits, dtype=torch.float64)
    agree(results(lambda v: stable_max_loss(v, labels), logits, dtype=torch.float32), want, 1e-5)


def test_what_has_no_label_has_no_loss_and_no_gradient() -> None:
    logits = drawn(2, 5).requires_grad_()
    loss = stable_max_loss(logits, torch.tensor([IGNORE_INDEX, 3]))
    loss.sum().backward()
    assert loss[0] == 0 and logits.grad is not None
    assert not logits.grad[0].any() and logits.grad[1].all()
