"""Four-bit products: the layout of scales by its formula, and what reaches torch's product, which no processor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.ops.nvfp4 import E2M1_VALUES, quantize_nvfp4
from tafkir.ops.nvfp4_rows import Nvfp4Rows, nvfp4_rows
from tafkir.ops.nvfp4_scaled import (
    require_scaled_products,
    scaled_linear,
    scaled_linear_reference,
    scaled_weight,
    swizzle_scales,
)
from tafkir.ops.packed import PackedMatrix


def weight_rows(rows: int, columns: int) -> Nvfp4Rows:
    codes, scale, total = quantize_nvfp4(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    return nvfp4_rows([PackedMatrix("nvfp4", codes, scale, float(total))])


def place(row: int, block: int, blocks: int) -> int:
    """Where the scale of a block stands, as cuBLAS documents it."""
    tile = row // 128 * -(-blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """`torch._scaled_mm` of four-bit numbers under scales of blocks of 16, one scale looked up after the other."""
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    sides = []
    for codes, scales in ((a, scale_a), (b.t(), scale_b)):
        byte = codes.contiguous().view(torch.uint8).long()
        values = torch.stack([signed[byte % 16], signed[byte // 16]], dim=-1).flatten(1)
        blocks = values.shape[1] // 16
        found = [[float(scales[place(row, i, blocks)].float()) for i in range(blocks)] for row in range(len(values))]
        sides.append(values * torch.tensor(found).repeat_interleave(16, dim=1))
    return (sides[0] @ sides[1].T).to(out_dtype)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (130, 5), (300, 12)])
def test_scales_stand_where_the_tensor_units_look_for_them(rows: int, blocks: int) -> None:
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    flat = swizzle_scales(scales)
    assert len(flat) == -(-rows // 128) * 128 * -(-blocks // 4) * 4
    assert all(flat[place(r, i, blocks)] == scales[r, i] for r in range(rows) for i in range(blocks))
    assert int((flat != 0).sum()) == scales.numel()


def test_products_through_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a product that looks every scale up by the formula; two tokens of very different size keep their digits."""
    monkeypatch.setattr(torch, "_scaled_mm", product)
    weight = weight_rows(144, 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-4], [50.0]])
    found, expected = scaled_linear(x, scaled_weight(weight)), scaled_linear_reference(x, weight)
    assert ((found - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()
    exact = torch.nn.functional.linear(x, scaled_linear_reference(torch.eye(96), weight).T)
    assert ((found - exact).abs().amax(1) <= 0.15 * exact.abs().amax(1)).all()


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="multiples of 16 rows"):
        scaled_weight(weight_rows(24, 48))
    with pytest.raises(BackendUnavailable, match="a CUDA device"):
        require_scaled_products(torch.device("cpu"))
    patches: dict[str, Any] = {"get_device_capability": lambda _: (9, 0), "get_device_name": lambda _: "NVIDIA H100"}
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BackendUnavailable, match=r"H100 \(sm_90\) has no NVFP4 products; expected Blackwell"):
        require_scaled_products(torch.device("cuda"))
