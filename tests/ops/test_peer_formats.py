"""Our codes and scales against those that ModelOpt and compressed-tensors computed (`tools/write_peer_formats.py`)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.ops.fp8 import quantize_fp8
from tafkir.ops.integers import quantize_int4, quantize_int8
from tafkir.ops.mxfp import quantize_mxfp4, quantize_mxfp8
from tafkir.ops.nvfp4 import block_amax, quantize_nvfp4
from tafkir.ops.nvfp4_scales import quantize_nvfp4_inverse, quantize_nvfp4_static

PEERS = json.loads((Path(__file__).parent / "peer_formats.json").read_text(encoding="utf-8"))


def tensor(stored: dict[str, Any]) -> Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(stored["bytes"])), dtype=torch.uint8)
    return raw.view(getattr(torch, stored["dtype"])).view(stored["shape"])


def bits(found: Tensor) -> list[int]:
    return found.contiguous().flatten().view(torch.uint8).tolist()


def assert_same(found: tuple[Tensor, ...], expected: list[dict[str, Any]], what: str) -> None:
    for index, (mine, theirs) in enumerate(zip(found, map(tensor, expected), strict=True)):
        assert bits(mine) == bits(theirs.to(mine.dtype)), f"{what}: part {index}"


CASES = [pytest.param(case, id=f"{case['name']} {case['values']['dtype']}") for case in PEERS["cases"]]


@pytest.mark.parametrize("case", CASES)
def test_modelopt_bit_for_bit(case: dict[str, Any], kernels: str) -> None:
    values, theirs = tensor(case["values"]), case["modelopt"]
    assert_same(quantize_nvfp4(values), theirs["nvfp4"], "nvfp4")
    amax = block_amax(values)
    for name, limit, factor in (("static", 448.0, 0.75), ("four over six", 256.0, 1.5)):
        found = quantize_nvfp4_static(values, amax * factor, amax.max(), scale_max=limit)
        assert_same(found, theirs[name], name)
    assert_same(quantize_mxfp4(values, "modelopt"), theirs["mxfp4"], "mxfp4")
    assert_same(quantize_mxfp8(values, "modelopt"), theirs["mxfp8"], "mxfp8")
    assert_same(quantize_fp8(values, "tensor"), theirs["fp8 tensor"], "fp8 tensor")
    assert_same(quantize_fp8(values, "row"), theirs["fp8 row"], "fp8 row")


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_bit_for_bit(case: dict[str, Any], kernels: str) -> None:
    values, theirs = tensor(case["values"]), case["compressed-tensors"]
    assert_same(quantize_nvfp4_inverse(values), theirs["nvfp4"], "nvfp4")
    if not (values.dtype == torch.float16 and case["name"] == "zeros in it"):
        # 2^-127, the scale of a block of zeros, is 0 in float16, and becomes 1 there; the values are the same.
        assert_same(quantize_mxfp4(values), theirs["mxfp4"], "mxfp4")
        assert_same(quantize_mxfp8(values), theirs["mxfp8"], "mxfp8")
    assert_same(quantize_fp8(values, "row", "compressed-tensors"), theirs["fp8 row"], "fp8 row")
    assert_same(quantize_int8(values), theirs["int8"], "int8")
    assert_same(quantize_int4(values), theirs["int4"], "int4")


def test_both_conventions_differ_for_bfloat16_alone() -> None:
    wide = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    same = [bits(quantize_nvfp4(w)[0]) == bits(quantize_nvfp4_inverse(w)[0]) for w in (wide, wide.bfloat16())]
    assert same == [True, False]


def test_where_a_peer_is_wrong_ours_is_finite() -> None:
    # compressed-tensors: 2688 / amax overflows float16 below 0.041, its global scale becomes 1, and weights are lost.
    small = (torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 0.005).half()
    packed, _, total = quantize_nvfp4_inverse(small)
    assert torch.isfinite(total) and total > 2688 / 0.041 and (packed != 0).float().mean() > 0.9
    # ModelOpt: a tensor of zeros gets NaN for scales.
    for found in (quantize_nvfp4_inverse(torch.zeros(2, 32)), quantize_nvfp4(torch.zeros(2, 32))):
        assert not found.packed.any() and torch.isfinite(found.scale.float()).all() and found.global_scale == 1
