"""Puts a trained recursive model into the package: its checkpoint, its recipe, and a note on how it was made.

Run as `python tools/bundle_solver.py runs/trm-sudoku4 sudoku4`; `tafkir solve` then finds it by the size of the grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

SOLVERS = Path(__file__).resolve().parents[1] / "src" / "tafkir" / "solvers"

_NOTE = """# {name}

A tiny recursive model (arXiv 2510.04871) that solves {kind} of {rows} x {columns} cells: {parameters:,} parameters.

Made by `tafkir run recipe.toml` with the recipe in this folder (`{recipe}`), seed {seed}, in {steps:,} steps and
{cpu:,.0f} CPU-seconds. Of {puzzles:,} test puzzles, which training saw in none of their forms, every cell is right in
{exact:.1%} (95 % interval {low:.1%} to {high:.1%}).

    sha256 of model.safetensors: {sha256}
"""


def bundle(run: Path, name: str, target: Path = SOLVERS) -> None:
    """Copy the checkpoint of a finished run's stage `trm`, and write recipe.toml and README.md beside it."""
    (stage,) = run.glob("stages/*-trm")
    result = json.loads((stage / "result.json").read_text(encoding="utf-8"))
    folder = target / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stage / "checkpoint", folder)
    (folder / "recipe.toml").write_text(chosen(run / "recipe.resolved.toml"), encoding="utf-8")
    puzzles = json.loads((folder / "config.json").read_text(encoding="utf-8"))["puzzles"]
    lineage = json.loads((folder / "tafkir.json").read_text(encoding="utf-8"))["lineage"]
    exact = result["test"]["exact"]
    note = _NOTE.format(
        name=name,
        kind={"sudoku": "Sudoku", "maze": "mazes"}[puzzles["kind"]],
        rows=puzzles["rows"],
        columns=puzzles["columns"],
        parameters=result["parameters"],
        recipe=lineage["recipe"],
        seed=lineage["seed"],
        steps=result["steps"],
        cpu=result["cpu_s"],
        puzzles=result["test"]["puzzles"],
        exact=exact["value"],
        low=exact["low"],
        high=exact["high"],
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )
    (folder / "README.md").write_text(note, encoding="utf-8")


def chosen(resolved: Path) -> str:
    """What a resolved recipe says of the stage `trm` and of the whole run, without what is default anyway."""
    kept: list[str] = []
    head = ""
    for line in resolved.read_text(encoding="utf-8").splitlines():
        value, _, origin = line.partition("  # ")
        if line.startswith("["):
            head = line
        elif "=" in value and origin.strip() != "default" and (not head or head.startswith("[trm")):
            kept += [*(["", head] if head and head not in kept else []), value.rstrip()]
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    args = parser.parse_args()
    bundle(args.run, args.name)
