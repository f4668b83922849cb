"""Weights on their way into a rollout engine: the layers' matrices quantized, the rest as training has it.

A fake quantization: the engine computes in float32 with values that the format can hold, so what it samples, and how
far that is from training, are those of the real format. Its speed is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tafkir.errors import CheckpointError, RecipeError
from tafkir.models.decoder import Decoder
from tafkir.ops.fp8 import dequantize_fp8_blocks, quantize_fp8_blocks
from tafkir.ops.nvfp4 import BLOCK_SIZE, fake_quantize_nvfp4
from tafkir.quant.activations import quantize_activations
from tafkir.quant.fake import FakeQuantizer, fake_quantize
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rollout import RolloutConfig, RolloutPrecision
from tafkir.recipe.seeds import derive_seed

__all__ = ["RolloutWeights", "describe_rollouts", "is_quantized", "prepare_decoder", "rollout_formats"]

# What the published NVFP4 checkpoints of MoE models quantize: the matrices of attention and of the experts.
_QUANTIZED = re.compile(
    r"layers\.\d+\.(attention\.\w+_proj\.weight|mlp\.(shared_experts\.)?\w+_proj\.weight|mlp\.experts\.\w+_proj)"
)
# What stays: embeddings and head, norms, biases, routers, residual mappings, and layers that the engine does not run.
_KEPT = re.compile(
    r"(embed_tokens|lm_head)\.weight|(.*\.)?\w*norm\.weight|.*\.bias|.*\.router\.(weight|expert_bias)"
    r"|.*residual\..*|mtp\..*"
)


def is_quantized(name: str) -> bool:
    """Whether the tensor of this name in a decoder's state dict is one of the matrices that take few bits.

    Raises:
        CheckpointError: no rule names it; a tensor is never left out by accident.
    """
    if _QUANTIZED.fullmatch(name):
        return True
    if not _KEPT.fullmatch(name):
        raise CheckpointError("no rule of rollout quantization names this tensor", where=name)
    return False


def rollout_formats(shapes: Mapping[str, tuple[int, ...]], precision: RolloutPrecision) -> dict[str, str]:
    """The number format of every tensor: "float32", "bfloat16", "fp8" or "nvfp4".

    Args:
        shapes: of a decoder's state dict.
        precision: of the rollouts.

    Raises:
        RecipeError: a matrix does not split into the format's blocks.
        CheckpointError: no rule names a tensor.
    """
    if precision == "bfloat16":
        # Routers compute in float32 whatever the rest does, and so keep their weights.
        return {name: "float32" if ".router." in name else "bfloat16" for name in shapes}
    narrow = {"float32": "float32", "fp8": "fp8"}.get(precision, "nvfp4")
    formats = {name: narrow if is_quantized(name) else "float32" for name in shapes}
    for name, format in formats.items():
        if format == "nvfp4" and shapes[name][-1] % BLOCK_SIZE:
            raise RecipeError(
                f"rows of {shapes[name][-1]} weights have no blocks of {BLOCK_SIZE}",
                where=name,
                expected=f"a multiple of {BLOCK_SIZE} for rollouts in {precision}",
                fix="choose other sizes in [model], or rollout.precision = 'fp8'",
            )
    return formats


class RolloutWeights:
    """Turns the weights of a policy into those that its rollouts use; a function of (weights, version) alone.

    Attributes:
        formats: number format of every tensor, as of the last call.

    Args:
        config: which format, how much noise.
        seed: of the noise, together with the policy's version and the tensor's name.
        quantizer: of the engine's decoder, where `config.quantize` says how.
    """

    def __init__(self, config: RolloutConfig, seed: int, quantizer: FakeQuantizer | None = None) -> None:
        self.config, self.seed, self.quantizer = config, seed, quantizer
        self.formats: dict[str, str] = {}

    @torch.no_grad()
    def __call__(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """The same names with new tensors; inputs are never written to.

        Raises:
            RecipeError: a matrix does not split into the format's blocks.
            CheckpointError: no rule names a tensor, or weights are not finite.
        """
        given = dict(weights)
        if self.config.quantize is not None:
            assert self.quantizer is not None, "who builds the engine knows its decoder"
            self.formats = dict.fromkeys(given, "float32") | self.quantizer.formats
            yield from (given | self.quantizer(given)).items()
            return
        self.formats = rollout_formats({name: tuple(t.shape) for name, t in given.items()}, self.config.precision)
        for name, tensor in given.items():
            values = self._with_noise(name, tensor, version) if self.config.noise and is_quantized(name) else tensor
            yield name, _rounded(values, self.formats[name])

    def _with_noise(self, name: str, tensor: Tensor, version: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rollout-noise", version, name))
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        rms = tensor.float().square().mean().sqrt()
        return (tensor.float() + noise * (self.config.noise * rms)).to(tensor.dtype)


def _rounded(tensor: Tensor, format: str) -> Tensor:
    if format == "fp8":
        return dequantize_fp8_blocks(*quantize_fp8_blocks(tensor), dtype=tensor.dtype)
    if format == "nvfp4":
        # Stacked experts [E, rows, columns] have a global scale each, as checkpoints of single experts do.
        return fake_quantize_nvfp4(tensor, lead=tensor.dim() - 2)
    return tensor.to(torch.bfloat16) if format == "bfloat16" else tensor


def describe_rollouts(model: ModelConfig, config: RolloutConfig) -> dict[str, Any]:
    """What a stage's result says of its rollouts: their table of the recipe, and every tensor's number format.

    Raises:
        RecipeError: a matrix does not split into the format's blocks.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(model).state_dict().items()}
    formats = rollout_formats(shapes, config.precision)
    activations = "nvfp4" if config.precision == "nvfp4_w4a4" else formats["embed_tokens.weight"]
    if config.quantize is not None:
        with torch.device("meta"):
            quantizer = FakeQuantizer(Decoder(model), config.quantize)
        formats |= quantizer.formats
        activations = "nvfp4" if quantizer.input_amax() else activations
    return {
        **config.model_dump(mode="json"),
        "activations": activations,
        "share_of_weights": {
            format: sum(math.prod(shapes[name]) for name in shapes if formats[name] == format)
            / sum(map(math.prod, shapes.values()))
            for format in sorted(set(formats.values()))
        },
        "formats": formats,
    }


def prepare_decoder(decoder: Decoder, config: RolloutConfig) -> Decoder:
    """Make an engine's own decoder compute as its rollouts should, in place; its weights come through `RolloutWeights`.

    bfloat16 changes every parameter but the routers'; nvfp4_w4a4 quantizes the inputs of the quantized matrices, as
    does `config.quantize` where its formats say so.

    Raises:
        RecipeError: experts are to be replayed and the decoder has none.
    """
    if config.replay_experts and not decoder.routers:
        raise RecipeError(
            "a dense model has no experts to replay", where="rollout.replay_experts", expected="false, or a MoE model"
        )
    if config.precision == "bfloat16":
        exact = [{name: t.clone() for name, t in router.state_dict().items()} for router in decoder.routers]
        decoder.to(torch.bfloat16)
        for router, weights in zip(decoder.routers, exact, strict=True):
            router.float().load_state_dict(weights)
    elif config.precision == "nvfp4_w4a4":
        quantize_activations(decoder)
    elif config.quantize is not None:
        fake_quantize(decoder, config.quantize)
    return decoder
