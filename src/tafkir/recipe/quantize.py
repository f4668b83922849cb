"""How a checkpoint is quantized: `[quantize]` of a recipe, and what `tafkir quantize` is asked for. Torch-free.

Every tensor belongs to one component. A preset says which format each component gets; rules of one's own, by name of
the tensor, go before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from tafkir.recipe.auto import AutoConfig
from tafkir.recipe.tables import Positive, Table

__all__ = [
    "COMPONENTS",
    "FORMATS",
    "LAYOUT_FORMATS",
    "PRESETS",
    "CalibrationConfig",
    "ColdExperts",
    "Component",
    "FormatName",
    "InputRange",
    "LayoutName",
    "PresetName",
    "QuantizeConfig",
    "RuleConfig",
    "ScaleChoice",
    "SchemeName",
]

Component = Literal[
    "attention", "attention_kv_b", "attention_out", "attention_indexer", "mlp", "experts", "shared_experts", "router",
    "embedding", "head", "norm", "bias", "mtp", "hyper_connections", "other",
]  # fmt: skip
"""attention: the maps into attention (q, k, v, MLA's q_a, q_b, kv_a); attention_kv_b: MLA's, which engines absorb;
attention_out: the map out of it; mtp: the matrices of multi-token-prediction layers, experts included; other: what no
name is known for, and a rule of one's own has to name."""

FormatName = Literal[
    "keep", "nvfp4", "nvfp4_w4a16", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block", "int8", "int4"
]
"""keep: as the source has it, FP8 blocks as BF16. nvfp4: weights and activations in 4 bits; nvfp4_w4a16: weights alone.
fp8: one scale; fp8_channel: one a row; fp8_block: one for each 128x128."""

SchemeName = Literal["nvfp4", "nvfp4_w4a16", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block", "int8", "int4"]
LayoutName = Literal["modelopt", "compressed-tensors", "gpt-oss"]
"""gpt-oss: the MXFP4 of that family, whose experts lie in one tensor for each map (`*_blocks`, `*_scales`)."""

ScaleChoice = Literal["max", "four_over_six", "mse", "local_hessian"]
InputRange = Literal["max", "percentile", "headroom"]
ColdExperts = Literal["error", "force", "balance", "data_free"]
PresetName = Literal["tafkir", "r1-fp4", "r1-fp4-v2", "nemotron", "all-linear"]

COMPONENTS: tuple[Component, ...] = get_args(Component)
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

LAYOUT_FORMATS: Mapping[LayoutName, frozenset[FormatName]] = {
    "modelopt": frozenset({"keep", "nvfp4", "nvfp4_w4a16", "mxfp8", "fp8", "fp8_channel", "fp8_block"}),
    "compressed-tensors": frozenset(FORMATS),
    "gpt-oss": frozenset({"keep", "mxfp4"}),
}
"""What each layout has a place for."""


def _preset(**formats: FormatName | Literal["scheme"]) -> dict[Component, FormatName | Literal["scheme"]]:
    return {component: formats.get(component, "keep") for component in COMPONENTS}


PRESETS: Mapping[PresetName, Mapping[Component, FormatName | Literal["scheme"]]] = {
    "tafkir": _preset(
        mlp="scheme", experts="scheme", shared_experts="scheme", attention="fp8_block", attention_kv_b="fp8_block",
        attention_out="fp8_block", mtp="fp8_block",
    ),
    "r1-fp4": _preset(mlp="scheme", experts="scheme", shared_experts="scheme"),
    "r1-fp4-v2": _preset(mlp="scheme", experts="scheme", shared_experts="scheme", attention_out="scheme"),
    "nemotron": _preset(
        experts="scheme", mlp="fp8_channel", shared_experts="fp8_channel", attention="fp8_channel",
        attention_kv_b="fp8_channel", attention_out="fp8_channel",
    ),
    "all-linear": _preset(
        mlp="scheme", experts="scheme", shared_experts="scheme", attention="scheme", attention_kv_b="scheme",
        attention_out="scheme",
    ),
}  # fmt: skip
"""What gets which format; "scheme" is what the user asks for. r1-fp4 and r1-fp4-v2 are NVIDIA's DeepSeek-R1-0528-FP4
and -v2; nemotron is their Nemotron 3: routed experts in 4 bits by "four over six", the rest in FP8; all-linear is what
ModelOpt does by default; tafkir keeps attention and multi-token prediction in FP8 blocks instead of BF16."""


class RuleConfig(Table):
    """Tensors by name, and the format that they get."""

    tensors: str = Field(min_length=1, description="Shell pattern over whole names, such as `model.layers.0.mlp.*`.")
    format: FormatName = Field(description="Their format.")


class CalibrationConfig(Table):
    """What the model reads before it is quantized, and what is made of its activations."""

    text: str = Field(
        "task", min_length=1, description="`task` (made-up word problems), or a file: text or JSON lines."
    )
    tokens: Positive = Field(32_768, description="Tokens that are read at most.")
    window: Positive = Field(512, description="Tokens of a document at most.")
    ranges: InputRange = Field(
        "max",
        description="What the scale of activations covers: all, a percentile of blocks, or headroom for reasoning.",
    )
    percentile: float = Field(99.99, gt=0, le=100, description="Of blocks of 16 activations, for `percentile`.")
    gptq: bool = Field(False, description="Round NVFP4 weights one column after the other, errors fed forward (GPTQ).")
    damping: float = Field(0.01, gt=0, description="Of GPTQ: share of the mean second moment added to each.")
    act_order: bool = Field(False, description="GPTQ rounds the columns of the largest activations first.")
    cold_experts: ColdExperts = Field(
        "error", description="Experts that get too few tokens: stop, give them some, give all their share, or no data."
    )
    min_expert_tokens: Positive = Field(16, description="Fewer tokens than these leave an expert cold.")


class QuantizeConfig(Table):
    """Which tensor gets which number format, and what the written checkpoint looks like."""

    scheme: SchemeName = Field("nvfp4", description="Format of what the preset quantizes.")
    preset: PresetName = Field("tafkir", description="Which parts are quantized, and what becomes of the others.")
    rules: tuple[RuleConfig, ...] = Field((), description="Formats by tensor name; the first that matches counts.")
    scales: ScaleChoice | None = Field(
        None, description="How NVFP4's block scales are chosen; not set, four_over_six (max in the peer's own presets)."
    )
    layout: LayoutName = Field("modelopt", description="Names of tensors and config files of the written checkpoint.")
    input_scale: float = Field(
        1.0,
        gt=0,
        description="Global scale of activations; without calibration, 1 covers magnitudes up to 2688 (FP8: 448).",
    )
    kv_cache: Literal["none", "fp8", "nvfp4"] = Field(
        "none", description="Number format of the cache that engines shall use; nvfp4 in ModelOpt's layout alone."
    )
    non_finite: Literal["refuse", "keep"] = Field(
        "refuse",
        description="Weights with NaN or infinities: an error, or kept as they are with all that share a scale.",
    )
    calibration: CalibrationConfig | None = Field(
        None, description="Run the model on text before, to choose the scales of activations, and of weights as asked."
    )
    auto: AutoConfig | None = Field(
        None, description="Choose the formats of the layers' matrices under a budget, by what each one's loss does."
    )

    @property
    def scale_choice(self) -> ScaleChoice:
        """`scales`, or what goes with the preset."""
        return self.scales or ("four_over_six" if self.preset in ("tafkir", "nemotron") else "max")

    @property
    def component_formats(self) -> dict[Component, FormatName]:
        """The preset's formats, with the scheme in place."""
        chosen = PRESETS[self.preset]
        return {part: self.scheme if format == "scheme" else format for part, format in chosen.items()}

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        used = {*self.component_formats.values(), *(rule.format for rule in self.rules)}
        used |= set(self.auto.formats if self.auto else ())
        if self.calibration is None and self.scales == "local_hessian":
            raise ValueError("scales = 'local_hessian' needs data: add a [quantize.calibration], or --calibrate TEXT")
        if self.calibration is not None and self.input_scale != 1.0:
            raise ValueError("input_scale is what a calibration finds; set one or the other")
        if self.kv_cache == "fp8" and self.layout == "gpt-oss":
            raise ValueError("kv_cache = 'fp8': layout = 'gpt-oss' has no word for it")
        if self.kv_cache == "nvfp4" and self.layout != "modelopt":
            raise ValueError(f"kv_cache = 'nvfp4': {self.layout} has no word for it; layout = 'modelopt' does")
        unknown = sorted(used - LAYOUT_FORMATS[self.layout])
        if unknown:
            places = [name for name, formats in LAYOUT_FORMATS.items() if used <= formats]
            advice = f"; layout = {places[0]!r} does" if places else ""
            raise ValueError(f"layout = {self.layout!r} has no place for {', '.join(unknown)}{advice}")
        return self
