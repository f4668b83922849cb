"""Quantizes a checkpoint as its settings say: on data where they ask for a calibration, and without where not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.checkpoint.folder import MAX_SHARD_BYTES
from tafkir.quant.calibrate import calibrate_checkpoint
from tafkir.quant.calibration import Calibration
from tafkir.quant.calibration_text import read_calibration_text
from tafkir.quant.convert import QuantizeResult, calibration_folder, quantize_checkpoint, refuse_finished
from tafkir.quant.coverage import coverage_rows
from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["quantize_calibrated", "summarize_calibration", "write_quantized"]


def write_quantized(
    source: Path | str,
    path: Path | str,
    config: QuantizeConfig,
    *,
    record: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    lineage: Mapping[str, Any] | None = None,
) -> tuple[QuantizeResult, dict[str, Any] | None]:
    """`quantize_checkpoint`, calibrated on `config.calibration.text` where there is one.

    Returns:
        What was done, and `summarize_calibration` where something was calibrated.
    """
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "workers": workers, "lineage": lineage}
    if config.calibration is None:
        return quantize_checkpoint(source, path, config, **options), None
    documents = read_calibration_text(source, config.calibration)
    result, calibration = quantize_calibrated(source, path, config, documents, record=record, **options)
    return result, summarize_calibration(calibration)


def quantize_calibrated(
    source: Path | str,
    path: Path | str,
    config: QuantizeConfig,
    documents: Sequence[Sequence[int]],
    *,
    record: Path | str | None = None,
    **options: Any,
) -> tuple[QuantizeResult, Calibration]:
    """Calibrate on token ids, then quantize.

    Args:
        source: as in `quantize_checkpoint`.
        path: as there.
        config: with `calibration` set.
        documents: token ids.
        record: folder of the calibration, which stays and is used again by the same work in another layout, or with
            other ranges; None puts it beside `path` as `.NAME.calibration` until the checkpoint is finished.
        options: of `quantize_checkpoint`.

    Raises:
        CheckpointError, RecipeError, CapacityError: as `calibrate_checkpoint` and `quantize_checkpoint`.
    """
    path = Path(path)
    folder = calibration_folder(path) if record is None else Path(record)
    refuse_finished(path)
    calibration = calibrate_checkpoint(source, folder, config, documents, replace=record is None)
    result = quantize_checkpoint(source, path, config, calibration=calibration, **options)
    if record is None:
        shutil.rmtree(folder)
    return result, calibration


def summarize_calibration(calibration: Calibration) -> dict[str, Any]:
    """What was read, and what came of it, as JSON values.

    `gptq.mean_error` is the mean over weights of the output error over that of the nearest codes.
    """
    errors = [error for layer in calibration.layers for error in layer["errors"].values()]
    reach = list(calibration.ranges.values())
    return {
        "text": calibration.content["text"],
        "tokens": calibration.content["tokens"],
        "documents": calibration.content["documents"],
        "ranges": calibration.config.ranges,
        "smallest_range": min(reach),
        "largest_range": max(reach),
        "coverage": coverage_rows(calibration.coverage),
        "experts": [{"layer": layer.layer, **layer.to_json()} for layer in calibration.coverage],
        "gptq": {"weights": len(errors), "mean_error": sum(errors) / len(errors)} if errors else None,
    }
