"""RoPE and YaRN against transformers' own functions, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tafkir.ops.rope import (
    deinterleave,
    inverse_frequencies,
    rope_table,
    softmax_factor,
    yarn_attention_factor,
)
from tafkir.recipe.model import ModelConfig, YarnConfig

transformers = pytest.importorskip("transformers")

LING = YarnConfig(factor=4.0, original_max_position_embeddings=32768)
DEEPSEEK = YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
CASES: dict[str, tuple[YarnConfig, int, float]] = {
    "Ling, 32K to 128K": (LING, 64, 600000.0),
    "DeepSeek-V3": (DEEPSEEK, 64, 10000.0),
    "two mscales": (DEEPSEEK.model_copy(update={"mscale": 0.7, "mscale_all_dim": 1.3}), 64, 10000.0),
    "a factor of one's own": (LING.model_copy(update={"attention_factor": 1.25}), 64, 600000.0),
    "bounds not rounded": (LING.model_copy(update={"truncate": False, "beta_fast": 20.0}), 64, 150000.0),
    "tiny": (YarnConfig(factor=2.5, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=2.0), 16, 10000.0),
    "a step for a ramp": (YarnConfig(factor=8, original_max_position_embeddings=6), 16, 10000.0),
    "not stretched": (YarnConfig(factor=1.0, original_max_position_embeddings=64), 16, 10000.0),
}


def oracle(scaling: YarnConfig, dim: int, theta: float) -> tuple[torch.Tensor, float]:
    parameters: dict[str, Any] = scaling.model_dump() | {"rope_type": "yarn", "rope_theta": theta}
    context = int(scaling.original_max_position_embeddings * scaling.factor)
    config = transformers.Qwen3Config(head_dim=dim, rope_parameters=parameters, max_position_embeddings=context)
    inv_freq, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, None)
    return inv_freq, factor


@pytest.mark.parametrize("case", CASES, ids=str)
def test_yarn_equals_transformers_bit_for_bit(case: str) -> None:
    scaling, dim, theta = CASES[case]
    inv_freq, factor = oracle(scaling, dim, theta)
    assert torch.equal(inverse_frequencies(dim, theta, scaling), inv_freq)
    assert yarn_attention_factor(scaling) == factor
    positions = torch.tensor([0, 1, 77, 4095, 130000])
    cos, sin = rope_table(positions, dim, theta, scaling)
    angles = positions.float().unsqueeze(1) * inv_freq
    assert torch.equal(cos, angles.cos() * factor)
    assert torch.equal(sin, angles.sin() * factor)


def turns(scaling: YarnConfig, dim: int, theta: float) -> torch.Tensor:
    """How often each angle turns over the original context."""
    return scaling.original_max_position_embeddings / (2 * torch.pi) * inverse_frequencies(dim, theta).double()


@settings(max_examples=300)
@given(
    dim=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.sampled_from([3.0, 10.0, 100.0, 1e4, 6e5]),
    context=st.integers(0, 20).map(lambda power: 2**power) | st.integers(1, 40),
    betas=st.tuples(st.floats(0.1, 64), st.floats(0.1, 64)),
    truncate=st.booleans(),
)
def test_a_ramp_rises_as_in_transformers_or_is_refused(
    dim: int, theta: float, context: int, betas: tuple[float, float], truncate: bool
) -> None:
    fast, slow = betas
    scaling = YarnConfig(
        factor=4.0, original_max_position_embeddings=context, beta_fast=fast, beta_slow=slow, truncate=truncate
    )
    theirs, plain = oracle(scaling, dim, theta)[0], inverse_frequencies(dim, theta)
    of_context = turns(scaling, dim, theta)
    # Whole angles are rounded to, so one that stands next to a bound may fall on its other side.
    kept, slowed = theirs == plain, (theirs / plain - 0.25).abs() < 1e-6
    try:
        low, high = scaling.bounds(dim, theta)
    except ValueError:
        with pytest.raises(ValidationError, match="has its ramp fall"):
            ModelConfig(head_dim=max(dim, 2), rotary_dim=dim, rope_theta=theta, rope_scaling=scaling)
        if fast > slow:
            assert bool((kept & (of_context < slow)).all()) or bool((slowed & (of_context > fast)).all())
        return
    assert low <= high
    assert torch.equal(inverse_frequencies(dim, theta, scaling), theirs)
    ratios = theirs / plain
    assert bool((ratios.diff() <= 1e-6).all())
    if fast > slow:
        first = torch.arange(dim // 2) == 0
        assert bool((kept | first | (of_context <= fast * 1.000001)).all())
        assert bool((slowed | first | (of_context >= slow * 0.999999)).all())


def test_ling_from_32k_to_128k_has_the_published_bounds() -> None:
    assert LING.bounds(64, 600000.0) == (12, 21)
    assert round(yarn_attention_factor(LING), 5) == 1.13863
    assert softmax_factor(LING) == 1.0


def test_deepseek_scales_the_softmax_instead() -> None:
    assert yarn_attention_factor(DEEPSEEK) == 1.0
    assert round(softmax_factor(DEEPSEEK), 4) == 1.8739
    assert softmax_factor(None) == 1.0


def test_fast_angles_stay_and_slow_ones_slow_down() -> None:
    plain, stretched = inverse_frequencies(64, 600000.0), inverse_frequencies(64, 600000.0, LING)
    assert torch.equal(stretched[:13], plain[:13])
    torch.testing.assert_close(stretched[21:], plain[21:] / 4, rtol=1e-6, atol=0)
    assert torch.all(stretched[13:21] < plain[13:21])


def test_the_original_context_must_be_said() -> None:
    with pytest.raises(ValidationError, match="original_max_position_embeddings"):
        YarnConfig.model_validate({"factor": 4.0})
    with pytest.raises(ValidationError, match="factor"):
        YarnConfig.model_validate({"factor": 0.5, "original_max_position_embeddings": 64})


def test_pairs_become_halves() -> None:
    assert deinterleave(torch.arange(8)).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
