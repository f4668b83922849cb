"""FP8 blocks: every code, the oracle of transformers, partial blocks, and scales that do not fit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import (
    FP8_MAX,
    dequantize_fp8_blocks,
    dequantize_fp8_blocks_reference,
    fp8_scale_shape,
    quantize_fp8_blocks,
    quantize_fp8_blocks_reference,
)

fp8_oracle = pytest.importorskip("transformers.integrations.finegrained_fp8")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
    return (torch.randn(shape, generator=generator) * spread * 0.02).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def e4m3_value(code: int) -> float:
    """The OCP FP8 table, by the definition: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits, no infinities."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("dequantize", [dequantize_fp8_blocks, dequantize_fp8_blocks_reference])
@pytest.mark.parametrize("with_nan", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.7e-5, 2.0**-140, 2.0**118, 2.0**119])
def test_every_code_has_the_value_of_the_format(dequantize: Any, with_nan: bool, scale: float) -> None:
    codes = [code for code in range(256) if with_nan or code & 0x7F != 0x7F]
    stored = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((1, 2), scale)
    expected = torch.tensor([[e4m3_value(code) for code in codes]], dtype=torch.float64) * scales[0, 0].double()
    torch.testing.assert_close(dequantize(stored, scales), expected.float(), rtol=0, atol=0, equal_nan=True)


def test_every_code_survives_the_round_trip() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    block = codes.view(2, 127)
    for scale in (1.0, 2.0**-20, 0.3):
        weight = dequantize_fp8_blocks(block, torch.full((1, 1), scale))
        again, scale_inv = quantize_fp8_blocks(weight)
        assert same_bits(again, block)
        torch.testing.assert_close(scale_inv, torch.full((1, 1), scale), rtol=1e-7, atol=0)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 300), (127, 129), (3, 140, 260), (2, 2, 5, 7)])
def test_fast_paths_give_the_bits_of_the_references(shape: tuple[int, ...], ue8m0: bool) -> None:
    weight = normal(*shape)
    codes, scale_inv = quantize_fp8_blocks(weight, ue8m0=ue8m0)
    slow_codes, slow_scale_inv = quantize_fp8_blocks_reference(weight, ue8m0=ue8m0)
    assert same_bits(codes, slow_codes) and same_bits(scale_inv, slow_scale_inv)
    assert scale_inv.shape == fp8_scale_shape(shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fast = dequantize_fp8_blocks(codes, scale_inv, dtype=dtype)
        assert same_bits(fast, dequantize_fp8_blocks_reference(codes, scale_inv, dtype=dtype))


def oracle(ue8m0: bool) -> Any:
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="ue8m0" if ue8m0 else "float")
    return SimpleNamespace(quantization_config=config)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_transformers_agrees_on_whole_blocks(ue8m0: bool) -> None:
    weight = normal(256, 384, seed=1)
    theirs = fp8_oracle.Fp8Quantize(oracle(ue8m0)).convert({"a.weight": weight})
    codes, scale_inv = quantize_fp8_blocks(weight, ue8m0=ue8m0)
    stored_scale = theirs["a.weight_scale_inv"]
    if ue8m0:
        assert stored_scale.dtype == torch.float8_e8m0fnu
        assert torch.equal(scale_inv, stored_scale.float())
        assert same_bits(codes, theirs["a.weight"])
    else:
        # They round twice (448 / amax, then its inverse), so a value on the edge of two codes may go the other way.
        torch.testing.assert_close(scale_inv, stored_scale, rtol=3e-7, atol=0)
        assert (codes.float() != theirs["a.weight"].float()).float().mean() < 1e-3
    back = fp8_oracle.Fp8Dequantize(oracle(ue8m0))._dequantize_one(theirs["a.weight"], stored_scale, torch.bfloat16)
    assert same_bits(dequantize_fp8_blocks(theirs["a.weight"], stored_scale, dtype=torch.bfloat16), back)


def test_partial_blocks_count_as_padded_with_zeros() -> None:
    weight = normal(200, 150, seed=2)
    padded = torch.zeros(256, 256)
    padded[:200, :150] = weight
    codes, scale_inv = quantize_fp8_blocks(weight)
    whole = fp8_oracle.Fp8Quantize(oracle(False)).convert({"a.weight": padded})
    torch.testing.assert_close(scale_inv, whole["a.weight_scale_inv"], rtol=3e-7, atol=0)
    padded_codes, padded_scales = quantize_fp8_blocks(padded)
    assert same_bits(codes, padded_codes[:200, :150].contiguous()) and same_bits(scale_inv, padded_scales)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 9),
    ue8m0=st.booleans(),
    power=st.integers(-30, 30),
)
def test_the_error_is_at_most_half_a_step(rows: int, columns: int, seed: int, ue8m0: bool, power: int) -> None:
    """E4M3 keeps 4 significant bits: 1/16 of the value, or half the smallest step (2^-10 of a scale) near zero."""
    weight = normal(rows, columns, seed=seed) * 2.0**power
    codes, scale_inv = quantize_fp8_blocks(weight, (4, 4), ue8m0=ue8m0)
    spread = scale_inv.repeat_interleave(4, 0).repeat_interleave(4, 1)[:rows, :columns].double()
    error = (dequantize_fp8_blocks(codes, scale_inv, (4, 4)).double() - weight.double()).abs()
    assert (error <= weight.double().abs().div(16).maximum(spread * 2**-10) * (1 + 1e-5)).all()
    assert (codes.float().abs() <= FP8_MAX).all()
    if ue8m0:
        assert (torch.frexp(scale_inv).mantissa == 0.5).all()


def test_power_of_two_scales_are_exact_at_the_edges() -> None:
    """amax = 448 x 2^k needs the scale 2^k; the next float above needs 2^(k+1)."""
    for exponent in range(-60, 60):
        edge = torch.tensor([[FP8_MAX * 2.0**exponent]])
        above = torch.nextafter(edge, torch.tensor(math.inf))
        assert quantize_fp8_blocks(edge, ue8m0=True)[1].item() == 2.0**exponent
        # 448 x 2^k plus one ulp, divided by 448, may round back to 2^k; two ulps cannot.
        above = torch.nextafter(above, torch.tensor(math.inf))
        assert quantize_fp8_blocks(above, ue8m0=True)[1].item() == 2.0 ** (exponent + 1)


def test_zero_and_tiny_blocks_stay_finite() -> None:
    codes, scale_inv = quantize_fp8_blocks(torch.zeros(4, 4))
    assert scale_inv.item() == 1 and not codes.float().any()
    for ue8m0 in (False, True):
        codes, scale_inv = quantize_fp8_blocks(torch.full((2, 2), 1e-44), ue8m0=ue8m0)
        assert scale_inv.isfinite().all() and codes.float().isfinite().all()


def test_it_fills_a_view_in_place() -> None:
    codes, scale_inv = quantize_fp8_blocks(normal(130, 20))
    store = torch.zeros(20, 130, dtype=torch.bfloat16)
    assert dequantize_fp8_blocks(codes, scale_inv, out=store.T) is not None
    assert torch.equal(store.T, dequantize_fp8_blocks(codes, scale_inv, dtype=torch.bfloat16))


@pytest.mark.parametrize("dequantize", [dequantize_fp8_blocks, dequantize_fp8_blocks_reference])
def test_scales_that_do_not_fit_are_refused(dequantize: Any) -> None:
    codes = torch.zeros(130, 20).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"scales have shape \[1, 1\]; expected \[2, 1\], one for each 128x128"):
        dequantize(codes, torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"codes are torch\.float32"):
        dequantize(torch.zeros(2, 2), torch.ones(1, 1))


@pytest.mark.parametrize("quantize", [quantize_fp8_blocks, quantize_fp8_blocks_reference])
def test_weights_that_cannot_be_quantized_are_refused(quantize: Any) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(CheckpointError, match="not finite"):
            quantize(torch.tensor([[1.0, value]]))
    with pytest.raises(CheckpointError, match=r"shape \[3\] has no blocks"):
        quantize(torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"block size is \[0, 128\]"):
        quantize(torch.zeros(3, 3), (0, 128))
