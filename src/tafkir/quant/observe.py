"""What a calibration keeps of a matrix's inputs: ranges, a histogram of block maxima, second moments.

Shapes: N tokens, K columns, B = K / 16 blocks, the last one filled up with zeros.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import BLOCK_SIZE
from tafkir.quant.hessian import block_moments
from tafkir.recipe.quantize import CalibrationConfig

__all__ = ["HEADROOM", "InputStatistics", "Moment", "covered_range", "histogram_quantile"]

Moment = Literal["none", "blocks", "full"]

HEADROOM = 16384.0
"""Times the smallest percentile of block maxima: then even those blocks' scales keep E4M3's full precision, for 448 /
16384 is above its smallest normal number (ModelOpt's `nvfp4_act_headroom`)."""

_SHIFT = 15  # bits of a float32 that a bin does not tell apart: bins are 0.4 % wide
_NUM_BINS = 1 << (31 - _SHIFT)


class InputStatistics:
    """Collected over batches of inputs [N, K].

    Attributes:
        tokens: how many inputs.
        block_amax: largest magnitude in each block of columns, float32 [B].
        histogram: how many blocks of 16 activations have which maximum, int64; None where it is not kept.
        squares: sum of squares of each column, float64 [K].
        moment: sum of x x^T, float32: [K, K] ("full"), [B, 16, 16] ("blocks"), or None.
    """

    def __init__(self, width: int, moment: Moment = "none", *, histogram: bool = True) -> None:
        blocks = -(-width // BLOCK_SIZE)
        self.width, self.kind, self.tokens = width, moment, 0
        self.block_amax = torch.zeros(blocks)
        self.histogram = torch.zeros(_NUM_BINS, dtype=torch.int64) if histogram else None
        self.squares = torch.zeros(width, dtype=torch.float64)
        shapes = {"full": (width, width), "blocks": (blocks, BLOCK_SIZE, BLOCK_SIZE)}
        self.moment = torch.zeros(shapes[moment]) if moment in shapes else None

    @property
    def amax(self) -> float:
        """Largest magnitude of all."""
        return float(self.block_amax.max())

    def add(self, x_NK: Tensor) -> None:
        """Take in a batch of inputs.

        Raises:
            CheckpointError: they are not finite.
        """
        if not len(x_NK):
            return
        x_NK = x_NK.float()
        self.tokens += len(x_NK)
        padded = F.pad(x_NK, (0, -self.width % BLOCK_SIZE))
        largest_NB = padded.abs().view(len(x_NK), -1, BLOCK_SIZE).amax(-1)
        if not largest_NB.isfinite().all():
            raise CheckpointError("activations are not finite", fix="calibrate on other text, or look at the weights")
        torch.maximum(self.block_amax, largest_NB.amax(0), out=self.block_amax)
        if self.histogram is not None:
            bins = largest_NB.contiguous().view(torch.int32).flatten() >> _SHIFT
            self.histogram += torch.bincount(bins, minlength=_NUM_BINS)
        self.squares += x_NK.square().sum(0, dtype=torch.float64)
        if self.moment is not None:
            self.moment += x_NK.T @ x_NK if self.kind == "full" else block_moments(padded)


def histogram_quantile(histogram: Tensor, share: float) -> float:
    """The value below or at which this share of the block maxima lies: the upper end of its bin.

    Args:
        histogram: int64 [bins], not all zero.
        share: 0 to 1.
    """
    reached = histogram.cumsum(0)
    wanted = max(1, math.ceil(share * int(reached[-1]) - 1e-9))
    found = int(torch.searchsorted(reached, torch.tensor(wanted)))
    if found == 0:
        return 0.0
    return float(torch.tensor([((found + 1) << _SHIFT) - 1], dtype=torch.int32).view(torch.float32))


def covered_range(histogram: Tensor, amax: float, config: CalibrationConfig) -> float:
    """The magnitude up to which the scale of activations reaches; what is larger saturates.

    Args:
        histogram: of block maxima.
        amax: largest magnitude.
        config: `ranges` max: amax. percentile: that of block maxima. headroom: max(16384 x p1, p99.99), by which the
            smallest blocks keep their precision and rare outliers do not cost everyone else's.
    """
    if config.ranges == "max":
        return amax
    if config.ranges == "percentile":
        return min(amax, histogram_quantile(histogram, config.percentile / 100))
    top = min(amax, histogram_quantile(histogram, 0.9999))
    return max(HEADROOM * histogram_quantile(histogram, 0.01), top)
