"""From a config to a decoder with fresh weights, and what a finished decoder can be given later."""

from __future__ import annotations

import torch

from tafkir.models.decoder import Decoder, build_mtp
from tafkir.models.init import init_weights
from tafkir.recipe.model import ModelConfig, MtpConfig, YarnConfig

__all__ = ["add_mtp", "build_decoder", "stretch_context"]


def build_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A float32 decoder on the CPU whose fresh weights are a pure function of the seed."""
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(seed))
    return decoder


def add_mtp(decoder: Decoder, shape: MtpConfig, seed: int) -> None:
    """Give a decoder fresh multi-token-prediction layers, in place; nothing else of it changes.

    Their weights are a pure function of the seed, in the dtype and on the device of the embedding table.
    """
    decoder.config = decoder.config.model_copy(update={"mtp": shape})
    mtp = build_mtp(decoder.config)
    assert mtp is not None
    init_weights(mtp, torch.Generator().manual_seed(seed))
    table = decoder.embed_tokens.weight
    biases = [(router, router.expert_bias) for router in mtp.routers]
    decoder.mtp = mtp.to(table.device, table.dtype)
    for router, bias in biases:
        if bias is not None:
            router.expert_bias = bias.to(table.device)


def stretch_context(decoder: Decoder, scaling: YarnConfig, max_position_embeddings: int) -> Decoder:
    """A decoder of the same weights, shared and not copied, whose positions turn as YaRN says.

    Args:
        scaling: its `original_max_position_embeddings` is the context that the weights were trained on.
        max_position_embeddings: the longest context from now on.
    """
    changes = {"rope_scaling": scaling, "max_position_embeddings": max_position_embeddings}
    with torch.device("meta"):
        stretched = Decoder(decoder.config.model_copy(update=changes))
    stretched.load_state_dict(decoder.state_dict(keep_vars=True), assign=True)
    return stretched
