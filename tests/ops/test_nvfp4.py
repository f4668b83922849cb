"""NVFP4: every code under every scale against exact rational arithmetic, ties, zeros, saturation, fast against slow."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import (
    BLOCK_SIZE,
    E2M1_VALUES,
    Nvfp4,
    dequantize_nvfp4,
    dequantize_nvfp4_reference,
    encode_nvfp4,
    encode_nvfp4_reference,
    fake_quantize_nvfp4,
    fake_quantize_nvfp4_reference,
    nvfp4_amax,
    nvfp4_global_scale,
    quantize_nvfp4,
    quantize_nvfp4_reference,
)

# ---- an oracle in exact arithmetic: nothing below knows of torch ----------------------------------------------------


def rounded(value: Fraction, mantissa_bits: int, lowest_exponent: int) -> Fraction:
    """The nearest number of a binary format without an upper end, ties to even; 1 + mantissa_bits of precision."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent = max(exponent - (abs(value) < Fraction(2) ** exponent), lowest_exponent)
    spacing = Fraction(2) ** (exponent - mantissa_bits)
    return round(value / spacing) * spacing  # Python rounds halves of a Fraction to even


def float32(value: Fraction) -> Fraction:
    return rounded(value, 23, -126)


def e4m3(value: Fraction) -> Fraction:
    return rounded(value, 3, -6)


def e2m1(value: Fraction) -> Fraction:
    return min(rounded(abs(value), 1, 0), Fraction(6)) * (-1 if value < 0 else 1)


def e4m3_of(code: int) -> Fraction:
    exponent, mantissa = code >> 3 & 0xF, code & 7
    size = Fraction(mantissa, 8) / 64 if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -size if code & 0x80 else size


def e2m1_of(code: int) -> Fraction:
    exponent, mantissa = code >> 1 & 3, code & 1
    size = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -size if code & 8 else size


def oracle(values: list[Fraction], amax: Fraction) -> tuple[Fraction, list[Fraction], list[int]]:
    """Global scale, block scales and codes of float32 values, by the formulas of ModelOpt 0.47."""
    tensor_scale = float32(amax / 2688)
    scales, codes = [], []
    for start in range(0, len(values), 16):
        block = values[start : start + 16]
        wanted = float32(max(map(abs, block)) / float32(6 * tensor_scale))
        scale = e4m3(min(max(wanted or Fraction(1), Fraction(1, 512)), Fraction(448)))
        scales.append(scale)
        for value in block:
            near = e2m1(float32(value / float32(scale * tensor_scale)))
            size = next(code for code in range(8) if e2m1_of(code) == abs(near))
            codes.append(size | (8 if value < 0 else 0))
    return tensor_scale, scales, codes


def exact(values: Tensor) -> list[Fraction]:
    return [Fraction(struct.unpack("<f", struct.pack("<f", value))[0]) for value in values.flatten().tolist()]


def nibbles(packed: Tensor) -> list[int]:
    return [code for byte in packed.flatten().tolist() for code in (byte & 0xF, byte >> 4)]


def packed_of(codes: list[int]) -> Tensor:
    return torch.tensor([codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)], dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )


def wide(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose blocks differ in size by orders of magnitude, so that scales are subnormal and saturate."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(*shape[:-1], shape[-1] // 16, 16, generator=generator)
    spread = torch.randn(*shape[:-1], shape[-1] // 16, 1, generator=generator).mul(3).exp()
    return (blocks * spread).reshape(shape).to(dtype)


DEQUANTIZERS = [dequantize_nvfp4, dequantize_nvfp4_reference]
QUANTIZERS = [quantize_nvfp4, quantize_nvfp4_reference]

# ---- the format -----------------------------------------------------------------------------------------------------


def test_the_table_is_the_format() -> None:
    assert [Fraction(value) for value in E2M1_VALUES] == [e2m1_of(code) for code in range(8)]


@pytest.mark.parametrize("tensor_scale", [1.0, 3.7e-5, 2.0**-140, 2.0**100])
def test_every_code_under_every_scale_has_the_exact_value(tensor_scale: float) -> None:
    bytes_ = [code for code in range(256) if code & 0x7F != 0x7F]
    scale = torch.tensor(bytes_, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    packed = packed_of(list(range(16))).expand(len(bytes_), 8).contiguous()
    total = torch.tensor(tensor_scale)
    expected = []
    for byte in bytes_:
        step = float32(e4m3_of(byte) * exact(total)[0])
        expected += [float(float32(e2m1_of(code) * step)) for code in range(16)]
    found = dequantize_nvfp4(packed, scale, total)
    torch.testing.assert_close(found.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)


def test_the_reference_agrees_on_every_code_and_scale() -> None:
    scale = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    packed = packed_of(list(range(16))).expand(len(scale), 8).contiguous()
    total = torch.tensor(0.3)
    assert same_bits(dequantize_nvfp4(packed, scale, total), dequantize_nvfp4_reference(packed, scale, total))


@pytest.mark.parametrize("tensor_scale", [1.0, 0.37, 2.0**-60])
def test_every_code_under_every_scale_survives_the_round_trip(tensor_scale: float) -> None:
    scale = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    # Code 8 is left out: -0.0 is not below zero, and becomes code 0.
    codes = [0, *range(1, 8), 0, *range(9, 16)]
    packed = packed_of(codes).expand(len(scale), 8).contiguous()
    values = dequantize_nvfp4(packed, scale, torch.tensor(tensor_scale))
    assert same_bits(encode_nvfp4(values, scale, torch.tensor(tensor_scale)), packed)
    # The largest code of a block is 6, so the block's own maximum leads back to its scale.
    again = quantize_nvfp4(values, amax=tensor_scale * 2688)
    assert same_bits(again.packed, packed) and same_bits(again.scale, scale)


@pytest.mark.parametrize("encode", [encode_nvfp4, encode_nvfp4_reference])
def test_ties_go_to_the_even_code_and_neighbours_to_the_nearest(encode: Any) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    to = [0, 2, 2, 4, 4, 6, 6]
    below = [0, 1, 2, 3, 4, 5, 6]
    tie = torch.tensor(ties)
    sizes = torch.cat([tie, tie.nextafter(tie * 0), tie.nextafter(tie * 9), torch.tensor([6.0, 7.0, 1e30])])
    codes = [*to, *below, *(code + 1 for code in below), 7, 7, 7]
    values = torch.cat([sizes, -sizes])
    expected = [*codes, *(code | 8 for code in codes)]
    assert len(values) == len(expected) == 48
    scale = torch.ones(3).to(torch.float8_e4m3fn)
    # A small negative value becomes -0 (code 8); 0.0 and -0.0 both become code 0.
    assert nibbles(encode(values, scale, torch.tensor(1.0))) == expected
    assert nibbles(encode(torch.full((16,), -0.1), scale[:1], torch.tensor(1.0))) == [8] * 16
    assert nibbles(encode(torch.full((16,), -0.0), scale[:1], torch.tensor(1.0))) == [0] * 16


def test_the_even_value_is_in_the_low_nibble() -> None:
    values = torch.zeros(16)
    values[:3] = torch.tensor([0.5, 6.0, -1.0])
    packed, scale, total = quantize_nvfp4(values)
    assert packed[:2].tolist() == [0x71, 0x0A] and float(scale.float() * total) == pytest.approx(1.0)


# ---- quantizing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (1, torch.float16)])
def test_exact_arithmetic_gives_the_same_bits(seed: int, dtype: torch.dtype) -> None:
    values = wide(16, 48, seed=seed, dtype=dtype)
    values[3, 16:32] = 0
    found = quantize_nvfp4(values)
    tensor_scale, scales, codes = oracle(exact(values.float()), exact(values.float().abs().amax())[0])
    assert exact(found.global_scale) == [tensor_scale]
    assert exact(found.scale.float()) == scales
    assert nibbles(found.packed) == codes
    # The values reach the ends of what a block scale can be, where the format is least forgiving.
    assert Fraction(448) in scales and Fraction(1, 512) in scales and any(s < Fraction(1, 64) for s in scales)


@pytest.mark.parametrize("seed", range(3))
def test_a_given_amax_saturates_what_is_larger(seed: int) -> None:
    values = wide(4, 32, seed=seed)
    amax = float(values.abs().amax()) / 50
    found = quantize_nvfp4(values, amax=amax)
    tensor_scale, scales, codes = oracle(exact(values), exact(torch.tensor(amax))[0])
    assert (exact(found.global_scale), exact(found.scale.float())) == ([tensor_scale], scales)
    assert nibbles(found.packed) == codes
    assert dequantize_nvfp4(*found).abs().max() <= amax * 1.0001


@pytest.mark.parametrize("lead", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 2, 48), (3, 1, 32)])
def test_fast_paths_give_the_bits_of_the_references(shape: tuple[int, ...], lead: int) -> None:
    values = wide(*shape, seed=5)
    fast, slow = quantize_nvfp4(values, lead=lead), quantize_nvfp4_reference(values, lead=lead)
    assert all(same_bits(a, b) for a, b in zip(fast, slow, strict=True))
    assert fast.global_scale.shape == shape[:lead]
    back = dequantize_nvfp4(*fast)
    assert same_bits(back, dequantize_nvfp4_reference(*slow))
    assert same_bits(fake_quantize_nvfp4(values, lead=lead), back)
    assert same_bits(fake_quantize_nvfp4_reference(values, lead=lead), back)
    assert same_bits(dequantize_nvfp4(*fast, out=torch.empty(shape)), back)
    given_amax = nvfp4_amax(values, lead=lead) * 0.7
    assert same_bits(
        fake_quantize_nvfp4(values, amax=given_amax, lead=lead),
        dequantize_nvfp4(*quantize_nvfp4(values, amax=given_amax, lead=lead)),
    )


def test_each_leading_index_is_a_tensor_of_its_own() -> None:
    values = wide(3, 4, 32, seed=6)
    together = quantize_nvfp4(values, lead=1)
    for index in range(3):
        alone = quantize_nvfp4(values[index])
        assert all(same_bits(whole[index], one) for whole, one in zip(together, alone, strict=True))


def test_many_chunks_are_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    values = wide(7, 48, seed=7)
    whole, fake = quantize_nvfp4(values), fake_quantize_nvfp4(values)
    monkeypatch.setattr("tafkir.ops.nvfp4._CHUNK", 64)
    pieces = quantize_nvfp4(values)
    assert all(same_bits(a, b) for a, b in zip(whole, pieces, strict=True))
    assert same_bits(dequantize_nvfp4(*pieces), dequantize_nvfp4(*whole)) and same_bits(
        fake_quantize_nvfp4(values), fake
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-100, 100))
def test_errors_stay_within_half_a_step(seed: int, exponent: int) -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    back = fake_quantize_nvfp4(values)
    amax = values.view(4, 2, 16).abs().amax(-1, keepdim=True).expand(4, 2, 16).reshape(4, 32)
    # Half of the largest spacing (2 of 6), and what a rounded scale (1 in 16) may cut off at the upper end.
    assert ((back - values).abs() <= amax * (1 / 6 + 1 / 14)).all()
    # What is quantized stays as it is, up to the last bit of the scales.
    torch.testing.assert_close(fake_quantize_nvfp4(back, amax=float(values.abs().amax())), back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_zeros_are_finite(quantize: Any) -> None:
    found: Nvfp4 = quantize(torch.zeros(2, 32))
    assert found.scale.float().tolist() == [[1.0, 1.0]] * 2
    assert float(found.global_scale) == 1.0 and not found.packed.any()
    assert not dequantize_nvfp4(*found).any()
    part: Nvfp4 = quantize(torch.cat([torch.zeros(16), torch.ones(16)]))
    assert part.scale.float().tolist() == [1.0, 448.0]
    experts: Nvfp4 = quantize(torch.stack([torch.zeros(16), torch.ones(16)]), lead=1)
    assert experts.global_scale.tolist()[0] == 1.0 and torch.isfinite(dequantize_nvfp4(*experts)).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 3e-35, 1e38, torch.finfo(torch.float32).max])
def test_the_ends_of_float32_stay_finite(size: float) -> None:
    values = torch.linspace(-1, 1, 32) * size
    found = quantize_nvfp4(values)
    assert torch.isfinite(found.scale.float()).all() and float(found.global_scale) > 0
    assert torch.isfinite(dequantize_nvfp4(*found)).all()
    assert same_bits(fake_quantize_nvfp4(values), dequantize_nvfp4(*found))


def test_empty_tensors() -> None:
    found = quantize_nvfp4(torch.zeros(0, 32))
    assert found.packed.shape == (0, 16) and found.scale.shape == (0, 2)
    assert dequantize_nvfp4(*found).shape == (0, 32) == fake_quantize_nvfp4(torch.zeros(0, 32)).shape


def test_relative_error_of_gaussian_weights_is_the_published_one() -> None:
    values = torch.randn(512, 512, generator=torch.Generator().manual_seed(8))
    error = (fake_quantize_nvfp4(values) - values).square().mean() / values.square().mean()
    # Measured for ModelOpt's max calibration: 8.99e-3.
    assert float(error) == pytest.approx(8.99e-3, rel=0.03)


def test_four_over_six_has_room_below_the_largest_scale() -> None:
    total = nvfp4_global_scale(torch.tensor(12.0), scale_max=256.0)
    assert float(12.0 / (4.0 * total)) == pytest.approx(384.0)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_nvfp4_reference, fake_quantize_nvfp4])
def test_bad_values_are_refused(quantize: Any) -> None:
    with pytest.raises(CheckpointError, match="no blocks of 16"):
        quantize(torch.ones(4, 24))
    with pytest.raises(CheckpointError, match="no blocks of 16"):
        quantize(torch.tensor(1.0))
    with pytest.raises(CheckpointError, match="lead=2"):
        quantize(torch.ones(4, 16), lead=2)
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(2, 16)
        values[1, 3] = bad
        with pytest.raises(CheckpointError, match="not finite"):
            quantize(values)


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf"), 0.0])
def test_a_bad_amax_is_refused(amax: float) -> None:
    with pytest.raises(CheckpointError, match="amax="):
        quantize_nvfp4(torch.ones(2, 16), amax=amax)


def test_an_amax_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match="amax has shape"):
        quantize_nvfp4(torch.ones(2, 16), amax=torch.ones(3), lead=1)
    assert float(quantize_nvfp4(torch.zeros(2, 16), amax=0.0).global_scale) == 1.0


@pytest.mark.parametrize("dequantize", DEQUANTIZERS)
def test_parts_that_do_not_belong_together_are_refused(dequantize: Any) -> None:
    packed, scale, total = quantize_nvfp4(torch.ones(2, 32))
    with pytest.raises(CheckpointError, match="codes are"):
        dequantize(packed.int(), scale, total)
    with pytest.raises(CheckpointError, match="scales are"):
        dequantize(packed, scale.float(), total)
    with pytest.raises(CheckpointError, match="one for each block"):
        dequantize(packed, scale[:, :1], total)
    with pytest.raises(CheckpointError, match="global scale has shape"):
        dequantize(packed, scale, torch.ones(3))


def test_the_block_size_is_the_formats() -> None:
    assert BLOCK_SIZE == 16
