"""A decoder's weights as `tafkir quantize` would write them, without writing them: fake quantization for training.

Every matrix goes by its checkpoint name through the same policy and the same formats as on disk, so what a model was
trained to compute is, bit for bit, what its quantized checkpoint computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.checkpoint.quantized import EncodedWeight, decode_weight
from tafkir.models.decoder import Decoder
from tafkir.models.hf import Resolved, resolve_names, split_pieces
from tafkir.ops.fake_quant import LAST_CELL, ROUNDED_SEARCHES, round_matrices
from tafkir.ops.nvfp4 import BLOCK_SIZE, block_amax, nvfp4_step
from tafkir.quant.activations import INPUT_AMAX, quantize_inputs_of
from tafkir.quant.encode import encode_weight
from tafkir.quant.formats import NVFP4_FORMATS
from tafkir.quant.policy import Decision, decide, sibling_group
from tafkir.recipe.quantize import FormatName, LayoutName, QuantizeConfig

__all__ = ["FakeQuantizer", "decode_pieces", "fake_quantize"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix of the checkpoint lies: the parameter, its window of rows, and the expert in a stack."""

    decision: Decision
    parameter: str
    index: int


class FakeQuantizer:
    """What the parameters of a decoder are worth once they are quantized; a function of the parameters alone.

    Attributes:
        formats: of each parameter that is quantized, the format; of several, all by "+".
        inside: of the last call, for parameters that a search of scales has cut off in places: where it has not.

    Args:
        decoder: whose names and shapes; its weights are not kept.
        config: of `tafkir quantize`.
        dtype: of the checkpoint that will be quantized.

    Raises:
        RecipeError: a rule matches nothing, or asks for a format that a tensor cannot have.
        CheckpointError: no rule names a tensor.
    """

    def __init__(self, decoder: Decoder, config: QuantizeConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.dtype = config, dtype
        self.inside: dict[str, Tensor] = {}
        trained = dict(decoder.named_parameters())
        self._names = {names.name: names for names in resolve_names(decoder) if names.name in trained}
        self._shapes = {name: parameter.shape for name, parameter in trained.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, tuple[str, int]] = {}
        for name, names in self._names.items():
            for index, (theirs, piece) in enumerate(split_pieces(trained[name], names)):
                shapes[theirs], places[theirs] = tuple(piece.shape), (name, index)
        decisions = decide(shapes, config, decoder.config.num_hidden_layers)
        self.formats: dict[str, str] = {}
        groups: dict[str, list[_Place]] = {}
        for decision in decisions:
            if decision.format != "keep":
                name, index = places[decision.name]
                groups.setdefault(sibling_group(decision.name), []).append(_Place(decision, name, index))
                seen = self.formats.setdefault(name, decision.format)
                if decision.format not in seen.split("+"):
                    self.formats[name] = f"{seen}+{decision.format}"
        self._whole = {name for name in self.formats if self._is_whole(self._names[name], groups)}
        self._groups = [group for group in groups.values() if group[0].parameter not in self._whole]

    def _is_whole(self, names: Resolved, groups: Mapping[str, Sequence[_Place]]) -> bool:
        """Whether each matrix of a parameter is NVFP4 as one, in ModelOpt's arithmetic: then all are done at once."""
        quick = self.config.layout == "modelopt" and self.config.scale_choice in ROUNDED_SEARCHES
        if not quick or self.formats[names.name] not in NVFP4_FORMATS:
            return False
        for parts in names.parts:
            members = groups.get(sibling_group(parts[0]), [])
            if {place.decision.name for place in members} != set(parts):
                return False
        return True

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor], only: Collection[str] | None = None) -> dict[str, Tensor]:
        """The parameters that the written checkpoint changes, float32, by name.

        Args:
            weights: the decoder's parameters, or its state.
            only: these alone; with all that share a global scale.

        Raises:
            CheckpointError: weights are not finite.
        """
        self.inside = {}
        out: dict[str, Tensor] = {}
        for name, names in self._names.items():
            if only is not None and name not in only:
                continue
            tensor = weights[name].detach()
            if name in self._whole:
                stacked = tensor if names.stacked else tensor.unsqueeze(0)
                assert self.config.scale_choice != "local_hessian"  # not among `_is_whole`'s
                rounded = round_matrices(stacked.to(self.dtype), self.config.scale_choice)
                out[name] = rounded.view(tensor.shape)
            elif name in self.formats or (self.dtype != torch.float32 and not names.float32):
                out[name] = tensor.to(self.dtype, copy=True).float()
        groups = [group for group in self._groups if group[0].parameter in out]
        given, made = (self._pieces(groups, tensors) for tensors in (weights, out))
        for group in groups:
            self._encode(group, given, made)
        return out

    def _pieces(self, groups: Sequence[Sequence[_Place]], tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """The matrices of the parameters that are not done at once: views, in the order of their places."""
        names = {place.parameter for group in groups for place in group}
        return {name: [piece for _, piece in split_pieces(tensors[name].detach(), self._names[name])] for name in names}

    def _encode(
        self, group: Sequence[_Place], given: Mapping[str, list[Tensor]], made: Mapping[str, list[Tensor]]
    ) -> None:
        """Matrix by matrix as `quantize_checkpoint` does it: encoded, and brought back from the codes."""
        views = [given[place.parameter][place.index].to(self.dtype).contiguous() for place in group]
        format = group[0].decision.format
        amax = None
        if len(views) > 1 and format in NVFP4_FORMATS:
            amax = torch.stack([block_amax(view).amax() for view in views]).amax()
        for place, view in zip(group, views, strict=True):
            pieces = encode_weight(view, format, self.config, amax=amax)
            worth = decode_pieces(pieces, format, self.config.layout, tuple(view.shape))
            made[place.parameter][place.index].copy_(worth)
            if format in NVFP4_FORMATS and self.config.scale_choice not in ROUNDED_SEARCHES:
                step = nvfp4_step(pieces[1], pieces[2].reshape(()), inverse=self.config.layout != "modelopt")
                inside = view.float().abs() <= LAST_CELL * step.repeat_interleave(BLOCK_SIZE, dim=-1)
                self._note(place, inside)

    def _note(self, place: _Place, inside: Tensor) -> None:
        """Remember which weights of a matrix were not cut off."""
        names = self._names[place.parameter]
        if place.parameter not in self.inside:
            self.inside[place.parameter] = torch.ones(self._shapes[place.parameter], dtype=torch.bool)
        pieces = [piece for _, piece in split_pieces(self.inside[place.parameter], names)]
        pieces[place.index].copy_(inside)

    def input_amax(self) -> dict[str, float]:
        """Largest magnitude that inputs are scaled for, by parameter, where they are quantized to NVFP4, too."""
        amax = INPUT_AMAX * self.config.input_scale
        return {name: amax for name, formats in self.formats.items() if formats == "nvfp4"}


def decode_pieces(pieces: Sequence[Tensor], format: FormatName, layout: LayoutName, shape: tuple[int, ...]) -> Tensor:
    """What the pieces of `encode_weight` are worth, float32 [N, K]."""
    nvfp4 = format in NVFP4_FORMATS
    encoding = ("nvfp4_inverse" if layout == "compressed-tensors" else "nvfp4") if nvfp4 else format
    names = ("codes", "scale", "global_scale")
    encoded = EncodedWeight(encoding, shape, *names[: 3 if nvfp4 else 2])  # type: ignore[arg-type]  # keep has none
    return decode_weight(encoded, dict(zip(names, pieces, strict=False)).__getitem__)


def fake_quantize(decoder: Decoder, config: QuantizeConfig, dtype: torch.dtype = torch.float32) -> FakeQuantizer:
    """Let a decoder read its matrices' inputs as the quantized checkpoint will, and say what its weights become.

    The hooks stay in the decoder; its parameters are left as they are. Arguments and errors as `FakeQuantizer`.
    """
    quantizer = FakeQuantizer(decoder, config, dtype)
    quantize_inputs_of(decoder, quantizer.input_amax())
    return quantizer
