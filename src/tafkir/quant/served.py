"""A quantized checkpoint as engines compute with it: codes become what they are worth, and inputs lose digits, too."""

from __future__ import annotations

from pathlib import Path

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.read import WeightFiles
from tafkir.models.decoder import Decoder
from tafkir.models.hf.convert import resolve_names
from tafkir.quant.activations import INPUT_AMAX, quantize_inputs_of
from tafkir.quant.convert import open_source

__all__ = ["input_amax", "load_served"]


def load_served(name: Path | str) -> Decoder:
    """The decoder of a checkpoint, of whatever kind, in float32.

    Inputs of matrices that are stored as NVFP4 for weights and activations (those with an `input_scale`, or
    `input_global_scale`) are rounded to NVFP4 under that scale. Activations of formats of eight bits stay in float32.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    decoder = load_checkpoint(name).decoder
    with open_source(name) as (files, _):
        quantize_inputs_of(decoder, input_amax(decoder, files))
    return decoder


def input_amax(decoder: Decoder, files: WeightFiles) -> dict[str, float]:
    """Largest magnitude that a checkpoint's scales of activations cover, by the name of the decoder's own matrix.

    Matrices that are one in the decoder (q/k/v, gate/up, all experts of a layer) take the largest of theirs. Those
    without a scale, or in another format than NVFP4, are left out.
    """
    found: dict[str, float] = {}
    for names in resolve_names(decoder):
        scales = [_input_scale(files, part) for parts in names.parts for part in parts]
        known = [scale for scale in scales if scale is not None]
        if known and len(known) == len(scales):
            found[names.name] = INPUT_AMAX * max(known)
    return found


def _input_scale(files: WeightFiles, name: str) -> float | None:
    weight = files.encoded.get(name)
    if weight is None or weight.encoding not in ("nvfp4", "nvfp4_inverse"):
        return None
    inverse = weight.encoding == "nvfp4_inverse"
    stored = name.removesuffix("weight") + ("input_global_scale" if inverse else "input_scale")
    if stored not in files.tensors:
        return None
    value = float(files.read_stored(stored).reshape(()))
    return 1.0 / value if inverse else value
