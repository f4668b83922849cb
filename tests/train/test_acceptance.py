"""Acceptance regions against published vectors and plain formulas; bounds, and numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tafkir.recipe.rl import (
    Acceptance,
    DppoTv,
    GeoRs,
    IcePop,
    KPop,
    Mis,
    NoAcceptance,
    SeqTis,
    Tis,
)
from tafkir.train.acceptance import Accepted, accept_tokens

ALL: tuple[Acceptance, ...] = (NoAcceptance(), Tis(), SeqTis(), Mis(), IcePop(), KPop(), DppoTv(), GeoRs())
each_region = pytest.mark.parametrize("region", ALL, ids=lambda region: region.kind)


def accept(
    region: Acceptance,
    train: Tensor | list[float],
    sampling: Tensor | list[float],
    *,
    advantages: list[float] | None = None,
    lengths: list[int] | None = None,
) -> Accepted:
    train, sampling = torch.as_tensor(train), torch.as_tensor(sampling)
    lengths = lengths or [len(train)]
    return accept_tokens(
        region,
        train,
        sampling,
        torch.tensor(advantages or [1.0] * len(train)),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        torch.tensor(lengths),
    )


def test_tis_of_the_nemo_rl_vectors() -> None:
    """Ratios 0.1, 1, 3 at a cap of 2; and exp(-0.5, 0.5, -0.2) at 0.8, by token and by sequence."""
    got = accept(Tis(cap=2.0), torch.tensor([0.1, 1.0, 3.0]).log(), torch.zeros(3))
    torch.testing.assert_close(got.weight_T, torch.tensor([0.1, 1.0, 2.0]), atol=1e-6, rtol=0)
    assert not got.masked_T.any()
    prev, generated = [-1.0, -1.0, -1.0], [-0.5, -1.5, -0.8]
    by_token = accept(Tis(cap=0.8), prev, generated).weight_T
    torch.testing.assert_close(by_token, torch.tensor([math.exp(-0.5), 0.8, 0.8]), atol=1e-6, rtol=0)
    by_sequence = accept(SeqTis(cap=0.8), prev, generated).weight_T
    torch.testing.assert_close(by_sequence, torch.full((3,), 0.8), atol=1e-6, rtol=0)
    whole = accept(SeqTis(cap=10.0), prev, generated).weight_T
    torch.testing.assert_close(whole, torch.full((3,), math.exp(-0.2)), atol=1e-6, rtol=0)


def test_mis_drops_whole_completions_above_the_cap() -> None:
    """TRL's `sequence_mask` at its default of 3: products 0.5 * 4 = 2 and 2 * 2 = 4."""
    log_k = torch.tensor([0.5, 4.0, 2.0, 2.0]).log()
    got = accept(Mis(), log_k, torch.zeros(4), lengths=[2, 2])
    torch.testing.assert_close(got.weight_T, torch.tensor([2.0, 2.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert got.masked_T.tolist() == [False, False, True, True]


def test_geo_rs_of_the_nemo_rl_vector() -> None:
    """`seq-mask-tis` at [0.999, 1.002]: a geometric mean of exp(0.0005) stays, with weight k a token."""
    band = GeoRs(low=0.999, high=1.002)
    got = accept(band, [-1.0] * 3, [-1.0005] * 3)
    torch.testing.assert_close(got.weight_T, torch.full((3,), math.exp(0.0005)), atol=1e-6, rtol=0)
    assert accept(band, [-1.0] * 3, [-1.003] * 3).masked_T.all()
    wide = accept(band, [-1.0, -1.0], [-1.5, -0.5])  # e^0.5 and e^-0.5: the mean is one
    torch.testing.assert_close(wide.weight_T, torch.tensor([0.5, -0.5]).exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("train", "sampling", "stays"),
    [
        (0.5, 0.5, True),
        (0.9, 0.3, True),  # the larger divergence is 1.03
        (0.99, 0.1, False),  # 2.22
        (0.1, 0.99, False),  # the same two, the other way round
        (1e-4, 1e-8, True),  # a ratio of 10^4 between two rare events
        (1.0 - 1e-7, 1.0, True),  # what fp32 makes of one
    ],
)
def test_kpop_is_the_larger_of_two_binary_divergences(train: float, sampling: float, stays: bool) -> None:
    p, q = torch.tensor([train], dtype=torch.float64), torch.tensor([sampling], dtype=torch.float64)
    got = accept(KPop(phi=2.0), p.log().float(), q.log().float())
    assert got.masked_T.item() is not stays
    if stays:
        assert got.weight_T.item() == pytest.approx(train / sampling, rel=1e-4)
    if 0 < sampling < 1:
        forward = train * math.log(train / sampling) + (1 - train) * math.log((1 - train) / (1 - sampling))
        backward = sampling * math.log(sampling / train) + (1 - sampling) * math.log((1 - sampling) / (1 - train))
        assert (max(forward, backward) <= 2.0) is stays


def test_dppo_tv_looks_at_the_sign_of_the_advantage() -> None:
    """Differences of 0.3, -0.3 and 0.1 in probability, for either sign; delta is 0.2."""
    train, sampling = torch.tensor([0.8, 0.2, 0.5]).log(), torch.tensor([0.5, 0.5, 0.4]).log()
    up = accept(DppoTv(), train, sampling, advantages=[1.0, 1.0, 1.0])
    assert up.masked_T.tolist() == [True, False, False]
    torch.testing.assert_close(up.weight_T, torch.tensor([0.0, 0.4, 1.25]), atol=1e-6, rtol=0)
    down = accept(DppoTv(), train, sampling, advantages=[-2.0, -2.0, -2.0])
    assert down.masked_T.tolist() == [False, True, False]
    assert not accept(DppoTv(), train, sampling, advantages=[0.0, 0.0, 0.0]).masked_T.any()


def test_bounds_are_inside() -> None:
    half, five = math.log(0.5), math.log(5.0)
    assert not accept(IcePop(), [half, five], [0.0, 0.0]).masked_T.any()
    assert not accept(Mis(cap=5.0), [five], [0.0]).masked_T.any()
    assert not accept(GeoRs(low=0.5, high=5.0), [half, five], [0.0, 0.0], lengths=[1, 1]).masked_T.any()
    assert not accept(DppoTv(delta=0.25), [math.log(0.75)], [half]).masked_T.any()
    edge = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    other = -0.5 * math.log(1.5) - 0.5 * math.log(0.5)
    assert not accept(KPop(phi=max(edge, other)), [math.log(0.75)], [half]).masked_T.any()
    assert accept(KPop(phi=0.99 * max(edge, other)), [math.log(0.75)], [half]).masked_T.all()


def test_alpha_zero_leaves_the_lower_end_open() -> None:
    got = accept(IcePop(alpha=0.0, beta=2.0), [-30.0, 0.0], [-1.0, -1.0])
    assert got.masked_T.tolist() == [False, True]


@each_region
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped_and_counted(region: Acceptance, bad: float) -> None:
    got = accept(region, [-1.0, -1.0, -1.0], [-1.0, bad, -1.0], lengths=[2, 1])
    assert torch.isfinite(got.weight_T).all()
    if region.kind == "none":
        assert (got.nonfinite, got.weight_T.tolist()) == (0, [1.0, 1.0, 1.0])
        return
    assert got.nonfinite == 1
    # Regions of completions cannot know the product of one that has such a token.
    first = region.kind in ("seq_tis", "mis", "geo_rs")
    assert got.masked_T.tolist() == [first, True, False]
    assert got.weight_T[2].item() == 1.0


@each_region
@pytest.mark.parametrize("log_k", [300.0, -300.0, 1e30])
def test_huge_ratios_make_no_nan(region: Acceptance, log_k: float) -> None:
    got = accept(region, [log_k - 400.0], [-400.0])
    assert not torch.isnan(got.weight_T).any()
    assert got.masked_T.all() or torch.isfinite(got.weight_T).all() or region.kind in ("kpop", "dppo_tv")


def reference(region: Acceptance, train: list[float], sampling: list[float], advantage: float) -> list[float]:
    """One completion, in plain Python and probability space."""
    k = [math.exp(a - b) for a, b in zip(train, sampling, strict=True)]
    product = math.prod(k)
    geometric = product ** (1 / len(k))
    weights: list[float] = []
    for ratio, a, b in zip(k, train, sampling, strict=True):
        p, q = math.exp(a), math.exp(b)
        cases: dict[str, Any] = {
            "none": lambda: 1.0,
            "tis": lambda ratio=ratio: min(ratio, 2.0),
            "seq_tis": lambda: min(product, 2.0),
            "mis": lambda: product if product <= 3.0 else 0.0,
            "icepop": lambda ratio=ratio: ratio if 0.5 <= ratio <= 5.0 else 0.0,
            "kpop": lambda ratio=ratio, p=p, q=q: ratio if max(_binary_kl(p, q), _binary_kl(q, p)) <= 2.0 else 0.0,
            "dppo_tv": lambda ratio=ratio, p=p, q=q: ratio if (p - q) * math.copysign(1, advantage) <= 0.2 else 0.0,
            "geo_rs": lambda ratio=ratio: ratio if 0.99 <= geometric <= 1.01 else 0.0,
        }
        weights.append(cases[region.kind]())
    return weights


def _binary_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@each_region
@given(
    pairs=st.lists(st.tuples(st.floats(-6, -0.01), st.floats(-6, -0.01)), min_size=1, max_size=6),
    advantage=st.sampled_from([-1.5, 0.5]),
)
def test_any_completion_matches_the_plain_formula(
    region: Acceptance, pairs: list[tuple[float, float]], advantage: float
) -> None:
    train, sampling = [a for a, _ in pairs], [b for _, b in pairs]
    if region.kind == "geo_rs":  # otherwise nothing ever stays
        sampling = [a + 0.004 * b for a, b in pairs]
    got = accept_tokens(
        region,
        torch.tensor(train, dtype=torch.float64),
        torch.tensor(sampling, dtype=torch.float64),
        torch.full((len(pairs),), advantage),
        torch.zeros(len(pairs), dtype=torch.int64),
        torch.tensor([len(pairs)]),
    )
    want = torch.tensor(reference(region, train, sampling, advantage), dtype=torch.float64)
    close = torch.isclose(got.weight_T, want, rtol=1e-6, atol=1e-9)
    # Within the slack of a bound either answer is right.
    assert close.all() or (got.weight_T[~close].eq(0) | want[~close].eq(0)).all()
    assert close.all() or _near_a_bound(region, train, sampling)
    assert torch.equal(got.masked_T, got.weight_T == 0)


def _near_a_bound(region: Acceptance, train: list[float], sampling: list[float]) -> bool:
    """Whether something lies so close to a bound that rounding decides."""
    nudged = [
        reference(region, train, [b + d for b in sampling], sign) for d in (-3e-6, 0.0, 3e-6) for sign in (1.0, -1.0)
    ]
    return any((a == 0) != (b == 0) for row in nudged for a, b in zip(row, nudged[0], strict=True))
