"""Fresh weights: normal matrices, norms of one, zero expert bias, all from one generator."""

from __future__ import annotations

import torch

from tafkir.models.decoder import Decoder
from tafkir.models.layers import RMSNorm

__all__ = ["init_weights"]


@torch.no_grad()
def init_weights(decoder: Decoder, generator: torch.Generator) -> None:
    """Fill every parameter and buffer in place; the same generator state gives the same bits.

    Matrices are normal(0, initializer_range), norm weights one, expert biases zero.
    """
    norms = {id(module.weight) for module in decoder.modules() if isinstance(module, RMSNorm)}
    for parameter in decoder.parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, decoder.config.initializer_range, generator=generator)
    for router in decoder.routers:
        router.expert_bias.zero_()
