"""Token sampling against its slow twin, against the distribution it should draw from, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.errors import SamplingError
from tafkir.ops.sampling import (
    greedy,
    sample,
    sample_reference,
    stream_key,
    top_logprobs,
    truncation_mask,
    uniform,
    uniform_reference,
)


def params(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int64),
        torch.full((rows,), top_p),
    )


def draws(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def splitmix64_stream(state: int, count: int) -> list[int]:
    """The published generator, written down a second time: a running state instead of a counter."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_stream_is_published_splitmix64() -> None:
    # First outputs for seed 1234567, as listed with the generator's reference implementation.
    assert splitmix64_stream(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert stream_key(1234567) % 2**64 == 6457827717110365317
    start = splitmix64_stream(42, 1)[0]
    expected = [(z >> 11) * 2.0**-53 for z in splitmix64_stream(start, 5)]
    assert [uniform_reference(42, step) for step in range(5)] == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_uniform_equals_the_pure_python_twin(seed: int, step: int) -> None:
    got = uniform(torch.tensor([stream_key(seed)]), torch.tensor([step]))
    assert float(got) == uniform_reference(seed, step)
    assert 0 <= float(got) < 1


def test_uniform_depends_on_seed_and_step_alone_and_is_uniform() -> None:
    keys = torch.tensor([stream_key(seed) for seed in range(200)])
    u = uniform(keys.repeat_interleave(100), torch.arange(100).repeat(200))
    assert u.dtype == torch.float64
    counts = torch.histc(u.float(), bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    neighbours = u.view(200, 100)
    assert abs(float(torch.corrcoef(torch.stack([neighbours[:-1].flatten(), neighbours[1:].flatten()]))[0, 1])) < 0.03


@pytest.mark.parametrize("vocab", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (7, 0.8), (10_000, 1.0)])
def test_equals_reference(vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    rows = 40
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    arguments = (logits, *params(rows, temperature, top_k, top_p), draws(rows))
    token, logprob = sample(*arguments)
    token_ref, logprob_ref = sample_reference(*arguments)
    assert torch.equal(token, token_ref)
    torch.testing.assert_close(logprob, logprob_ref, atol=2e-6, rtol=1e-6)
    assert token.dtype == torch.int64
    assert logprob.dtype == torch.float32


def test_rows_with_different_parameters_do_not_mix() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 0.0])
    top_k = torch.tensor([0, 0, 4, 1, 0, 3])
    top_p = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.9, 0.2])
    u = draws(6)
    together = sample(logits, temperature, top_k, top_p, u)
    for row in range(6):
        alone = sample(*(x[row : row + 1] for x in (logits, temperature, top_k, top_p, u)))
        assert int(alone[0]) == int(together[0][row])
        assert float(alone[1]) == float(together[1][row])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.7)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    rows, vocab = 20_000, 12
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    u = uniform(torch.tensor([stream_key(seed) for seed in range(rows)]), torch.zeros(rows, dtype=torch.int64))
    token, _ = sample(logits_V.expand(rows, -1).contiguous(), *params(rows, temperature, top_k, top_p), u)
    scaled = logits_V / temperature
    keep = truncation_mask(scaled[None], torch.tensor([top_k]), torch.tensor([top_p]))[0]
    expected = torch.softmax(scaled.masked_fill(~keep, -torch.inf), 0) * rows
    counts = torch.bincount(token, minlength=vocab).float()
    assert not counts[~keep].any()
    chi_square = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert chi_square < 31.3  # 11 degrees of freedom at most, p = 0.001


def test_uniform_at_the_ends_picks_a_token_of_positive_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, -200.0, -torch.inf]]).repeat(2, 1)
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    token, logprob = sample(logits, *params(2), u)
    assert token.tolist() == [1, 2]
    assert torch.isfinite(logprob).all()


def test_greedy_takes_the_lowest_of_equals_at_temperature_one_logprobs() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    token, logprob = sample(logits, *params(1, temperature=0.0), draws(1))
    assert int(token) == 1
    assert float(logprob) == pytest.approx(float(logits.log_softmax(-1)[0, 1]), abs=1e-6)
    many = torch.randn(40, 150, generator=torch.Generator().manual_seed(6)) * 5
    expected = sample(many, *params(40, temperature=0.0), draws(40))
    assert all(torch.equal(got, wanted) for got, wanted in zip(greedy(many), expected, strict=True))


def test_logprob_is_of_the_untruncated_distribution_at_the_temperature() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(5))
    token, logprob = sample(logits, *params(1, temperature=0.5, top_k=1), draws(1))
    assert int(token) == int(logits.argmax())
    assert float(logprob) == pytest.approx(float((logits / 0.5).log_softmax(-1).max()), abs=1e-6)


def test_truncation_edges() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.1, 0.4]]))

    def kept(top_k: int, top_p: float) -> list[int]:
        mask = truncation_mask(logits, torch.tensor([top_k]), torch.tensor([top_p]))[0]
        return [i for i, keep in enumerate(mask.tolist()) if keep]

    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(1, 1.0) == [1], "of equals, the lower id"
    assert kept(3, 1.0) == [0, 1, 3]
    assert kept(99, 1.0) == [0, 1, 2, 3]
    assert kept(0, 1e-9) == [1], "never fewer than one"
    assert kept(0, 0.39) == [1]
    assert kept(0, 0.79) == [1, 3]
    assert kept(0, 0.85) == [0, 1, 3]
    assert kept(2, 0.45) == [1], "top-p counts what top-k left: 0.5 of it reaches 0.45"


def test_no_cut_draws_what_a_full_cut_draws() -> None:
    rows = 200
    logits = torch.randn(rows, 100, generator=torch.Generator().manual_seed(8))
    plain = sample(logits, *params(rows), draws(rows))
    full = sample(logits, *params(rows, top_k=100), draws(rows))
    assert torch.equal(plain[0], full[0])


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error_that_names_the_row(bad: list[float], temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], bad])
    with pytest.raises(SamplingError, match="row 1 of 2"):
        sample(logits, *params(2, temperature), draws(2))
    with pytest.raises(SamplingError):
        sample_reference(logits, *params(2, temperature), draws(2))


def test_top_logprobs() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    ids, values = top_logprobs(logits, torch.tensor([2.0]), 2)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(values, (logits / 2).log_softmax(-1)[:, [1, 2]])
    assert top_logprobs(logits, torch.tensor([0.0]), 20)[0].shape == (1, 3)
