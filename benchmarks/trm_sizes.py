"""Larger mazes than a recursive model was trained on, and more supervision steps than it was trained with.

    python benchmarks/trm_sizes.py runs/trm-maze-small --out benchmarks/results/trm_sizes.json

The mixer of neighbours has no weight that knows the grid's size, so the same weights answer any. Mazes of each side
have ways of at least twice the side; right is a whole grid, after so many supervision steps.
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
from tafkir.data.puzzles.maze import make_maze, maze_format
from tafkir.intervals import accuracy
from tafkir.models.solving import solve_puzzles
from tafkir.models.trm import Trm
from tafkir.recipe.seeds import derive_seed
from tafkir.runlog.atomic import write_json
from tafkir.runlog.rundir import RunDir

_SEED = 1_000_003


def measure(model: Trm, side: int, steps: Sequence[int], count: int) -> dict[str, Any]:
    """Shares of whole grids right after each number of supervision steps, and at the highest q of all of them."""
    format = maze_format(side, side)
    random = Random(derive_seed(_SEED, "mazes", side))
    mazes = [make_maze(random, side, side, 2 * side) for _ in range(count)]
    questions, answers = (np.stack([format.encode(pair[part]) for pair in mazes]) for part in (0, 1))
    solved = solve_puzzles(model.resized(side, side), questions, steps=max(steps), batch_size=50)
    right = np.all(solved.right(answers), axis=-1)
    return {
        "side": side,
        "mean_moves": float((answers == format.symbols.index("o")).sum(1).mean()) + 1,
        "exact": {str(step): accuracy(right[step - 1].tolist()).to_dict() for step in steps},
        "surest": accuracy(right[solved.surest(), np.arange(count)].tolist()).to_dict(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown has it."""
    steps = list(rows[0]["exact"])
    lines = [
        f"| side | moves | {' | '.join(f'{step} steps' for step in steps)} | highest q |",
        f"|---|---|{'---|' * (len(steps) + 1)}",
    ]
    for row in rows:
        found = [*row["exact"].values(), row["surest"]]
        shares = [
            f"{100 * each['value']:.0f} % ({100 * each['low']:.0f} to {100 * each['high']:.0f})" for each in found
        ]
        lines.append(f"| {row['side']} | {row['mean_moves']:.0f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run directory, or a checkpoint folder")
    parser.add_argument("--sides", type=int, nargs="+", default=[13, 17, 21, 25])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--count", type=int, default=100, help="mazes of a side")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = args.run if (args.run / "config.json").is_file() else RunDir.open(args.run).stage("trm").checkpoint_dir
    model = load_trm(folder).model
    rows = [measure(model, side, args.steps, args.count) for side in args.sides]
    print(table(rows))
    if args.out:
        shape = json.loads(model.shape.model_dump_json())
        write_json(args.out, {"benchmark": "trm_sizes", "model": shape, "count": args.count, "rows": rows})


if __name__ == "__main__":
    main()
