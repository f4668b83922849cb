"""Checks a quantized checkpoint before anyone is told that it is there."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.checkpoint.cache_scales import find_cache_scales
from tafkir.checkpoint.files import StoredFiles, open_files, read_json
from tafkir.checkpoint.quantized import packed_method
from tafkir.errors import CheckpointError
from tafkir.quant.layouts import excluded_modules
from tafkir.quant.policy import Decision, sibling_group
from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["check_scales", "validate_checkpoint"]

_AGAIN = "quantize the checkpoint again"


def validate_checkpoint(
    path: Path, decisions: Sequence[Decision], config: QuantizeConfig, cache_scales: Collection[str] = ()
) -> None:
    """Open what was written as a reader would, and check it against what was to be written.

    Args:
        path: the folder.
        decisions: on every weight.
        config: formats and layout.
        cache_scales: names of the scales of the cache that were to be written.

    Raises:
        CheckpointError: a weight is missing or left over, a scale is missing, zero or not finite, siblings have
            global scales of their own, a kept module is not listed, or the two config files disagree.
    """
    hf_config = read_json(path / "config.json")
    with open_files(path, packed=packed_method(hf_config, path)) as files:
        expected = {decision.name for decision in decisions}
        found = set(files.names)
        if expected != found:
            name = sorted(expected ^ found)[0]
            raise CheckpointError(
                "the weight is missing" if name in expected else "nobody asked for this weight",
                where=f"{path}: {name}",
                fix=_AGAIN,
            )
        for decision in decisions:
            if (decision.format != "keep") != (decision.name in files.encoded):
                raise CheckpointError(f"was to be {decision.format}", where=f"{path}: {decision.name}", fix=_AGAIN)
            if files.shape(decision.name) != decision.shape:
                raise CheckpointError(
                    f"shape is {list(files.shape(decision.name))}",
                    where=f"{path}: {decision.name}",
                    expected=str(list(decision.shape)),
                )
        inputs = {d.name for d in decisions if d.format == "nvfp4"}
        check_scales(files, path, inputs)
        for name in cache_scales:
            if name not in files.tensors:
                raise CheckpointError("the scale of the cache is missing", where=f"{path}: {name}", fix=_AGAIN)
    _check_configs(path, hf_config, decisions, config)


def check_scales(files: StoredFiles, path: Path, inputs: set[str]) -> None:
    """Every scale is finite and above zero; what engines read as one matrix shares its global scales; keys and values
    both have a scale of the cache, or neither has.

    Args:
        files: open.
        path: for messages.
        inputs: weights that need a scale for their inputs, too.

    Raises:
        CheckpointError: a scale is none.
    """
    find_cache_scales(files)
    shared: dict[str, tuple[str, float, float]] = {}
    for name, weight in files.encoded.items():
        for part in filter(None, (weight.scale, weight.global_scale)):
            if not _all_positive(files, part):
                raise CheckpointError("a scale is zero or not finite", where=f"{path}: {part}", fix=_AGAIN)
        if weight.global_scale is None:
            continue
        stem = name.removesuffix("weight")
        part = next(
            (f"{stem}{kind}" for kind in ("input_scale", "input_global_scale") if f"{stem}{kind}" in files.tensors), ""
        )
        if name in inputs and not part:
            raise CheckpointError("the scale of its inputs is missing", where=f"{path}: {name}", fix=_AGAIN)
        own = files.read_number(part) if part else 1.0
        if not 0 < own < float("inf"):
            raise CheckpointError("a scale is zero or not finite", where=f"{path}: {part}", fix=_AGAIN)
        key = (name, files.read_number(weight.global_scale), own)
        first = shared.setdefault(sibling_group(name), key)
        if first[1:] != key[1:]:
            raise CheckpointError(
                f"{first[0]} and this have global scales of their own, and engines take one for both",
                where=f"{path}: {name}",
                fix=_AGAIN,
            )


def _all_positive(files: StoredFiles, name: str) -> bool:
    """Whether all scales are numbers above zero, by their bits; E8M0's are above zero always, and 255 is its NaN."""
    dtype, content = files.tensors[name].dtype, files.read_bytes(name)
    if dtype in ("U8", "F8_E8M0"):
        return 0xFF not in content
    if dtype == "F8_E4M3":
        # 0 is zero, 0x7f is NaN, and what is above it, where ASCII ends, is negative.
        return 0 not in content and 0x7F not in content and content.isascii()
    bits = array("i" if dtype == "F32" else "h", content)
    return min(bits) > 0 and max(bits) < {"F32": 0x7F80_0000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]


def _check_configs(
    path: Path, hf_config: Mapping[str, Any], decisions: Sequence[Decision], config: QuantizeConfig
) -> None:
    flat = hf_config["quantization_config"]
    key = "modules_to_not_convert" if config.layout == "gpt-oss" else "ignore"
    if flat[key] != excluded_modules(decisions):
        raise CheckpointError("the list of kept modules is not complete", where=f"{path / 'config.json'}: {key}")
    if config.layout == "modelopt":
        nested = read_json(path / "hf_quant_config.json")["quantization"]
        pairs = (("exclude_modules", "ignore"), ("quant_algo", "quant_algo"), ("quantized_layers", "quantized_layers"))
        for theirs, ours in pairs:
            if nested.get(theirs) != flat.get(ours):
                raise CheckpointError(
                    f"{theirs} is not what config.json says", where=str(path / "hf_quant_config.json")
                )
