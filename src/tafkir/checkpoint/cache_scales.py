"""Scales of a key-value cache that a checkpoint brings along: their names in both layouts, and what they are.

Without torch. ModelOpt writes `ATTENTION.k_proj.k_scale` (float32, a number), compressed-tensors `ATTENTION.k_scale`
(one number in the weights' dtype). Either is the largest magnitude over 448, for FP8 and for NVFP4; where the cache
holds MLA's latents, both are theirs. Without any of them engines take one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from tafkir.checkpoint.files import StoredFiles, open_files, read_json
from tafkir.checkpoint.quantized import packed_method
from tafkir.errors import CheckpointError

__all__ = ["CACHE_SCALE", "cache_scale_name", "find_cache_scales", "read_cache_scales"]

CACHE_SCALE = re.compile(r"(?P<attention>.*\blayers\.(?P<layer>\d+)\..+?)(?:\.[kv]_proj)?\.(?P<part>[kv])_scale")
_AGAIN = "quantize the checkpoint again, with --calibrate, or without scales of the cache"


def cache_scale_name(attention: str, part: Literal["k", "v"], layout: str) -> str:
    """What a layout calls the scale of keys or values of an attention, such as `model.layers.0.self_attn`."""
    return f"{attention}.{part}_proj.{part}_scale" if layout == "modelopt" else f"{attention}.{part}_scale"


def find_cache_scales(files: StoredFiles) -> dict[int, tuple[float, float]]:
    """Scale of keys and of values of each layer that has them, in the layers' order.

    Raises:
        CheckpointError: one of the two is missing, or a scale is not above zero and finite.
    """
    found: dict[int, dict[str, float]] = {}
    for name in files.tensors:
        said = CACHE_SCALE.fullmatch(name)
        if said is None:
            continue
        number = files.read_number(name)
        if not 0 < number < float("inf"):
            raise CheckpointError(
                f"the scale of the cache is {number}", where=f"{files.tensors[name].file}: {name}", fix=_AGAIN
            )
        found.setdefault(int(said["layer"]), {})[said["part"]] = number
    for layer, pair in found.items():
        if pair.keys() != {"k", "v"}:
            missing = "v" if "k" in pair else "k"
            raise CheckpointError(
                f"layer {layer} has a scale of the cache, but no {missing}_scale", where=str(files.listing), fix=_AGAIN
            )
    return {layer: (found[layer]["k"], found[layer]["v"]) for layer in sorted(found)}


def read_cache_scales(path: Path, num_layers: int) -> list[tuple[float, float]] | None:
    """Scales of keys and values of every decoder layer of a checkpoint folder; None where it has none.

    Raises:
        CheckpointError: as `find_cache_scales`, or only some of the layers have them.
    """
    packed = packed_method(read_json(path / "config.json"), path)
    if packed is None:
        return None
    with open_files(path, packed=packed) as files:
        scales = find_cache_scales(files)
    if not scales:
        return None
    missing = sorted(set(range(num_layers)) - scales.keys())
    if missing:
        raise CheckpointError(f"layer {missing[0]} has no scale of its cache", where=str(path), fix=_AGAIN)
    return [scales[layer] for layer in range(num_layers)]
