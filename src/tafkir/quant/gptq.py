"""GPTQ for NVFP4 (arXiv 2210.17323): columns are rounded one after the other, each error fed to those still to come.

Block scales are chosen before and stay (static), so the result is an ordinary NVFP4 weight.

Shapes: N rows, K columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import BLOCK_SIZE, E2M1_MAX, Nvfp4, dequantize_nvfp4, encode_nvfp4, nvfp4_step

__all__ = ["DEFAULT_DAMPING", "gptq_nvfp4", "input_order", "inverse_factor", "output_error"]

DEFAULT_DAMPING = 0.01
_LAZY = 128  # columns between two updates of all that follow


def inverse_factor(hessian_KK: Tensor, damping: float = DEFAULT_DAMPING) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping x mean(diag H) x I)^-1: float32 [K, K].

    Columns that no input reached have H = 1 there, so that they are rounded to the nearest.

    Args:
        hessian_KK: sum or mean of x x^T.
        damping: share of the mean diagonal that is added.

    Raises:
        CheckpointError: H is not finite, or not positive definite even with the damping.
    """
    hessian = hessian_KK.double()
    diagonal = hessian.diagonal()
    unseen = diagonal <= 0
    shift = damping * diagonal.mean()
    hessian = hessian + torch.diag(torch.where(unseen, torch.ones_like(diagonal), shift.expand_as(diagonal)))
    if not hessian.isfinite().all():
        raise CheckpointError("second moments of inputs are not finite", fix="calibrate on other text")
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise CheckpointError(
            "the second moments of inputs are not positive definite",
            expected="more tokens, or more damping",
            fix=f"set calibration.damping above {damping:g}",
        )
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float()


def gptq_nvfp4(
    weight: Tensor,
    chosen: Nvfp4,
    hessian_KK: Tensor,
    *,
    factor_KK: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
    act_order: bool = False,
) -> Nvfp4:
    """The codes of least output error that one pass of GPTQ finds, under given scales.

    Rows do not influence each other. A row whose output error on H would be larger than that of rounding to the
    nearest keeps the nearest codes, so that the result is never worse on what it was calibrated on.

    Args:
        weight: [N, K], any floating dtype.
        chosen: the nearest codes under the scales that are to be used.
        hessian_KK: sum or mean of x x^T over the inputs.
        factor_KK: `inverse_factor` of it, permuted where `act_order`, where several weights share it.
        damping: see `inverse_factor`.
        act_order: round the columns with the largest inputs first.
    """
    order = input_order(hessian_KK) if act_order else None
    if factor_KK is None:
        ordered = hessian_KK if order is None else hessian_KK[order][:, order]
        factor_KK = inverse_factor(ordered, damping)
    original = weight.float()
    steps = nvfp4_step(chosen.scale, chosen.global_scale).repeat_interleave(BLOCK_SIZE, dim=1)
    if order is None:
        adjusted = _round_columns(original, steps, factor_KK)
    else:
        adjusted = torch.empty_like(original)
        adjusted[:, order] = _round_columns(original[:, order], steps[:, order], factor_KK)
    packed = encode_nvfp4(adjusted, chosen.scale, chosen.global_scale)
    errors = [
        output_error(original, dequantize_nvfp4(codes, chosen.scale, chosen.global_scale), hessian_KK)
        for codes in (chosen.packed, packed)
    ]
    better = (errors[1] < errors[0])[:, None]
    return Nvfp4(torch.where(better, packed, chosen.packed), chosen.scale, chosen.global_scale)


def input_order(hessian_KK: Tensor) -> Tensor:
    """Columns by falling second moment, int64 [K]; equal ones in their own order."""
    return torch.sort(hessian_KK.diagonal(), descending=True, stable=True).indices


def _round_columns(weight_NK: Tensor, steps_NK: Tensor, factor_KK: Tensor) -> Tensor:
    """What every weight was when its turn came: its nearest code is GPTQ's.

    In numpy, whose calls cost less on single columns, and with columns as rows, so that each lies in one piece.
    """
    weight_KN = weight_NK.T.contiguous()
    rows, steps, factor = weight_KN.numpy(), steps_NK.T.contiguous().numpy(), factor_KK.numpy()
    for start in range(0, len(rows), _LAZY):
        stop = min(start + _LAZY, len(rows))
        block, errors = rows[start:stop], np.empty_like(rows[start:stop])
        for j, k in enumerate(range(start, stop)):
            error = block[j] - _nearest(block[j] / steps[k]) * steps[k]
            np.divide(error, factor[k, k], out=errors[j])
            block[j + 1 :] -= factor[k, k + 1 : stop, None] * errors[j]
        weight_KN[stop:].addmm_(factor_KK[start:stop, stop:].T, torch.from_numpy(errors), alpha=-1.0)
    return weight_KN.T.contiguous()


def _nearest(ratio: NDArray[np.float32]) -> NDArray[np.float32]:
    """`nearest_e2m1` on numbers of numpy."""
    size = np.minimum(np.abs(ratio), np.float32(E2M1_MAX))
    spacing = np.float32(0.5) + np.float32(0.5) * (size >= 2.0) + (size >= 4.0)
    rounded: NDArray[np.float32] = np.copysign(np.rint(size / spacing) * spacing, ratio)
    return rounded


def output_error(weight: Tensor, quantized: Tensor, hessian_KK: Tensor) -> Tensor:
    """dw^T H dw of each row, float32 [N]: the summed (or mean) squared error of its output."""
    error = weight.float() - quantized.float()
    return ((error @ hessian_KK.float()) * error).sum(1)
