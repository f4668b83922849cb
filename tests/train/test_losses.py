"""IcePop and the policy loss against published vectors, closed forms and the slow formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.recipe.rl import Acceptance, IcePop, KlConfig, NoAcceptance, PolicyLossTable, Reduction
from tafkir.train.acceptance import Accepted, accept_tokens
from tafkir.train.losses import policy_loss
from tafkir.train.mismatch import mismatch_metrics

ON, OFF = PolicyLossTable(acceptance=IcePop()), PolicyLossTable(acceptance=NoAcceptance())


def icepop_weights(train: Tensor, sampling: Tensor, acceptance: Acceptance = ON.acceptance) -> Accepted:
    """All tokens as one completion with advantage one."""
    one = torch.zeros(len(train), dtype=torch.int64)
    return accept_tokens(acceptance, train, sampling, torch.ones(len(train)), one, torch.tensor([len(train)]))


def test_weights_of_the_verl_vector() -> None:
    """Ratios 0.4, 0.8, 6.0 keep only the middle one, at weight k; ESS of the kept weights is 1/3."""
    ratios = torch.tensor([0.4, 0.8, 6.0])
    ice = icepop_weights(ratios.log(), torch.zeros(3))
    torch.testing.assert_close(ice.weight_T, torch.tensor([0.0, 0.8, 0.0]))
    assert ice.masked_T.tolist() == [True, False, True]
    assert ice.nonfinite == 0
    assert ice.weight_T.std(correction=0).item() == pytest.approx(0.3771236, abs=1e-6)
    assert (ice.weight_T.sum() ** 2 / (3 * ice.weight_T.square().sum())).item() == pytest.approx(1 / 3)


def test_loss_of_the_nemo_rl_vector() -> None:
    """prev -1, -1, -1; generation -0.5, -3.5, -0.8; advantages 1, -1, 2: weights 0.6065, 0, 0.8187."""
    prev = torch.tensor([-1.0, -1.0, -1.0])
    sampling = torch.tensor([-0.5, -3.5, -0.8])
    advantages = torch.tensor([1.0, -1.0, 2.0])
    out = policy_loss(prev, prev, sampling, advantages, torch.zeros(3, dtype=torch.int64), torch.tensor([3]), config=ON)
    torch.testing.assert_close(out.weight_T, torch.tensor([0.6065, 0.0, 0.8187]), atol=5e-5, rtol=0)
    assert math.exp(2.5) == pytest.approx(12.18, abs=5e-3)
    assert out.loss.item() == pytest.approx(-(math.exp(-0.5) + 2 * math.exp(-0.2)) / 3, abs=1e-6)
    assert out.loss.item() == pytest.approx(-0.7480, abs=5e-5)


def test_bounds_are_inclusive_and_tested_in_log_space() -> None:
    sampling = torch.tensor([-1.0, -1.0, -1.0, -1.0, -300.0, -1.0, float("-inf")])
    log_k = torch.tensor([math.log(0.5), math.log(5.0), math.log(0.499), math.log(5.01), 200.0, -500.0, 0.0])
    train = sampling + log_k
    train[-1] = -2.0
    ice = icepop_weights(train, sampling)
    assert ice.masked_T.tolist() == [False, False, True, True, True, True, True]
    assert ice.nonfinite == 1
    assert torch.isfinite(ice.weight_T).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_ratio_is_dropped_and_leaves_gradients_finite(bad: float) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
    sampling = torch.tensor([-1.0, bad, -1.5])
    out = policy_loss(
        logprobs,
        logprobs.detach(),
        sampling,
        torch.ones(3),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([3]),
        config=ON,
    )
    out.loss.backward()
    assert out.nonfinite == 1
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))


def test_masked_tokens_stay_in_the_denominator() -> None:
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    sampling = torch.tensor([-1.0, -9.0, -1.0, -1.0])
    sequence, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2])
    out = policy_loss(logprobs, logprobs.detach(), sampling, torch.ones(4), sequence, lengths, config=ON)
    assert out.loss.item() == pytest.approx(-(0.5 + 1.0) / 2)


def test_without_icepop_it_is_clipped_grpo() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    logprobs = old + torch.tensor([0.5, -0.5, 0.5, -0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    sequence, lengths = torch.zeros(4, dtype=torch.int64), torch.tensor([4])
    out = policy_loss(logprobs, old, torch.full((4,), -50.0), advantages, sequence, lengths, config=OFF)
    terms = [1.2, math.exp(-0.5), -math.exp(0.5), -0.8]
    assert out.loss.item() == pytest.approx(-sum(terms) / 4, abs=1e-6)
    assert out.clipped_T.tolist() == [True, False, False, True]


def test_kl_term_covers_masked_tokens() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    sampling, ref = torch.tensor([-9.0, -1.0]), torch.tensor([-2.0, -1.0])
    out = policy_loss(
        logprobs,
        logprobs.detach(),
        sampling,
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([2]),
        config=PolicyLossTable(kl=KlConfig(coef=0.5)),
        ref_logprobs_T=ref,
    )
    assert out.loss.item() == pytest.approx(0.5 * (math.exp(-1) + 1 - 1) / 2, abs=1e-6)


def _random_tokens(seed: int, lengths: list[int]) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    logprobs = -torch.rand(count, generator=draw) * 3
    old = logprobs + 0.3 * torch.randn(count, generator=draw)
    sampling = old + torch.randn(count, generator=draw)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantages = torch.randn(len(lengths), generator=draw)[sequence]
    return logprobs, old, sampling, advantages, sequence


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    seed=st.integers(0, 10_000),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "constant"]),
    data=st.data(),
)
def test_micro_batches_add_up_to_the_whole(
    lengths: list[int], seed: int, reduction: Reduction, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(lengths) - 1))
    logprobs, old, sampling, advantages, sequence = _random_tokens(seed, lengths)

    def loss(parts: list[slice]) -> tuple[float, Tensor]:
        leaf = logprobs.clone().requires_grad_()
        value = 0.0
        for part in parts:
            first = int(sequence[part][0])
            out = policy_loss(
                leaf[part],
                old[part],
                sampling[part],
                advantages[part],
                sequence[part] - first,
                torch.tensor(lengths)[first : int(sequence[part][-1]) + 1],
                config=PolicyLossTable(reduction=reduction),
                num_sequences=len(lengths),
                num_tokens=sum(lengths),
            )
            out.loss.backward()
            value += out.loss.item()
        assert leaf.grad is not None
        return value, leaf.grad

    edge = sum(lengths[:cut])
    whole, whole_grad = loss([slice(0, sum(lengths))])
    split, split_grad = loss([slice(0, edge), slice(edge, sum(lengths))])
    assert split == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(split_grad, whole_grad, atol=1e-6, rtol=0)


def test_mismatch_metrics_by_hand() -> None:
    train, sampling = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.1, -0.8])
    got = mismatch_metrics(train, sampling, torch.tensor([False, True, False]), torch.tensor([0, 1, 1]), 2)
    log_k = [0.0, 0.1, -0.2]
    k = [math.exp(x) for x in log_k]
    assert got["mismatch/abs_logprob_diff_mean"] == pytest.approx(0.1, abs=1e-6)
    assert got["mismatch/abs_logprob_diff_max"] == pytest.approx(0.2, abs=1e-6)
    assert got["mismatch/kl"] == pytest.approx(sum(a - 1 - b for a, b in zip(k, log_k, strict=True)) / 3, abs=1e-6)
    assert got["mismatch/masked_fraction"] == pytest.approx(1 / 3)
    assert got["mismatch/masked_sequences"] == pytest.approx(0.5)
    assert got["mismatch/ess"] == pytest.approx(sum(k) ** 2 / (3 * sum(x * x for x in k)), abs=1e-6)
