"""The routers' losses against loops in float64, transformers' own, and values by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.ops.router_losses import (
    router_z_loss,
    router_z_loss_reference,
    sequence_balance_loss,
    sequence_balance_loss_reference,
)


def bounds(lengths: list[int]) -> list[int]:
    out = [0]
    for length in lengths:
        out.append(out[-1] + length)
    return out


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_experts=st.sampled_from([4, 6, 16]),
    top_k=st.integers(1, 4),
    softmax=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_losses_and_gradients_equal_the_loops(
    lengths: list[int], num_experts: int, top_k: int, softmax: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(sum(lengths), num_experts, generator=draw, dtype=torch.float64)
    grads, values = [], []
    for balance, z in (
        (sequence_balance_loss, router_z_loss),
        (sequence_balance_loss_reference, router_z_loss_reference),
    ):
        logits = start.clone().requires_grad_()
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        parts = balance(scores, top_k, bounds(lengths)), z(logits)
        (parts[0] + 0.3 * parts[1]).backward()
        values.append(torch.stack(parts).detach())
        grads.append(logits.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_balance_by_hand() -> None:
    # Two tokens, three experts, one active: both choose expert 0.
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.3]], dtype=torch.float64)
    # f = (3, 0, 0); P_0 = (0.5 + 0.6 / 1.2) / 2 = 0.5
    assert float(sequence_balance_loss(scores, 1, [0, 2])) == pytest.approx(1.5, abs=1e-12)
    # as two sequences: f_0 = 3 in each, P_0 = 0.5 in each
    assert float(sequence_balance_loss(scores, 1, [0, 1, 2])) == pytest.approx(3.0, abs=1e-12)


def test_balance_is_one_when_all_share_alike_and_grows_to_the_number_of_experts() -> None:
    even = torch.eye(4) * 0.5 + 0.1
    assert float(sequence_balance_loss(even, 1, [0, 4])) == pytest.approx(1.0, abs=1e-6)
    one = torch.tensor([[1.0, 1e-9, 1e-9, 1e-9]]).repeat(5, 1)
    assert float(sequence_balance_loss(one, 1, [0, 5])) == pytest.approx(4.0, abs=1e-5)


def test_a_step_down_the_balance_loss_evens_the_load() -> None:
    logits = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8) * 0.3).requires_grad_()
    before = float(sequence_balance_loss(logits.sigmoid(), 2, [0, 64]).detach())
    for _ in range(60):
        (grad,) = torch.autograd.grad(sequence_balance_loss(logits.sigmoid(), 2, [0, 64]), logits)
        with torch.no_grad():
            logits -= 20 * grad
    assert float(sequence_balance_loss(logits.sigmoid(), 2, [0, 64]).detach()) < 1 + 0.5 * (before - 1)


def test_z_loss_by_hand_and_as_in_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    assert float(router_z_loss(torch.zeros(3, 4, dtype=torch.float64))) == pytest.approx(3 * 1.3862943611198906**2)
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = router_z_loss(logits.view(10, 8)) / 10
    torch.testing.assert_close(ours, router_z_loss_func(logits), rtol=1e-12, atol=0)


def test_z_loss_of_huge_logits_is_finite() -> None:
    assert float(router_z_loss(torch.full((1, 4), 1000.0))) == pytest.approx((1000 + 1.3862943611198906) ** 2, rel=1e-6)
