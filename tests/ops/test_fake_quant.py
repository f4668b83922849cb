"""Fake quantization in one pass: the bits of quantizing and bringing back, and gradients that go straight through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.fake_quant import round_inputs, round_matrices, round_matrices_reference
from tafkir.ops.nvfp4 import dequantize_nvfp4, encode_nvfp4, quantize_nvfp4_reference
from tafkir.ops.nvfp4_scales import ScaleSearch, search_nvfp4_reference

INPUT_AMAX = 2688.0


def matrices() -> Tensor:
    """Six of [3, 32]: Gaussian, heavy-tailed, zeros, exact ties, tiny and huge numbers."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 32, generator=generator)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -5.0, -6.0, 0.0, -0.0, 7.0, 0.1])
    mixed = torch.cat([torch.zeros(1, 32), normal[:2]])
    return torch.stack([normal, normal**5, mixed, ties.repeat(3, 2), normal * 1e-30, normal * 1e30])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("search", ["max", "four_over_six", "mse"])
def test_matrices_become_what_their_codes_are_worth(kernels: str, search: ScaleSearch, dtype: torch.dtype) -> None:
    values = torch.cat([matrices(), torch.zeros(1, 3, 32)]).to(dtype)
    found = round_matrices(values, search)
    assert found.dtype == torch.float32 and torch.equal(found, round_matrices_reference(values, search))
    for matrix, rounded in zip(values, found, strict=True):
        slow = quantize_nvfp4_reference(matrix) if search == "max" else search_nvfp4_reference(matrix, search)
        assert torch.equal(rounded, dequantize_nvfp4(*slow))
        # The very codes: what is rounded once is on the grid of its block.
        assert torch.equal(encode_nvfp4(rounded, slow.scale, slow.global_scale) & 0x77, slow.packed & 0x77)


def test_inputs_are_those_of_the_format_and_gradients_go_straight_through(kernels: str) -> None:
    x = matrices()[:4].flatten(0, 1).requires_grad_()
    y = round_inputs(x, INPUT_AMAX)
    for row, rounded in zip(x.detach(), y.detach(), strict=True):
        assert torch.equal(rounded, dequantize_nvfp4(*quantize_nvfp4_reference(row, amax=INPUT_AMAX)))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)
    with torch.no_grad():
        assert torch.equal(round_inputs(x, INPUT_AMAX), y)


def test_what_the_global_scale_cuts_off_gets_no_gradient(kernels: str) -> None:
    x = (torch.arange(1.0, 33.0) / 16).reshape(2, 16).requires_grad_()
    amax = 1.0  # the largest block scale is then 448 units, 1/6; the second block would need twice that
    y = round_inputs(x, amax)
    y.sum().backward()
    limit = 7 * 448 * (amax / 2688)
    assert x.grad is not None and torch.equal(x.grad, (x <= limit).float())
    assert 0 < int(x.grad[1].sum()) < 16 and x.grad[0].all()
    assert float(y.max()) == pytest.approx(6 * 448 * amax / 2688)


def test_numbers_that_are_not_finite_are_refused(kernels: str) -> None:
    x = torch.ones(2, 16)
    x[1, 3] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        round_inputs(x, INPUT_AMAX)
    with pytest.raises(CheckpointError, match="not finite"):
        round_matrices(x[None], "max")
    with pytest.raises(CheckpointError, match="no blocks of 16"):
        round_matrices(torch.ones(1, 2, 8), "max")
