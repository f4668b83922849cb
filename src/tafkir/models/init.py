"""Fresh weights: normal matrices, norms of one, zero biases, all from one generator."""

from __future__ import annotations

import torch

from tafkir.models.decoder import Decoder
from tafkir.models.layers import FreshWeights
from tafkir.models.mtp import MultiTokenPredictor
from tafkir.models.residual import ResidualStream

__all__ = ["init_weights"]


@torch.no_grad()
def init_weights(decoder: Decoder | MultiTokenPredictor, generator: torch.Generator) -> None:
    """Fill every parameter and buffer in place; the same generator state gives the same bits.

    Modules that are `FreshWeights` fill their own; what the others hold is normal(0, initializer_range).
    Residual maps come last, so that models that differ in their residual alone share all other weights.
    """
    std = decoder.config.initializer_range
    # Modules come in the order of `decoder.parameters()`, which fixes what each draw goes to.
    residuals = []
    for module in decoder.modules():
        if isinstance(module, ResidualStream):
            residuals.append(module)
        elif isinstance(module, FreshWeights):
            module.fresh_weights(std, generator)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0.0, std, generator=generator)
    for residual in residuals:
        residual.fresh_weights(std, generator)
