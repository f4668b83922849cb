"""From a config to a decoder with fresh weights."""

from __future__ import annotations

import torch

from tafkir.models.decoder import Decoder
from tafkir.models.init import init_weights
from tafkir.recipe.model import ModelConfig

__all__ = ["build_decoder"]


def build_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A float32 decoder on the CPU whose fresh weights are a pure function of the seed."""
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(seed))
    return decoder
