"""`tafkir run RECIPE --seeds 0,1,2`: one run for each seed, and one report over all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tafkir.runlog.rundir import RunDir

__all__ = ["parse_seeds", "run_seeds"]


def parse_seeds(text: str) -> list[int]:
    """The seeds of `0,1,2` or `0-4`.

    Raises:
        RecipeError: it is no such list, names a seed twice, or several processes were started.
    """
    from tafkir.errors import RecipeError
    from tafkir.recipe.parallel import world_size

    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds):
        raise RecipeError(f"{text!r} is no list of seeds", where="--seeds", expected="different numbers, such as 0,1,2")
    if world_size() > 1:
        raise RecipeError(
            "several seeds run one after the other in one process", where="--seeds", fix="start each with --set seed=N"
        )
    return seeds


def run_seeds(seeds: list[int], folder: Path, run_one: Callable[[int, RunDir], Any], *, as_json: bool) -> None:
    """Run each seed in `folder/seed-<n>`, then write `seeds.json` and `seeds.html` beside them and print the figures.

    Finished runs are skipped, so the same command goes on where it stopped, and more seeds can be added.
    """
    from tafkir.report.seeds import render_seeds, render_seeds_table, summarize_seeds
    from tafkir.runlog.atomic import write_json, write_text
    from tafkir.runlog.rundir import RunDir

    runs = {seed: folder / f"seed-{seed}" for seed in seeds}
    for seed, path in runs.items():
        run_one(seed, RunDir(path))
    summary = summarize_seeds(runs)
    write_json(folder / "seeds.json", summary)
    write_text(folder / "seeds.html", render_seeds(summary, runs))
    if as_json:
        print(json.dumps({"runs": {seed: str(path) for seed, path in runs.items()}, **summary}, indent=2))
        return
    print(f"\n{render_seeds_table(summary)}")
    print(f"\nRun directories: {', '.join(str(path) for path in runs.values())}")
    print(f"Report:          {folder / 'seeds.html'}")
