"""`tafkir quantize`: a checkpoint in fewer bits, as engines load it."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafkir.cli.quantize_options import (
    AsJson,
    AutoOption,
    CalibrateOption,
    ColdExpertsOption,
    ConfigFile,
    Destination,
    DryRun,
    GptqOption,
    InputScale,
    KvCacheOption,
    LayoutOption,
    MinExpertTokens,
    NonFiniteOption,
    PresetOption,
    RangesOption,
    RecordOption,
    RuleOption,
    RulesFile,
    ScalesOption,
    SchemeOption,
    SensitivityOption,
    ShardSize,
    Source,
    TokensOption,
    Workers,
)

if TYPE_CHECKING:
    from tafkir.quant.convert import QuantizeResult
    from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["quantize"]


def quantize(
    source: Source,
    out: Destination,
    scheme: SchemeOption = None,
    preset: PresetOption = None,
    rule: RuleOption = None,
    scales: ScalesOption = None,
    layout: LayoutOption = None,
    input_scale: InputScale = None,
    non_finite: NonFiniteOption = None,
    kv_cache: KvCacheOption = None,
    calibrate: CalibrateOption = None,
    tokens: TokensOption = None,
    ranges: RangesOption = None,
    gptq: GptqOption = False,
    cold_experts: ColdExpertsOption = None,
    min_expert_tokens: MinExpertTokens = None,
    record: RecordOption = None,
    auto: AutoOption = None,
    sensitivity: SensitivityOption = None,
    rules_file: RulesFile = None,
    config_file: ConfigFile = None,
    shard_size: ShardSize = 5.0,
    workers: Workers = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized copy of a checkpoint, of any size, on any machine; memory stays below a gigabyte.

    \b
    tafkir quantize ./DeepSeek-R1-0528 ./R1-NVFP4 --dry-run         what would become of every part
    tafkir quantize ./DeepSeek-R1-0528 ./R1-NVFP4 --preset r1-fp4   as NVIDIA's DeepSeek-R1-0528-FP4
    tafkir quantize ./Qwen3-30B-A3B ./out --preset all-linear --layout compressed-tensors
    tafkir quantize ./model ./out --rule 'model.layers.0.*_proj.weight=fp8_block'
    tafkir quantize ./model ./out --auto bits=5.0
    tafkir quantize ./gpt-oss-bf16 ./out --scheme mxfp4 --preset r1-fp4 --layout gpt-oss
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
    layouts   modelopt: vLLM, SGLang, TensorRT-LLM; compressed-tensors: vLLM, TensorRT-LLM, transformers; gpt-oss: the
              MXFP4 of that family, experts alone

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
    from tafkir.quant.convert import refuse_finished

    settings, rules = with_auto(_said(given), rule or [], rules_file, auto, _plain(sensitivity))
    config = _config(config_file, settings, rules, _said(calibration))
    if not dry_run:
        refuse_finished(out)
    folder = checkpoint_of(source)
    if config.auto is not None:
        config = choose_formats(folder, source, out, config, quiet=as_json)
    if dry_run or not as_json:
        _show_plan(folder, config, shard_size, as_json)
    if not dry_run:
        _tell(*_write(folder, out, config, record, shard_size, workers), as_json)


def _tell(result: QuantizeResult, found: dict[str, Any] | None, as_json: bool) -> None:
    if as_json:
        keys = ("source_bytes", "output_bytes", "resumed_bytes", "rows")
        said = {"path": str(result.path), **{key: getattr(result, key) for key in keys}, "calibration": found}
        print(json.dumps(said, indent=2))
        return
    if found:
        _show_calibration(found)
    ratio = result.source_bytes / max(1, result.output_bytes)
    resumed = f", of which {_size(result.resumed_bytes)} were there already" if result.resumed_bytes else ""
    print(f"{result.path}: {_size(result.output_bytes)}{resumed}; {ratio:.2f} times smaller, checked")


def _write(
    folder: Path, out: Path, config: QuantizeConfig, record: Path | None, shard_size: float, workers: int
) -> tuple[QuantizeResult, dict[str, Any] | None]:
    """What was done, and what calibration found where there was one."""
    workers = workers or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    max_bytes = int(shard_size * 1e9)
    if config.calibration is None:
        # Without data nothing runs the model, and torch need not be imported.
        from tafkir.quant.convert import quantize_checkpoint

        return quantize_checkpoint(folder, out, config, max_shard_bytes=max_bytes, workers=workers), None
    from tafkir.quant.calibrated import write_quantized

    return write_quantized(folder, out, config, record=record, max_shard_bytes=max_bytes, workers=workers)


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

    from tafkir.cli.auto import read_toml
    from tafkir.errors import RecipeError
    from tafkir.recipe.quantize import FORMATS, QuantizeConfig

    table = {} if file is None else read_toml(file)
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
