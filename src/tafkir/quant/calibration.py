"""The record of a calibration: a folder of safetensors and JSON, a pair for each layer, and what is made of it.

calibration.json        what was read, and a fingerprint of all that the record depends on
layer-00000.json        inputs of every matrix: tokens, largest magnitude; ranges of keys and values; experts
layer-00000.safetensors block maxima, mean squares, histograms; NVFP4 weights that were chosen on data
hidden-00000.safetensors  the hidden states behind the last finished layer, until all are
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tafkir.checkpoint.files import read_json
from tafkir.checkpoint.header import StoredTensor, read_header
from tafkir.checkpoint.tensors import STORED_DTYPES
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import FP8_MAX
from tafkir.ops.nvfp4 import E2M1_MAX, Nvfp4
from tafkir.quant.coverage import LayerCoverage
from tafkir.quant.encode import arrange_nvfp4, encode_weight
from tafkir.quant.observe import InputStatistics, covered_range
from tafkir.quant.policy import Decision
from tafkir.recipe.quantize import CalibrationConfig, FormatName, QuantizeConfig
from tafkir.runlog.atomic import fsync_dir, write_json

__all__ = ["RECORD_FILE", "Calibration", "KvRange", "LayerRecord", "load_calibration"]

RECORD_FILE = "calibration.json"
_AGAIN = "remove the folder, and calibrate again"


@dataclass(frozen=True, slots=True)
class KvRange:
    """Largest magnitudes of what a layer's cache holds: keys behind RoPE, values, MLA's latents where it has them."""

    k_amax: float
    v_amax: float
    latent_amax: float | None = None


@dataclass(slots=True)
class LayerRecord:
    """What calibration found in one layer.

    Attributes:
        inputs: for each place where matrices read: the weights that do (names of the checkpoint), and the statistics.
        kv: of its cache.
        coverage: of its experts; None in a dense layer.
        weights: NVFP4 weights chosen on data, by name.
        errors: of those by GPTQ: output error over that of the nearest codes, by name.
    """

    inputs: dict[str, tuple[list[str], InputStatistics]]
    kv: KvRange
    coverage: LayerCoverage | None
    weights: dict[str, Nvfp4]
    errors: dict[str, float]

    def joined(self, other: LayerRecord) -> LayerRecord:
        """Both as one, with the other's cache and experts."""
        parts = ((self.inputs | other.inputs), other.kv, other.coverage, (self.weights | other.weights))
        return LayerRecord(*parts, self.errors | other.errors)

    def save(self, folder: Path, layer: int, hidden: Tensor | None, *, keeps_hidden: bool = False) -> None:
        """Write it; the layer counts as finished when its JSON is there, and until then nothing else changes. Hidden
        states that are not those of this layer go then, unless `keeps_hidden`."""
        tensors: dict[str, Tensor] = {}
        for key, (_, found) in self.inputs.items():
            tensors[f"{key}.block_amax"] = found.block_amax
            tensors[f"{key}.mean_square"] = (found.squares / max(1, found.tokens)).float()
            if found.histogram is not None:
                bins = found.histogram.nonzero().flatten()
                tensors[f"{key}.histogram"] = torch.stack([bins, found.histogram[bins]])
        for name, chosen in self.weights.items():
            tensors |= {name: chosen.packed, f"{name}_scale": chosen.scale, f"{name}_scale_2": chosen.global_scale}
        _save(folder / f"layer-{layer:05d}.safetensors", tensors)
        if hidden is not None:
            _save(folder / f"hidden-{layer:05d}.safetensors", {"hidden": hidden})
        inputs = {
            key: {"weights": names, "tokens": found.tokens, "amax": found.amax}
            for key, (names, found) in self.inputs.items()
        }
        kv = {"k_amax": self.kv.k_amax, "v_amax": self.kv.v_amax, "latent_amax": self.kv.latent_amax}
        experts = self.coverage.to_json() if self.coverage else None
        content = {
            "inputs": inputs, "kv": kv, "experts": experts, "weights": sorted(self.weights), "errors": self.errors,
        }  # fmt: skip
        write_json(folder / f"layer-{layer:05d}.json", content)
        for file in () if keeps_hidden else folder.glob("hidden-*.safetensors"):
            if hidden is None or file.name != f"hidden-{layer:05d}.safetensors":
                file.unlink()


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, file)
    fsync_dir(file.parent)


class Calibration:
    """A finished record, and what a quantization takes from it.

    Attributes:
        folder: of the record.
        config: how activations' ranges are chosen.
        fingerprint: of all that the record depends on.
        content: of calibration.json.
        layers: of the layers' JSON.
    """

    def __init__(self, folder: Path, config: CalibrationConfig, layers: Sequence[dict[str, Any]]) -> None:
        self.folder, self.config, self.layers = folder, config, list(layers)
        self.content = read_json(folder / RECORD_FILE)
        self.fingerprint = str(self.content["fingerprint"])
        self._chosen = {name: index for index, layer in enumerate(self.layers) for name in layer["weights"]}
        self._stored: dict[int, dict[str, StoredTensor]] = {}

    @cached_property
    def ranges(self) -> dict[str, float]:
        """The magnitude up to which the scale of a matrix's inputs reaches, by the name of the weight.

        Matrices that read the same inputs share it, and so do all routed experts of a layer.

        Raises:
            CheckpointError: inputs were zero always.
        """
        found: dict[str, float] = {}
        for index, layer in enumerate(self.layers):
            file = self.folder / f"layer-{index:05d}.safetensors"
            with safe_open(file, framework="pt") as tensors:
                there = set(tensors.keys())
                kept = {
                    key: tensors.get_tensor(f"{key}.histogram")
                    for key in layer["inputs"]
                    if f"{key}.histogram" in there
                }
            for key, histogram in kept.items():
                site = layer["inputs"][key]
                whole = torch.zeros(int(histogram[0].max()) + 1, dtype=torch.int64)
                whole[histogram[0]] = histogram[1]
                reach = covered_range(whole, float(site["amax"]), self.config)
                found |= dict.fromkeys(site["weights"], reach)
        return found

    def input_scale(self, name: str, format: FormatName = "nvfp4") -> float:
        """Global scale of the activations that a weight meets: range / 2688 in NVFP4, range / 448 in FP8.

        Raises:
            CheckpointError: its inputs were zero always, or were not seen.
        """
        reach = self.ranges.get(name, 0.0)
        if reach <= 0:
            raise CheckpointError(
                "its inputs were zero in all of the calibration", where=name, fix="calibrate on other text"
            )
        return reach / (FP8_MAX if format == "fp8" else E2M1_MAX * FP8_MAX)

    def kv_range(self, layer: int) -> KvRange:
        """What the layer's cache held."""
        return KvRange(**self.layers[layer]["kv"])

    def cache_scales(self, layer: int) -> tuple[float, float]:
        """Of a layer's keys and values, as checkpoints store them in FP8 and in NVFP4: largest magnitude / 448.

        Where the cache holds latents, both are theirs.

        Raises:
            CheckpointError: what the cache held was zero always.
        """
        held = self.kv_range(layer)
        reach = (held.k_amax, held.v_amax) if held.latent_amax is None else (held.latent_amax, held.latent_amax)
        if min(reach) <= 0:
            raise CheckpointError(
                "keys or values were zero in all of the calibration",
                where=f"layer {layer}",
                fix="calibrate on other text",
            )
        return reach[0] / FP8_MAX, reach[1] / FP8_MAX

    @property
    def coverage(self) -> list[LayerCoverage]:
        """Of every layer with experts."""
        return [
            LayerCoverage.from_json(index, layer["experts"])
            for index, layer in enumerate(self.layers)
            if layer["experts"] is not None
        ]

    def chosen(self, name: str) -> Nvfp4 | None:
        """A weight that was chosen on data; None where it is to be chosen without. Threads may ask at once."""
        index = self._chosen.get(name)
        if index is None:
            return None
        file = self.folder / f"layer-{index:05d}.safetensors"
        descriptor = os.open(file, os.O_RDONLY)
        try:
            stored = self._stored.get(index) or self._stored.setdefault(index, read_header(file, descriptor))
            return Nvfp4(*(_read(descriptor, stored[name + part]) for part in ("", "_scale", "_scale_2")))
        finally:
            os.close(descriptor)

    def encode(self, weight: Tensor, decision: Decision, config: QuantizeConfig, amax: Tensor | None) -> list[Tensor]:
        """The contents of a weight's pieces, as `encode_weight` gives them, by what was calibrated."""
        if decision.format == "nvfp4" or (decision.format == "fp8" and config.layout == "modelopt"):
            config = config.model_copy(update={"input_scale": self.input_scale(decision.name, decision.format)})
        chosen = self.chosen(decision.name)
        if chosen is None:
            return encode_weight(weight, decision.format, config, amax=amax)
        return arrange_nvfp4(chosen, decision.format, config)


def _read(descriptor: int, stored: StoredTensor) -> Tensor:
    content = bytearray(os.pread(descriptor, stored.num_bytes, stored.offset))
    flat = torch.frombuffer(content, dtype=torch.uint8)
    return flat.view(STORED_DTYPES[stored.dtype]).reshape(stored.shape)


def load_calibration(folder: Path, config: CalibrationConfig, num_layers: int) -> Calibration:
    """A finished record.

    Raises:
        CheckpointError: it is not finished, or damaged.
    """
    layers = [read_json(folder / f"layer-{index:05d}.json") for index in range(num_layers)]
    return Calibration(folder, config, layers)
