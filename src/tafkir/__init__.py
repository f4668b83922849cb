"""Tafkir: build, train, shrink, serve, prove and plan reasoning models that win by structure."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["__version__", "solve"]

__version__ = "0.1.0"


def solve(
    puzzle: str,
    model: str | Path | None = None,
    *,
    max_steps: int | None = None,
    halt_threshold: float | None = 0.0,
    **search: Any,
) -> Any:
    """Solve a puzzle in text with a recursive model: `print(tafkir.solve("1..4.2.....3....", "runs/trm-sudoku4"))`.

    The answer is a `tafkir.engine.puzzles.PuzzleAnswer`, whose text is the solved grid or "unsolved"; what may be given
    and what is raised stands at `tafkir.engine.puzzles.solve`. `search` are fields of `tafkir.models.search.Search`,
    such as `runs=16, noise=0.3`. torch is imported here, not with the package.
    """
    options = {"max_steps": max_steps, "halt_threshold": halt_threshold}
    if search:
        options["search"] = import_module("tafkir.models.search").Search(**search)
    return import_module("tafkir.engine.puzzles").solve(puzzle, model, **options)
