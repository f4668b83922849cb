"""Products of NVFP4 with NVFP4 by the tensor units of Blackwell, through torch's own `_scaled_mm` (cuBLAS).

Activations are rounded to NVFP4, too: other numbers than weight-only kernels give. Shapes: N tokens, K columns, M rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.ops.nvfp4 import block_amax, encode_nvfp4, nvfp4_amax, nvfp4_block_scale, nvfp4_global_scale
from tafkir.ops.nvfp4_rows import Nvfp4Rows, rows_values

__all__ = [
    "ScaledWeight",
    "require_scaled_products",
    "scaled_linear",
    "scaled_linear_reference",
    "scaled_weight",
    "swizzle_scales",
]

_FIRST_CAPABILITY = 10  # sm_100
_TILE_ROWS, _TILE_COLUMNS = 128, 4


class ScaledWeight(NamedTuple):
    """A matrix [M, K] as `_scaled_mm` reads it.

    Attributes:
        codes: uint8 [M, K / 2].
        scales: float8_e4m3fn, swizzled, flat.
        totals: float32 [M].
    """

    codes: Tensor
    scales: Tensor
    totals: Tensor


def require_scaled_products(device: torch.device) -> None:
    """Raises BackendUnavailable where the device, or torch, has no products of four-bit numbers."""
    fix = "leave activations in bfloat16: weights stay in NVFP4 all the same"
    if device.type != "cuda" or torch.version.cuda is None:
        raise BackendUnavailable(f"{device.type} has no NVFP4 products", expected="a CUDA device", fix=fix)
    major, minor = torch.cuda.get_device_capability(device)
    if major < _FIRST_CAPABILITY:
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no NVFP4 products",
            expected=f"Blackwell, sm_{_FIRST_CAPABILITY}0 or newer",
            fix=fix,
        )


def swizzle_scales(scales: Tensor) -> Tensor:
    """Block scales in the order that the tensor units read them, flat (cuBLAS, "1D block scaling factors layout").

    Tiles of 128 rows x 4 blocks, row-major; in a tile, row r and block b stand at (r % 32) * 16 + (r // 32) * 4 + b.

    Args:
        scales: [M, K / 16], one byte each; filled up with zeros to whole tiles.
    """
    rows, columns = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -columns % _TILE_COLUMNS, 0, -rows % _TILE_ROWS))
    tiles = padded.view(-1, _TILE_ROWS // 32, 32, padded.shape[1] // _TILE_COLUMNS, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def scaled_weight(weight: Nvfp4Rows) -> ScaledWeight:
    """Raises CheckpointError where the units cannot read it: M % 16 or K % 32 is not 0."""
    rows, half = weight.codes.shape
    if rows % 16 or half % 16:
        raise CheckpointError(f"a matrix of {rows} x {2 * half}", expected="multiples of 16 rows and of 32 columns")
    return ScaledWeight(weight.codes, swizzle_scales(weight.scales.view(torch.float8_e4m3fn)), weight.totals)


def _rounded(x_NK: Tensor) -> Nvfp4Rows:
    """Tokens in NVFP4, each under a second scale of its own, so that none depends on its company."""
    totals_N = nvfp4_global_scale(nvfp4_amax(x_NK, lead=1))
    scales = nvfp4_block_scale(block_amax(x_NK), totals_N)
    return Nvfp4Rows(encode_nvfp4(x_NK, scales, totals_N), scales.view(torch.uint8), totals_N)


def scaled_linear(x_NK: Tensor, weight: ScaledWeight) -> Tensor:
    """x W^T of rounded tokens, [N, M] in x's dtype; needs what `require_scaled_products` asks for."""
    x = _rounded(x_NK)
    four = torch.float4_e2m1fn_x2
    scales = swizzle_scales(x.scales.view(torch.float8_e4m3fn))
    out_NM = torch._scaled_mm(
        x.codes.view(four), weight.codes.view(four).t(), scales, weight.scales, out_dtype=torch.bfloat16
    )
    return (out_NM.float() * weight.totals * x.totals.unsqueeze(1)).to(x_NK.dtype)


def scaled_linear_reference(x_NK: Tensor, weight: Nvfp4Rows) -> Tensor:
    """The same on any device: round the tokens, expand both, multiply in float32."""
    return F.linear(rows_values(_rounded(x_NK)), rows_values(weight)).to(x_NK.dtype)
