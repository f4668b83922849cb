"""How far a recursive model of 9x9 Sudoku came, by the number of givens, and what its training cost.

    python benchmarks/trm_bands.py runs/trm-sudoku9-fast --out benchmarks/results/trm_bands.json

New minimal puzzles get so many givens back as each band says; what training had in any form is left out. Beside the
scores stand the FLOPs of the training, and their share of the published recipe's 2.2e17.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from tafkir.checkpoint.trm import load_trm
from tafkir.data.puzzles.format import Cells
from tafkir.data.puzzles.parts import PuzzleSet
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.data.puzzles.sudoku import Box, fingerprint, make_puzzle
from tafkir.recipe.load import load_recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.runlog.atomic import write_json
from tafkir.runlog.rundir import RunDir
from tafkir.train.puzzle_scores import score_puzzles

PUBLISHED_FLOPS = 2.2e17
_SEED = 1_000_003


def make_band(box: Box, lowest: int, highest: int, count: int, known: set[int]) -> PuzzleSet:
    """Puzzles with `lowest` to `highest` more givens than they need, none of them known."""
    rows: list[tuple[Cells, Cells]] = []
    numbers = iter(range(count + len(known)))
    while len(rows) < count:
        random = Random(derive_seed(_SEED, "band", lowest, next(numbers)))
        sides = make_puzzle(random, box, random.randint(lowest, highest))
        question, answer = (np.array(side, dtype=np.uint8) + np.uint8(1) for side in sides)
        if fingerprint(question, box) not in known:
            rows.append((question, answer))
    return PuzzleSet(*(np.stack(side) for side in zip(*rows, strict=True)))


def measure(run: RunDir, bands: Sequence[tuple[int, int]], count: int) -> dict[str, Any]:
    """Scores by band, and the cost of the training."""
    recipe = load_recipe([str(run.path / "recipe.resolved.toml")]).recipe
    config = recipe.trm
    assert config is not None and config.puzzles.kind == "sudoku"
    stage = run.stage("trm")
    result = json.loads((stage.path / "result.json").read_text(encoding="utf-8"))
    model = load_trm(stage.checkpoint_dir).model
    box = Box(config.puzzles.box_rows, config.puzzles.box_columns)
    trained = build_puzzles(config.puzzles, derive_seed(recipe.seed, "trm", "puzzles"))
    known = {fingerprint(cells, box) for cells in trained.train.inputs}
    rows = []
    for lowest, highest in bands:
        puzzles = make_band(box, lowest, highest, count, known)
        givens = (puzzles.inputs > 1).sum(1)
        scores = score_puzzles(model, puzzles)
        kept = {key: scores[key] for key in ("exact", "cells", "by_step", "surest")}
        rows.append({"extra_givens": [lowest, highest], "mean_givens": float(givens.mean()), **kept})
    flops = config.steps * config.batch_size * model.shape.flops_per_supervision_step(train=True)
    return {
        "benchmark": "trm_bands",
        "steps": config.steps,
        "batch_size": config.batch_size,
        "model": config.model.model_dump(),
        "puzzles": config.puzzles.model_dump(exclude={"path"}),
        "parameters": result["parameters"],
        "cpu_s": result["cpu_s"],
        "train_flops": flops,
        "share_of_published_flops": flops / PUBLISHED_FLOPS,
        "test": result["test"]["exact"],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """As Markdown has it."""
    lines = ["| givens more than needed | givens | whole grids right (95 %) | cells |", "|---|---|---|---|"]
    for row in result["rows"]:
        exact, (lowest, highest) = row["exact"], row["extra_givens"]
        interval = f"{100 * exact['low']:.1f} to {100 * exact['high']:.1f}"
        lines.append(
            f"| {lowest} to {highest} | {row['mean_givens']:.0f} | {100 * exact['value']:.1f} % ({interval}) | "
            f"{100 * row['cells']:.1f} % |"
        )
    return "\n".join(lines)


def _band(text: str) -> tuple[int, int]:
    lowest, highest = map(int, text.split("-"))
    return lowest, highest


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run directory of a recipe on Sudoku")
    default = [(30, 36), (22, 29), (14, 21), (6, 13), (0, 3)]
    parser.add_argument("--bands", type=_band, nargs="+", default=default, help="such as 0-3 20-30")
    parser.add_argument("--count", type=int, default=100, help="puzzles of a band")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = measure(RunDir.open(args.run), args.bands, args.count)
    print(f"{result['train_flops']:.2g} FLOP in {result['cpu_s']:.0f} CPU-seconds\n\n{table(result)}")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
