"""What `tafkir quantize` may be asked for: its options, and the words that they take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "AutoOption",
    "CalibrateOption",
    "ColdExperts",
    "ColdExpertsOption",
    "ConfigFile",
    "Destination",
    "DryRun",
    "GptqOption",
    "InputScale",
    "KvCache",
    "KvCacheOption",
    "Layout",
    "LayoutOption",
    "MinExpertTokens",
    "NonFinite",
    "NonFiniteOption",
    "Preset",
    "PresetOption",
    "Ranges",
    "RangesOption",
    "RecordOption",
    "RuleOption",
    "RulesFile",
    "Scales",
    "ScalesOption",
    "Scheme",
    "SchemeOption",
    "Sensitivity",
    "SensitivityOption",
    "ShardSize",
    "Source",
    "TokensOption",
    "Workers",
]


class Scheme(StrEnum):
    """`recipe.quantize.SchemeName`, as a command line names it."""

    NVFP4 = "nvfp4"
    NVFP4_W4A16 = "nvfp4_w4a16"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    FP8 = "fp8"
    FP8_CHANNEL = "fp8_channel"
    FP8_BLOCK = "fp8_block"
    INT8 = "int8"
    INT4 = "int4"


class Preset(StrEnum):
    """`recipe.quantize.PresetName`."""

    TAFKIR = "tafkir"
    R1_FP4 = "r1-fp4"
    R1_FP4_V2 = "r1-fp4-v2"
    NEMOTRON = "nemotron"
    ALL_LINEAR = "all-linear"


class Scales(StrEnum):
    """`recipe.quantize.ScaleChoice`."""

    MAX = "max"
    FOUR_OVER_SIX = "four_over_six"
    MSE = "mse"
    LOCAL_HESSIAN = "local_hessian"


class Layout(StrEnum):
    """`recipe.quantize.LayoutName`."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"
    GPT_OSS = "gpt-oss"


class Ranges(StrEnum):
    """`recipe.quantize.InputRange`."""

    MAX = "max"
    PERCENTILE = "percentile"
    HEADROOM = "headroom"


class ColdExperts(StrEnum):
    """`recipe.quantize.ColdExperts`."""

    ERROR = "error"
    FORCE = "force"
    BALANCE = "balance"
    DATA_FREE = "data_free"


class KvCache(StrEnum):
    """`recipe.quantize.QuantizeConfig.kv_cache`."""

    NONE = "none"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class Sensitivity(StrEnum):
    """`recipe.auto.Sensitivity`."""

    KL = "kl"
    FISHER = "fisher"


class NonFinite(StrEnum):
    """`recipe.quantize.QuantizeConfig.non_finite`."""

    REFUSE = "refuse"
    KEEP = "keep"


Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, run directory, or bundled name.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The new folder; must not be there.")]
SchemeOption = Annotated[Scheme | None, typer.Option("--scheme", help="Format of what the preset quantizes (nvfp4).")]
PresetOption = Annotated[
    Preset | None, typer.Option("--preset", help="Which parts are quantized, and what becomes of others (tafkir).")
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="PATTERN=FORMAT", help="Format by tensor name, before the preset; repeatable."),
]
ScalesOption = Annotated[Scales | None, typer.Option("--scales", help="How NVFP4's block scales are chosen.")]
LayoutOption = Annotated[Layout | None, typer.Option("--layout", help="Whose names and config files (modelopt).")]
InputScale = Annotated[
    float | None, typer.Option("--input-scale", help="Global scale of NVFP4 activations (1: up to 2688).")
]
NonFiniteOption = Annotated[
    NonFinite | None, typer.Option("--non-finite", help="Weights with NaN or infinities (refuse).")
]
KvCacheOption = Annotated[KvCache | None, typer.Option("--kv-cache", help="Cache that engines shall use (none).")]
CalibrateOption = Annotated[
    str | None, typer.Option("--calibrate", metavar="TEXT", help="Run the model on a file, or on `task`, first.")
]
TokensOption = Annotated[int | None, typer.Option("--calibration-tokens", min=1, help="Tokens that it reads (32,768).")]
RangesOption = Annotated[
    Ranges | None, typer.Option("--ranges", help="What the calibrated scale of activations covers (max).")
]
GptqOption = Annotated[bool, typer.Option("--gptq", help="Round NVFP4 weights by GPTQ on that text.")]
ColdExpertsOption = Annotated[
    ColdExperts | None, typer.Option("--cold-experts", help="What to do about experts with few tokens (error).")
]
MinExpertTokens = Annotated[
    int | None, typer.Option("--min-expert-tokens", min=1, help="Fewer leave an expert cold (16).")
]
RecordOption = Annotated[
    Path | None,
    typer.Option("--calibration-record", metavar="DIR", help="Keep what was calibrated, or use it again."),
]
AutoOption = Annotated[
    str | None,
    typer.Option("--auto", metavar="BUDGET", help="Choose formats by measured loss: bits=5.0, bytes=4.2GB, kl=1%."),
]
SensitivityOption = Annotated[
    Sensitivity | None, typer.Option("--sensitivity", help="How --auto measures what a format loses (kl).")
]
RulesFile = Annotated[
    Path | None, typer.Option("--rules", metavar="FILE", help="Rules and settings that --auto has written.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML with the same keys; options go before it.")
]
ShardSize = Annotated[float, typer.Option("--shard-size", min=1e-6, metavar="GB", help="Of a file.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Weights worked on at once; 0 takes the cores, at most 4.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would become of every part, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; with --dry-run, every tensor.")]
