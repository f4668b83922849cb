"""What a quantized checkpoint says of itself: ModelOpt's two config files, and that of compressed-tensors.

Excluded and quantized modules are listed by their full names: wildcards and `re:` are read differently, or not at all,
by vLLM, SGLang and TensorRT-LLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tafkir
from tafkir.quant.policy import Decision
from tafkir.recipe.quantize import FormatName, QuantizeConfig

__all__ = ["compressed_tensors_config", "excluded_modules", "gpt_oss_config", "modelopt_configs"]

_MODELOPT_ALGOS: Mapping[FormatName, tuple[str, int | None]] = {
    "nvfp4": ("NVFP4", 16),
    "nvfp4_w4a16": ("W4A16_NVFP4", 16),
    "mxfp8": ("MXFP8", 32),
    "fp8": ("FP8", None),
    "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN", None),
    "fp8_block": ("FP8_PB_WO", 128),
}
_GROUPS: Mapping[FormatName, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "nvfp4_w4a16": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}
_ACTIVATIONS: Mapping[FormatName, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8_block": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "int8": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
}
_COMPRESSED_FORMATS: Mapping[FormatName, str] = {
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4_w4a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "fp8": "float-quantized",
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
}


def _modules(decisions: Sequence[Decision]) -> dict[str, FormatName]:
    """The modules that hold a matrix, and its format."""
    return {d.name.removesuffix(".weight"): d.format for d in decisions if d.name.endswith(".weight") and _matrix(d)}


def _matrix(decision: Decision) -> bool:
    return len(decision.shape) == 2


def excluded_modules(decisions: Sequence[Decision]) -> list[str]:
    """Full names of the modules whose matrix stays as it is, and of those whose stack of experts does."""
    stacks = {d.name.rpartition(".")[0] for d in decisions if d.format == "keep" and d.name.endswith("s.gate_up_proj")}
    return sorted({name for name, format in _modules(decisions).items() if format == "keep"} | stacks)


def gpt_oss_config(decisions: Sequence[Decision]) -> dict[str, Any]:
    """`quantization_config` of config.json as gpt-oss has it."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": excluded_modules(decisions)}


def modelopt_configs(decisions: Sequence[Decision], config: QuantizeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hf_quant_config.json`, and `quantization_config` of config.json; they say the same.

    Engines take the producer's name for the kind of checkpoint, so it is ModelOpt's; `written_by` says whose it is.
    """
    layers = {name: format for name, format in _modules(decisions).items() if format != "keep"}
    excluded, formats = excluded_modules(decisions), sorted(set(layers.values()))
    cache = None if config.kv_cache == "none" else config.kv_cache.upper()
    nested: dict[str, Any] = {"kv_cache_quant_algo": cache, "exclude_modules": excluded}
    flat: dict[str, Any] = {"ignore": excluded}
    if len(formats) == 1:
        algo, size = _MODELOPT_ALGOS[formats[0]]
        flat["config_groups"] = {"group_0": {**_modelopt_group(formats[0]), "targets": ["Linear"]}}
    else:
        algo, size = "MIXED_PRECISION", None
        nested["quantized_layers"] = flat["quantized_layers"] = {
            name: _layer_entry(format) for name, format in sorted({**layers, **_stacks(layers)}.items())
        }
        flat["config_groups"] = {
            f"group_{i}": {
                **_modelopt_group(format),
                "targets": sorted(name for name, its in layers.items() if its == format),
            }
            for i, format in enumerate(formats)
        }
    nested["quant_algo"] = flat["quant_algo"] = algo
    if size is not None:
        nested["group_size"] = size
    if cache:
        # An NVFP4 cache has no form of its own here, only its name; ModelOpt writes it so.
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
    producer = {"name": "modelopt", "version": "0.47.0", "written_by": f"tafkir {tafkir.__version__}"}
    return {"producer": producer, "quantization": nested}, {**flat, "producer": producer, "quant_method": "modelopt"}


def _stacks(layers: Mapping[str, FormatName]) -> dict[str, FormatName]:
    """The experts of a layer under one name, as ModelOpt has them, where all are alike; engines look for either."""
    found: dict[str, set[FormatName]] = {}
    for name, format in layers.items():
        stem, expert, _ = name.partition(".experts.")
        if expert:
            found.setdefault(f"{stem}.experts", set()).add(format)
    return {name: formats.pop() for name, formats in found.items() if len(formats) == 1}


def _layer_entry(format: FormatName) -> dict[str, Any]:
    algo, size = _MODELOPT_ALGOS[format]
    return {"quant_algo": algo} | ({"group_size": size} if size else {})


def _modelopt_group(format: FormatName) -> dict[str, Any]:
    size = _MODELOPT_ALGOS[format][1]
    weights: dict[str, Any] = {"dynamic": False, "num_bits": _GROUPS[format]["num_bits"], "type": "float"}
    if size and format != "fp8_block":
        weights["group_size"] = size
    if format == "fp8_channel":
        weights["strategy"] = "channel"
    inputs = {key: value for key, value in weights.items() if key != "strategy"}
    return {"weights": weights} if format in ("nvfp4_w4a16", "fp8_block") else {
        "input_activations": inputs, "weights": weights
    }  # fmt: skip


def compressed_tensors_config(
    decisions: Sequence[Decision], config: QuantizeConfig, *, static_inputs: bool = False
) -> dict[str, Any]:
    """`quantization_config` of config.json, with a group for each format.

    With `static_inputs`, FP8 weights under one scale have a stored scale for their inputs, too.
    """
    layers = {name: format for name, format in _modules(decisions).items() if format != "keep"}
    formats = sorted(set(layers.values()))
    groups = {}
    for i, format in enumerate(formats):
        weights = {**_GROUPS[format], "symmetric": True, "dynamic": False}
        inputs = _ACTIVATIONS.get(format)
        if format == "fp8" and static_inputs:
            inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
        if format in ("nvfp4", "nvfp4_w4a16"):
            weights["scale_dtype"] = "torch.float8_e4m3fn"
        if inputs is not None:
            inputs = {**inputs, "symmetric": True}
            if "scale_dtype" in weights:
                inputs["scale_dtype"] = weights["scale_dtype"]
        alone = len(formats) == 1
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if alone else sorted(name for name, its in layers.items() if its == format),
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": _COMPRESSED_FORMATS[format],
        }
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": _COMPRESSED_FORMATS[formats[0]] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": excluded_modules(decisions),
        "kv_cache_scheme": cache if config.kv_cache == "fp8" else None,
        "global_compression_ratio": None,
        "version": "0.19.0",
    }
