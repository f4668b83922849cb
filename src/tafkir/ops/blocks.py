"""How many weights share a scale in each number format, and the shapes that follow; without torch."""

from __future__ import annotations

import math

from tafkir.errors import CheckpointError

__all__ = ["FP8_BLOCK_SIZE", "INT4_GROUP_SIZE", "MX_BLOCK_SIZE", "NVFP4_BLOCK_SIZE", "fp8_scale_shape"]

NVFP4_BLOCK_SIZE = 16
MX_BLOCK_SIZE = 32
INT4_GROUP_SIZE = 128
FP8_BLOCK_SIZE = (128, 128)


def fp8_scale_shape(shape: tuple[int, ...], block_size: tuple[int, int] = FP8_BLOCK_SIZE) -> tuple[int, ...]:
    """[..., R, C]: the shape of the scales of a weight [..., M, N].

    Raises:
        CheckpointError: the weight has fewer than two dims, or a block is empty.
    """
    if len(shape) < 2:
        raise CheckpointError(f"a tensor of shape {list(shape)} has no blocks", expected="two dims or more")
    if min(block_size) < 1:
        raise CheckpointError(f"the block size is {list(block_size)}", expected="two positive numbers")
    return (*shape[:-2], math.ceil(shape[-2] / block_size[0]), math.ceil(shape[-1] / block_size[1]))
