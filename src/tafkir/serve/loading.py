"""From a checkpoint folder to an engine and to the name that clients call it by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tafkir.checkpoint.cache_scales import read_cache_scales
from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.packed import load_packed
from tafkir.engine.cache_formats import CacheFormat, factor_of_stored
from tafkir.engine.drafters import Drafter, ModelDrafter, NextnDrafter, NgramDrafter
from tafkir.engine.engine import Engine
from tafkir.engine.paged_engine import PagedEngine
from tafkir.engine.speculative import Speculation, parse_speculate
from tafkir.models.decoder import Decoder
from tafkir.models.on_device import move_to_device
from tafkir.ops.device import choose_device
from tafkir.ops.native import kernels_in_use
from tafkir.ops.nvfp4_scaled import require_scaled_products
from tafkir.recipe.bundled import find_checkpoint

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer

__all__ = ["WeightNumbers", "build_engine", "build_speculation", "name_of"]

WeightNumbers = Literal["auto", "float32", "stored", "int8-head"]
"""What weights are in memory: float32, or as the checkpoint stores them; auto: stored, where the kernels are built;
int8-head: stored, and an INT8 copy of the output head for logits, which are other numbers then."""


def build_engine(
    checkpoint: Path,
    tokenizer: Tokenizer,
    num_threads: int | None,
    *,
    max_batch: int | None = 32,
    max_context: int | None = None,
    max_cache_bytes: int | None = None,
    served: bool = False,
    kv_cache: CacheFormat = "auto",
    speculate: str | None = None,
    weights: WeightNumbers = "float32",
    paged: bool = False,
    prefix_caching: bool = True,
    batch_invariant: bool = False,
    device: str = "cpu",
    four_bit_products: bool = False,
) -> Engine:
    """Load the weights on the calling thread, which alone should run the engine afterwards.

    With `served`, inputs of matrices that are stored in NVFP4 together with them are rounded, as engines do that
    compute in four bits. `kv_cache` is the number format of the cache, under the checkpoint's own scales where it has
    them; auto takes the weights' dtype. `speculate` says what drafts tokens (`build_speculation`); None: nothing. With
    stored `weights` the engine cannot be given others, and a token's numbers differ from those in float32 in the order
    of sums alone. `paged` serves many people from one paged cache, with `prefix_caching` and `batch_invariant` as
    `PagedEngine` takes them. Another `device` than the processor serves what `models.on_device` makes of the weights:
    bfloat16 and NVFP4, or all in float32; `four_bit_products` rounds activations to NVFP4 there, too.

    Raises:
        BackendUnavailable: there is no such device here, or it has no four-bit products.
        CheckpointError: the checkpoint is missing or damaged.
        CapacityError: the sizes do not fit the model.
        RecipeError: `speculate` is not understood.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    place = choose_device(device, where="--device")
    if served:
        from tafkir.quant.served import load_served

        decoder = load_served(checkpoint)
    elif weights in ("stored", "int8-head") or (
        weights == "auto" and (place.type != "cpu" or kernels_in_use() == "native")
    ):
        decoder = load_packed(checkpoint, int8_head=weights == "int8-head").decoder
    else:
        decoder = load_checkpoint(checkpoint).decoder
    if place.type != "cpu":
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        decoder = move_to_device(decoder, place, dtype=dtype, scaled_products=four_bit_products)
    elif four_bit_products:
        require_scaled_products(place)
    options: dict[str, Any] = {
        "eos_ids": tokenizer.end_ids,
        "max_batch": max_batch or 32,
        "max_context": max_context,
        "max_cache_bytes": max_cache_bytes,
        "tokenizer": tokenizer,
        "kv_cache": kv_cache,
        "kv_scales": _cache_factors(checkpoint, decoder, kv_cache),
        "speculation": build_speculation(decoder, speculate) if speculate else None,
    }
    if paged:
        return PagedEngine(decoder, prefix_caching=prefix_caching, batch_invariant=batch_invariant, **options)
    return Engine(decoder, **options)


def _cache_factors(checkpoint: Path, decoder: Decoder, format: CacheFormat) -> list[tuple[float, float]] | None:
    """What the cache's codes are multiplied by, layer by layer, where the checkpoint says it."""
    if format == "auto":
        return None
    stored = read_cache_scales(find_checkpoint(checkpoint), decoder.config.num_hidden_layers)
    return stored and [(factor_of_stored(format, k), factor_of_stored(format, v)) for k, v in stored]


def build_speculation(decoder: Decoder, speculate: str) -> Speculation:
    """What drafts for a decoder: `ngram`, `nextn`, or a checkpoint, each with `:TOKENS` behind it or without.

    Raises:
        RecipeError: the words are not understood.
        CheckpointError: there is no such checkpoint, or it is damaged.
        CapacityError: the decoder has no MTP layers, or the draft model has another vocabulary.
    """
    name, tokens = parse_speculate(speculate)
    drafter: Drafter
    if name == "ngram":
        drafter = NgramDrafter(tokens or 5)
    elif name == "nextn":
        drafter = NextnDrafter(decoder, tokens)
    else:
        small, place = load_checkpoint(find_checkpoint(name)).decoder, decoder.embed_tokens.weight.device
        if place.type != "cpu":
            small = move_to_device(small, place)
        drafter = ModelDrafter(small, decoder.config.vocab_size, tokens or 4)
    return Speculation(drafter)


def name_of(checkpoint: Path) -> str:
    """A model name for a folder: its own name, or run and stage for a checkpoint inside a run directory."""
    path = checkpoint.resolve()
    if path.name == "checkpoint" and path.parent.parent.name == "stages":
        run, stage = path.parent.parent.parent.name, path.parent.name
        return f"{run}-{stage.partition('-')[2] or stage}"
    return path.name
