"""Laboratories: variants of one training, each in a folder of its own, skipped when finished and resumed when not."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from tafkir.errors import TrainingError
from tafkir.recipe.stage import StageContext
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.progress import format_duration
from tafkir.runlog.rundir import StageDir
from tafkir.train.loop import FitResult, peak_rss_bytes

__all__ = ["LabVariant", "fit_variant", "run_variants"]

_logger = logging.getLogger(__name__)


class LabVariant(Protocol):
    """One training of a lab."""

    @property
    def name(self) -> str:
        """Name of its folder below the stage's `variants`."""
        ...

    @property
    def group(self) -> str:
        """Variants of one group take time in proportion to their size."""
        ...

    @property
    def size(self) -> float: ...


V = TypeVar("V", bound=LabVariant)


def run_variants(
    ctx: StageContext, variants: Sequence[V], train: Callable[[V, StageDir, str], dict[str, Any]]
) -> dict[str, Any]:
    """Train every variant that is not finished yet; each leaves a folder `variants/<name>` of its own.

    Args:
        variants: in the order in which they run.
        train: trains a variant in its directory, resuming from the states it finds there, and returns its result; gets
            its place among the variants to show.

    Returns:
        The variants' results and their totals.
    """
    results: list[dict[str, Any]] = []
    for number, variant in enumerate(variants, start=1):
        stage = StageDir(ctx.stage.path / "variants" / variant.name, ctx.stage.kind)
        result = stage.read_result()
        if result is None:
            stage.make()
            result = train(variant, stage, f"{number}/{len(variants)}")
            stage.write_result(result)
        # Needed to go on with a variant only; kept, they would be the largest part of the run.
        shutil.rmtree(stage.state_dir, ignore_errors=True)
        results.append(result)
        left = _seconds_left(variants, results)
        _logger.info("lab: %d of %d variants, about %s left", number, len(variants), format_duration(left))
    return {
        "steps": sum(result["steps"] for result in results),
        "tokens": sum(result["tokens"] for result in results),
        "wall_s": sum(result["wall_s"] for result in results),
        "cpu_s": sum(result["cpu_s"] for result in results),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        "variants": results,
    }


def _seconds_left(variants: Sequence[LabVariant], results: Sequence[Mapping[str, Any]]) -> float:
    """By the seconds that a unit of each group took so far; a group not yet seen counts as the slowest."""
    rates: dict[str, float] = {}
    for variant, result in zip(variants, results, strict=False):
        rates[variant.group] = result["wall_s"] / variant.size
    return sum(rates.get(left.group, max(rates.values())) * left.size for left in variants[len(results) :])


def fit_variant(fit: Callable[[], FitResult], stage: StageDir, name: str, tokens_of: Callable[[int], int]) -> Any:
    """What a variant's result says of its training: the totals, and where it diverged, which is no error of a lab.

    Args:
        fit: runs the training loop.
        tokens_of: tokens that so many steps take, for a training that did not get to the end.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        return {**asdict(fit()), "diverged": None}
    except TrainingError as error:
        _logger.warning("lab: %s does not train on: %s", name, error.what)
        steps = max((int(row["step"]) for row in read_jsonl(stage.metrics_path)), default=0)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        return {**asdict(FitResult(steps, tokens_of(steps), wall_s, cpu_s, peak_rss_bytes())), "diverged": str(error)}
