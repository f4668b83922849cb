"""Kernels of whole weights, bit for bit against the torch code in ops/: every number, every scale, every tie."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.checkpoint.tensors import STORED_DTYPES
from tafkir.native.weights import RULES, Buffer, Rule, WeightKernels, weight_kernels
from tafkir.ops import native
from tafkir.ops.fp8 import dequantize_fp8_blocks, quantize_fp8, quantize_fp8_blocks
from tafkir.ops.nvfp4 import E2M1_VALUES, nvfp4_global_scale
from tafkir.ops.nvfp4_scales import quantize_nvfp4_inverse, search_nvfp4

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@pytest.fixture
def weights(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightKernels]:
    """The kernels; the torch code that they are held against runs without any."""
    monkeypatch.setenv("TAFKIR_KERNELS", "native")
    found = weight_kernels()
    assert found is not None
    before = native.kernels_in_use()
    native.select_kernels("torch")
    yield found
    native.select_kernels(before)


def amax_of(kernels: WeightKernels, values: Tensor) -> float:
    return kernels.amax(values.data_ptr(), DTYPES[values.dtype], values.numel())


def quantized(kernels: WeightKernels, values: Tensor, rule: Rule, amax: float) -> tuple[Tensor, Tensor, float]:
    """Packed codes, scales and global scale."""
    blocks = values.numel() // 16
    scale, packed = torch.zeros(blocks, dtype=torch.uint8), torch.zeros(blocks * 8, dtype=torch.uint8)
    dtype = DTYPES[values.dtype]
    kernels.quantize_nvfp4(values.data_ptr(), dtype, blocks, rule, amax, scale.data_ptr(), packed.data_ptr())
    return packed, scale, kernels.global_scale(dtype, rule, amax)


def check(kernels: WeightKernels, values: Tensor, amax: float | None = None) -> None:
    """Every rule against the reference, byte for byte."""
    values = values.contiguous()
    own = amax_of(kernels, values)
    assert own == float(values.float().abs().max())
    total = own if amax is None else amax
    for rule in RULES:
        found = quantized(kernels, values, rule, total)
        given: Any = torch.tensor(total)
        expected = (
            quantize_nvfp4_inverse(values, amax=given) if rule == "inverse" else search_nvfp4(values, rule, amax=given)
        )
        assert found[2] == float(expected.global_scale), rule
        assert torch.equal(found[1], expected.scale.view(torch.uint8).flatten()), rule
        assert torch.equal(found[0], expected.packed.flatten()), rule


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_rule_on_every_kind_of_weight(dtype: torch.dtype, weights: WeightKernels) -> None:
    torch.manual_seed(0)
    gauss = torch.randn(37, 48)  # 111 blocks: no multiple of the kernel's batch of 16
    wide = gauss.view(-1, 16) * torch.randn(111, 1).mul(4).exp()
    sparse = gauss * (torch.rand(37, 48) < 0.1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(64) * torch.tensor([1.0, -1.0]).repeat(256)
    for values in (gauss, wide, sparse, ties, gauss * 1e-30, gauss * 1e30, torch.zeros(5, 16), -torch.zeros(3, 16)):
        cast = values.to(dtype).reshape(-1, 16)
        check(weights, cast)
        top = float(cast.float().abs().max())
        if top:
            check(weights, cast, amax=float(torch.tensor(top * 2.5).to(dtype)))
    smallest = torch.tensor([2.0**-133 if dtype == torch.bfloat16 else 2.0**-149]).to(dtype)
    check(weights, smallest.repeat(32).reshape(-1, 16))


def test_every_bfloat16_number(weights: WeightKernels) -> None:
    finite = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    signs = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(len(finite) // 2)
    # In their order the numbers of a block are alike; strewn, a block's maximum leaves most of them tiny.
    strewn = (finite * signs)[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    for values in (finite * signs, strewn):
        check(weights, values.view(-1, 16))


def test_every_scale_and_every_tie_with_its_neighbours(weights: WeightKernels) -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1_VALUES)])
    for nudge in (-2, -1, 0, 1, 2):
        near = (middles * scales[:, None]).view(torch.int32).add(nudge).view(torch.float32)
        blocks = torch.cat([scales[:, None] * 6, near, -near, scales[:, None]], dim=1)
        check(weights, blocks, amax=2688.0)  # a global scale of one: the block's scale is exactly this one


def test_the_largest_magnitude(weights: WeightKernels) -> None:
    for count in (1, 15, 16, 31, 33, 1000):
        values = torch.randn(count)
        for cast in (values, values.bfloat16()):
            assert amax_of(weights, cast) == float(cast.float().abs().max())
            cast[count // 2] = float("-inf")
            assert amax_of(weights, cast) == math.inf
            cast[count - 1] = float("nan")
            assert math.isnan(amax_of(weights, cast))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_fp8_blocks_and_rows(dtype: torch.dtype, weights: WeightKernels) -> None:
    torch.manual_seed(1)
    for shape in ((128, 256), (130, 200), (7, 9)):
        values = (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(dtype)
        values[:, : shape[1] // 2][: shape[0] // 2] = 0.0
        codes = torch.zeros(shape, dtype=torch.uint8)
        blocks = quantize_fp8_blocks(values)
        scale = torch.zeros(blocks[1].shape)
        address = values.data_ptr(), DTYPES[dtype], shape
        weights.quantize_fp8(*address, (128, 128), codes.data_ptr(), scale.data_ptr())
        assert torch.equal(scale, blocks[1]) and torch.equal(codes, blocks[0].view(torch.uint8))
        rows = quantize_fp8(values, "row", "modelopt")
        scale = torch.zeros(shape[0])
        weights.quantize_fp8(*address, (1, shape[1]), codes.data_ptr(), scale.data_ptr())
        assert torch.equal(scale, rows[1].flatten()) and torch.equal(codes, rows[0].view(torch.uint8))


def test_every_fp8_code_under_many_scales(weights: WeightKernels) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[0x7F], codes[0xFF] = 0, 0
    scales = torch.cat([torch.tensor([0.0, 1.0, 2.0**-120, 3e-39, 1e35]), torch.rand(59) * 1e-2])
    matrix = codes.repeat(64, 2)[:, : 256 + 40].contiguous()  # one row of blocks for each scale, a last one of 40
    grid = torch.stack([scales, scales.flip(0), scales * 0.5], dim=1).contiguous()
    out = torch.zeros(matrix.shape, dtype=torch.bfloat16)
    where = matrix.data_ptr(), grid.data_ptr(), range(64), 296, (1, 128), out.data_ptr()
    assert weights.dequantize_fp8(*where)
    expected = dequantize_fp8_blocks(matrix.view(torch.float8_e4m3fn), grid, (1, 128), dtype=torch.bfloat16)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
    matrix[5, 290] = 0xFF
    assert not weights.dequantize_fp8(*where)
    matrix[5, 290], grid[5, 2] = 0x7E, 3e38
    assert not weights.dequantize_fp8(*where)  # beyond bfloat16


def test_scales_are_widened(weights: WeightKernels) -> None:
    for dtype in ("F32", "BF16", "F8_E8M0"):
        bits = torch.arange(255, dtype=torch.uint8)
        stored = bits.view(torch.float8_e8m0fnu) if dtype == "F8_E8M0" else torch.rand(255).to(STORED_DTYPES[dtype])
        found = array("f", bytes(4 * 255))
        assert weights.widen_scales(stored.data_ptr(), dtype, 255, found.buffer_info()[0])
        assert torch.equal(torch.frombuffer(found, dtype=torch.float32), stored.float())
        stored.view(torch.uint8)[-1] = 0xFF  # negative, or E8M0's NaN
        assert not weights.widen_scales(stored.data_ptr(), dtype, 255, found.buffer_info()[0])


def test_a_buffer_grows_and_keeps_its_place() -> None:
    buffer = Buffer()
    first = buffer.view(100)
    first[:3] = b"abc"
    address = buffer.address
    assert bytes(buffer.view(50)[:3]) == b"abc" and buffer.address == address
    assert len(buffer.view(10 << 20)) == 10 << 20 and buffer.address % 4096 == 0


def test_the_global_scale_is_the_formula(weights: WeightKernels) -> None:
    for amax in (0.0, 1e-44, 3e-36, 0.1, 1.0, 448.0 * 6, 3e38):
        value = float(torch.tensor(amax))
        assert weights.global_scale("F32", "max", value) == float(nvfp4_global_scale(torch.tensor(amax)))
        four = float(nvfp4_global_scale(torch.tensor(amax), scale_max=256.0))
        assert weights.global_scale("F32", "four_over_six", value) == four
