"""Products with packed weights: what the codes are worth to the bit, the product, and a token alone or among others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tafkir.errors import CheckpointError
from tafkir.ops import native
from tafkir.ops.fp8 import quantize_fp8, quantize_fp8_blocks
from tafkir.ops.integers import quantize_int8
from tafkir.ops.nvfp4 import quantize_nvfp4
from tafkir.ops.packed import (
    FEW_ROWS,
    PackedMatrix,
    packed_linear,
    packed_linear_reference,
    packed_values,
    packed_values_reference,
)


@pytest.fixture(autouse=True)
def native_kernels(native_library: object) -> Iterator[None]:
    before = native.kernels_in_use()
    native.select_kernels("native")
    yield
    native.call("tafkir_use_tiles", 1)
    native.set_matmul_precision("highest")
    native.select_kernels(before)


def matrices(rows: int, columns: int) -> dict[str, PackedMatrix]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    int8, int8_scale = quantize_int8(weight)
    channel, channel_scale = quantize_fp8(weight, "row")
    blocks, block_scale = quantize_fp8_blocks(weight)
    codes, scale, total = quantize_nvfp4(weight)
    return {
        "float32": PackedMatrix("float32", weight),
        "bfloat16": PackedMatrix("bfloat16", weight.bfloat16()),
        "int8": PackedMatrix("int8", int8, int8_scale.float(), tile=(1, columns)),
        "fp8_channel": PackedMatrix("fp8", channel, channel_scale.float().reshape(-1, 1), tile=(1, columns)),
        "fp8_block": PackedMatrix("fp8", blocks, block_scale, tile=(128, 128)),
        "nvfp4": PackedMatrix("nvfp4", codes, scale, float(total)),
        "nvfp4_inverse": PackedMatrix("nvfp4_inverse", codes, scale, 1 / float(total)),
    }


@pytest.mark.parametrize("name", matrices(16, 16))
def test_product_equals_the_reference_and_a_token_alone_does_not_see_the_others(name: str) -> None:
    # Neither rows nor columns fill the last panel, block or vector; then columns that they fill.
    for rows, columns in ((40, 48), (150, 272), (33, 256)):
        matrix = matrices(rows, columns)[name]
        assert torch.equal(packed_values(matrix), packed_values_reference(matrix))
        x = torch.randn(FEW_ROWS + 1, columns, generator=torch.Generator().manual_seed(1))
        expected = packed_linear_reference(x, [matrix, matrix])
        close = {"rtol": 1e-5, "atol": 3e-6 * float(expected.abs().max())}
        for tiles in (0, 1):  # without the processor's matrix unit, and with it where there is one
            native.call("tafkir_use_tiles", tiles)
            for count in (1, 2, 3, 8, 17, FEW_ROWS, FEW_ROWS + 1):
                torch.testing.assert_close(packed_linear(x[:count], [matrix, matrix]), expected[:count], **close)
        with native.rows_alone():
            found = packed_linear(x, [matrix, matrix])
            torch.testing.assert_close(found, expected, **close)
            for count in (1, 2, 3, 5, 8, 17):
                assert torch.equal(packed_linear(x[:count], [matrix, matrix]), found[:count])


@pytest.mark.parametrize("name", ["bfloat16", "int8", "fp8_block", "nvfp4"])
def test_lower_precision_rounds_activations_and_nothing_else(name: str) -> None:
    if not native.has_tiles():
        pytest.skip("needs a processor with AMX")
    matrix = matrices(33, 256)[name]
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    whole = x.bfloat16().float()
    for precision, seen in (("medium", whole), ("high", whole + (x - whole).bfloat16().float()), ("highest", x)):
        native.set_matmul_precision(precision)
        expected = packed_linear_reference(seen, [matrix])
        close = {"rtol": 1e-5, "atol": 3e-6 * float(expected.abs().max())}
        torch.testing.assert_close(packed_linear(x, [matrix]), expected, **close)
        many = packed_linear(x.repeat(2, 1), [matrix])  # bfloat16 comes back from oneDNN
        rounding = 2**-8 * float(expected.abs().max()) if name == "bfloat16" and precision == "medium" else 0.0
        torch.testing.assert_close(many[:40], expected, rtol=1e-5, atol=close["atol"] + rounding)
        with native.rows_alone():
            torch.testing.assert_close(packed_linear(x, [matrix]), packed_linear_reference(x, [matrix]), **close)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_one_token_is_as_precise_as_float32_whatever_its_range(name: str) -> None:
    matrix = matrices(33, 256)[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 256, generator=generator) * 10 ** (10 * torch.rand(1, 256, generator=generator) - 6)
    weight, found = packed_values(matrix).double(), packed_linear(x, [matrix])
    # Eight columns share what they are rounded to.
    size = weight.abs() @ x.double().view(-1, 8).abs().amax(1).repeat_interleave(8)
    assert ((found[0].double() - weight @ x[0].double()).abs() < 4e-7 * size).all()
    whole = torch.randint(-200, 200, (1, 256), generator=generator).float()
    torch.testing.assert_close(
        packed_linear(whole, [matrix])[0], (weight @ whole[0].double()).float(), rtol=1e-6, atol=1e-4
    )
    for odd in (torch.inf, torch.nan):
        x[0, 7] = odd
        assert not packed_linear(x, [matrix]).isfinite().any()


def test_small_whole_numbers_are_exact() -> None:
    x = torch.randint(-4, 5, (7, 64), generator=torch.Generator().manual_seed(2)).float()
    for name, matrix in matrices(33, 64).items():
        if matrix.scales is not None:  # scales of one: every product and sum is a whole number, or half of one
            tile = matrix.scales.new_ones(matrix.scales.shape) if matrix.format in ("int8", "fp8") else None
            ones = torch.ones(matrix.scales.shape).to(torch.float8_e4m3fn) if tile is None else tile
            codes = matrix.codes if matrix.format != "fp8" else matrix.codes.float().round().to(torch.float8_e4m3fn)
            matrix = PackedMatrix(matrix.format, codes, ones, 1.0, matrix.tile)
            assert torch.equal(packed_linear(x, [matrix]), packed_linear_reference(x, [matrix])), name


def test_what_the_kernels_cannot_read_is_refused() -> None:
    with pytest.raises(CheckpointError, match="multiple of 16"):
        PackedMatrix("float32", torch.zeros(4, 24))
    with pytest.raises(CheckpointError, match="scales are"):
        PackedMatrix("int8", torch.zeros(4, 32, dtype=torch.int8), torch.ones(4), tile=(1, 32))
