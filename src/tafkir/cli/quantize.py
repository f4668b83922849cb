"""`tafkir quantize`: a checkpoint in fewer bits, as engines load it."""

from __future__ import annotations

import json
import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["quantize"]


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


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, run directory, or bundled name.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="The new folder; must not be there.")],
    scheme: Annotated[
        Scheme | None, typer.Option("--scheme", help="Format of what the preset quantizes (nvfp4).")
    ] = None,
    preset: Annotated[
        Preset | None, typer.Option("--preset", help="Which parts are quantized, and what becomes of others (tafkir).")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="PATTERN=FORMAT", help="Format by tensor name, before the preset; repeatable."),
    ] = None,
    scales: Annotated[Scales | None, typer.Option("--scales", help="How NVFP4's block scales are chosen.")] = None,
    layout: Annotated[Layout | None, typer.Option("--layout", help="Whose names and config files (modelopt).")] = None,
    input_scale: Annotated[
        float | None, typer.Option("--input-scale", help="Global scale of NVFP4 activations (1: up to 2688).")
    ] = None,
    non_finite: Annotated[
        NonFinite | None, typer.Option("--non-finite", help="Weights with NaN or infinities (refuse).")
    ] = None,
    kv_cache: Annotated[KvCache | None, typer.Option("--kv-cache", help="Cache that engines shall use (none).")] = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", metavar="TEXT", help="Run the model on a file, or on `task`, first.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", min=1, help="Tokens that it reads (32,768).")
    ] = None,
    ranges: Annotated[
        Ranges | None, typer.Option("--ranges", help="What the calibrated scale of activations covers (max).")
    ] = None,
    gptq: Annotated[bool, typer.Option("--gptq", help="Round NVFP4 weights by GPTQ on that text.")] = False,
    cold_experts: Annotated[
        ColdExperts | None, typer.Option("--cold-experts", help="What to do about experts with few tokens (error).")
    ] = None,
    min_expert_tokens: Annotated[
        int | None, typer.Option("--min-expert-tokens", min=1, help="Fewer leave an expert cold (16).")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--calibration-record", metavar="DIR", help="Keep what was calibrated, or use it again."),
    ] = None,
    auto: Annotated[
        str | None,
        typer.Option("--auto", metavar="BUDGET", help="Choose formats by measured loss: bits=5.0, bytes=4.2GB, kl=1%."),
    ] = None,
    sensitivity: Annotated[
        Sensitivity | None, typer.Option("--sensitivity", help="How --auto measures what a format loses (kl).")
    ] = None,
    rules_file: Annotated[
        Path | None, typer.Option("--rules", metavar="FILE", help="Rules and settings that --auto has written.")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML with the same keys; options go before it.")
    ] = None,
    shard_size: Annotated[float, typer.Option("--shard-size", min=1e-6, metavar="GB", help="Of a file.")] = 5.0,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Weights worked on at once; 0 takes the cores, at most 4.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would become of every part, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --dry-run, every tensor.")] = False,
) -> None:
    """Write a quantized copy of a checkpoint, of any size, on any machine; memory stays below a gigabyte.

    \b
    tafkir quantize ./DeepSeek-R1-0528 ./R1-NVFP4 --dry-run         what would become of every part
    tafkir quantize ./DeepSeek-R1-0528 ./R1-NVFP4 --preset r1-fp4   as NVIDIA's DeepSeek-R1-0528-FP4
    tafkir quantize ./Qwen3-30B-A3B ./out --preset all-linear --layout compressed-tensors
    tafkir quantize ./model ./out --rule 'model.layers.0.*_proj.weight=fp8_block'
    tafkir quantize ./model ./out --auto bits=5.0
    tafkir quantize ./model ./out --calibrate text.txt --gptq --scales local_hessian --ranges headroom

    \b
    presets   tafkir: MLP and experts by the scheme, attention and MTP in FP8 blocks; r1-fp4: MLP and experts, the rest
              stays BF16; r1-fp4-v2: o_proj too; nemotron: experts, the rest FP8; all-linear: every matrix in a layer
    scales    max: block maxima, as ModelOpt; four_over_six: -16 % squared error; mse: -27 %, a little slower;
              local_hessian: least error of the outputs on the text of --calibrate
    ranges    max: all activations; percentile: the 99.99th of blocks; headroom: for models that reason, as NVIDIA does
    experts   that get few tokens of the text: error; force: shown those that they would like best; balance: all get an
              equal share; data_free: their weights are chosen without data
    auto      the layers' matrices in nvfp4, fp8_block or as they are, under a budget: bits a weight of theirs, bytes of
              the checkpoint, or mean KL (1 % is 0.01 nats); DST.auto.toml keeps the rules, DST.auto.svg shows why
    layouts   modelopt: vLLM, SGLang, TensorRT-LLM; compressed-tensors: vLLM, TensorRT-LLM, transformers

    Killed, it goes on where it was when the same command is run again. Sources are BF16, FP16, FP32 or FP8 blocks.
    Every tensor gets a format by a rule; a tensor that none names, or a rule that matches nothing, is an error.
    """
    given = {
        "scheme": scheme, "preset": preset, "scales": scales, "layout": layout, "input_scale": input_scale,
        "kv_cache": kv_cache, "non_finite": non_finite,
    }  # fmt: skip
    calibration = {
        "text": calibrate, "tokens": tokens, "ranges": ranges, "gptq": gptq or None, "cold_experts": cold_experts,
        "min_expert_tokens": min_expert_tokens,
    }  # fmt: skip
    from tafkir.cli.auto import choose_formats, with_auto
    from tafkir.cli.completer import checkpoint_of

    settings, rules = with_auto(_said(given), rule or [], rules_file, auto, _plain(sensitivity))
    config = _config(config_file, settings, rules, _said(calibration))
    folder = checkpoint_of(source)
    if config.auto is not None:
        config = choose_formats(folder, source, out, config, quiet=as_json)
    if dry_run:
        _show_plan(folder, config, shard_size, as_json)
        return
    workers = workers or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if not as_json:
        _show_plan(folder, config, shard_size, False)
    options: dict[str, Any] = {"max_shard_bytes": int(shard_size * 1e9), "workers": workers}
    if config.calibration is None:
        # Without data nothing runs the model, and torch need not be imported.
        from tafkir.quant.convert import quantize_checkpoint

        result, found = quantize_checkpoint(folder, out, config, **options), None
    else:
        from tafkir.quant.calibrated import write_quantized

        result, found = write_quantized(folder, out, config, record=record, **options)
    if as_json:
        keys = ("source_bytes", "output_bytes", "resumed_bytes", "rows")
        said = {"path": str(result.path), **{key: getattr(result, key) for key in keys}, "calibration": found}
        print(json.dumps(said, indent=2))
        return
    if found:
        _show_calibration(found)
    ratio = result.source_bytes / max(1, result.output_bytes)
    resumed = f", of which {_size(result.resumed_bytes)} were there already" if result.resumed_bytes else ""
    print(f"{out}: {_size(result.output_bytes)}{resumed}; {ratio:.2f} times smaller, checked")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _said(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in options.items() if value is not None}


def _show_calibration(found: dict[str, Any]) -> None:
    print(
        f"calibrated on {found['tokens']:,} tokens of {found['text']}: activations up to {found['smallest_range']:.3g} "
        f"to {found['largest_range']:.3g} by {found['ranges']}"
    )
    if found["gptq"]:
        error = found["gptq"]["mean_error"]
        print(f"GPTQ: {found['gptq']['weights']:,} weights with {error:.1%} of the output error of the nearest codes")
    head = ("layer", "experts", "fewest", "median", "most", "never", "given_tokens", "data_free")
    rows = [head, *(tuple(f"{row[key]:,}" for key in head) for row in found["coverage"])]
    for row in rows if found["coverage"] else ():
        print("  ".join(f"{cell.replace('_', ' '):>12}" for cell in row))


def _config(
    file: Path | None, given: dict[str, Any], rules: list[str], calibration: dict[str, Any] | None = None
) -> QuantizeConfig:
    """The settings of a file, with options before them.

    Raises:
        RecipeError: the file is missing or not TOML, a key or value is not valid, or a rule has no `=`.
    """
    from pydantic import ValidationError

    from tafkir.errors import RecipeError
    from tafkir.recipe.quantize import FORMATS, QuantizeConfig

    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError("no such file", where=str(file)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"not valid TOML ({error})", where=str(file)) from error
    mine = []
    for rule in rules:
        pattern, _, format = rule.rpartition("=")
        if not pattern or format not in FORMATS:
            raise RecipeError(
                f"--rule {rule!r} has no format", expected=f"PATTERN=FORMAT, with one of {', '.join(FORMATS)}"
            )
        mine.append({"tensors": pattern, "format": format})
    table = {**table, **given, "rules": [*mine, *table.get("rules", [])]}
    if calibration:
        kept = table.get("calibration") or {}
        if "text" not in {**kept, **calibration}:
            raise RecipeError(
                "options of a calibration, but nothing to calibrate on", where="options", fix="add --calibrate TEXT"
            )
        table["calibration"] = {**kept, **calibration}
    try:
        return QuantizeConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{file or 'options'}: {'.'.join(map(str, first['loc']))}".rstrip(": ")
        raise RecipeError(first["msg"].removeprefix("Value error, "), where=where) from error


def _show_plan(source: Path, config: QuantizeConfig, shard_size: float, as_json: bool) -> None:
    from tafkir.quant.convert import open_files_of_source
    from tafkir.quant.plan import plan_quantization

    with open_files_of_source(source) as (files, hf_config):
        plan = plan_quantization(files, hf_config, config, int(shard_size * 1e9))
    if as_json:
        tensors = [
            {"name": d.name, "component": d.component, "format": d.format, "shape": d.shape, "reason": d.reason}
            for d in plan.decisions
        ]
        totals = {"source_bytes": plan.source_bytes, "output_bytes": plan.output_bytes, "files": len(plan.shards)}
        print(json.dumps({**totals, "parts": plan.rows(), "tensors": tensors}, indent=2))
        return
    head = ("part", "format", "tensors", "parameters", "from", "to", "")
    cells = [
        (
            *(row["component"], row["format"], f"{row['tensors']:,}", f"{row['parameters']:,}"),
            *(_size(row["source_bytes"]), _size(row["output_bytes"]), row["reason"]),
        )
        for row in plan.rows()
    ]
    ratio = f"{plan.source_bytes / max(1, plan.output_bytes):.2f} times smaller, {len(plan.shards)} files"
    total = (
        *("total", "", f"{len(plan.decisions):,}", f"{sum(d.numel for d in plan.decisions):,}"),
        *(_size(plan.source_bytes), _size(plan.output_bytes), ratio),
    )
    widths = [max(len(cell[i]) for cell in (head, *cells, total)) for i in range(6)]
    for cell in (head, *cells, total):
        left = "  ".join(f"{cell[i]:<{widths[i]}}" for i in range(2))
        right = "  ".join(f"{cell[i]:>{widths[i]}}" for i in range(2, 6))
        print(f"{left}  {right}  {cell[6]}".rstrip())
    searched = f", scales by {config.scale_choice}" if any("nvfp4" in row["format"] for row in plan.rows()) else ""
    print(f"preset {config.preset}, layout {config.layout}{searched}")


def _size(num_bytes: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"
