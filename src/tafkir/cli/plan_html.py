"""`tafkir plan MODEL --html FILE`: the planner's answers for many models and chips, on one page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tafkir.cli.plan_question import Asked

__all__ = ["write_page"]

# Beside what was asked.
_MODELS = ("ring-flash-2.0", "deepseek-r1", "qwen3-32b")
_CHIPS = ("h20", "h100", "h200", "b200", "mi300x", "ascend-910b3")


def write_page(asked: Asked, target: Path, requests: int, hardware_files: list[Path]) -> None:
    """Cross the asked model, chips and workload with well-known ones, and write the page.

    Args:
        requests: simulated at each of eight loads of a pair.

    Raises:
        RecipeError: the page's folder is missing.
    """
    from tafkir.cli.plan_show import confidence
    from tafkir.errors import RecipeError
    from tafkir.plan.grid import Grid, grid_cells
    from tafkir.plan.hardware import load_chips
    from tafkir.plan.references import find_shape
    from tafkir.plan.serving import NOT_MODELLED
    from tafkir.plan.workload import WORKLOADS
    from tafkir.report.plan_page import render_plan_page
    from tafkir.runlog.progress import Progress

    if not target.parent.is_dir():
        raise RecipeError("no such folder", where=f"--html {target}", fix=f"mkdir -p {target.parent}")
    d = asked.deployment
    known = load_chips(hardware_files)
    chips = [(d.chip, asked.chips), *((known[key], 0) for key in _CHIPS if key != d.chip.key)]
    models = {asked.name: d.shape} | {name: find_shape(name) for name in _MODELS if name != asked.name}
    workloads = {asked.workload_name: asked.workload} | {
        name: workload for name, workload in WORKLOADS.items() if name != asked.workload_name
    }
    grid = Grid(models, chips, workloads, d.precision, d.coefficients, d.engine, requests)
    cells = []
    with Progress("pairs", len(grid)) as progress:
        for cell in grid_cells(grid):
            cells.append(cell)
            progress.update(len(cells))
    notes = [
        confidence(d),
        f"Curves: {requests:,} random requests at each load (Poisson arrivals, exponential lengths), one replica's "
        "percentiles, rates of all replicas. Figures and table: means at the highest load that keeps the waits.",
        f"Not modelled: {'; '.join(NOT_MODELLED)}.",
        *sorted({f"{chip.name}: {chip.source} ({chip.date})" for chip, _ in chips}),
    ]
    data = {
        "models": {name: name for name in models},
        "chips": {chip.key: chip.name for chip, _ in chips},
        "workloads": {name: asdict(workload) for name, workload in workloads.items()},
        "cells": cells,
        "first": {"model": asked.name, "chip": d.chip.key, "workload": asked.workload_name},
        "notes": notes,
    }
    target.write_text(render_plan_page(data), encoding="utf-8")
    print(f"{target}: {len(cells)} pairs of model and chip, {target.stat().st_size / 1e3:,.0f} kB")
