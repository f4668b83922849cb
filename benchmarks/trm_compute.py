"""What more thinking at test time buys a trained recursive model: accuracy against compute, on puzzles it never saw.

Compute is counted in runs of N_sup supervision steps. Compared are longer runs, and several runs that differ by noise
on the latent (PTRM, arXiv 2605.19943) or by the form of the puzzle, of which one is picked by confidence, by vote, or
by the rules of the puzzle.

    tafkir run trm-sudoku6
    python benchmarks/trm_compute.py runs/trm-sudoku6 --out benchmarks/results/trm_compute.json \\
        --picture docs/img/trm-compute.svg
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.mhc_lab import picture
from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.rules import has_rules, is_right, symmetry_of
from tafkir.data.puzzles.sets import PuzzleSet, build_puzzles
from tafkir.intervals import accuracy
from tafkir.models.search import Runs, Search, search_puzzles
from tafkir.models.solving import solve_puzzles
from tafkir.recipe.load import load_recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.report.charts import Line, line_chart, percent
from tafkir.report.lab import LabFigure
from tafkir.runlog.rundir import RunDir

Row = dict[str, Any]
COLOURS = ("c-baseline", "c-second", "c-third", "c-rlvr", "c-pretrain")


def unseen_puzzles(run: RunDir, count: int) -> PuzzleSet:
    """The puzzles that the run measured on, at most so many: training saw them in none of their forms."""
    recipe = load_recipe([str(run.path / "recipe.resolved.toml")]).recipe
    assert recipe.trm is not None
    test = build_puzzles(recipe.trm.puzzles, derive_seed(recipe.seed, "trm", "puzzles")).test
    return PuzzleSet(test.inputs[:count], test.labels[:count], test.puzzle_ids)


def row(variant: str, pick: str, compute: float, right: Sequence[bool], flops: float) -> Row:
    return {
        "variant": variant,
        "pick": pick,
        "compute": compute,
        "flops_per_puzzle": flops * compute,
        **accuracy(right).to_dict(),
    }


def longer_runs(solver: TrmCheckpoint, test: PuzzleSet, most: int, flops: float) -> Iterator[Row]:
    """One run, up to `most` times as long: its last answer, and the first that keeps the rules."""
    steps = solver.model.shape.max_supervision_steps
    solved = solve_puzzles(solver.model, test.inputs, steps=most * steps)
    right = solved.right(test.labels).all(-1)
    times = 1
    while times <= most:
        yield row("longer", "last", times, right[times * steps - 1].tolist(), flops)
        if has_rules(solver.puzzles):
            kept = [any_right(solver, test, solved.answers[: times * steps], i) for i in range(len(test))]
            yield row("longer", "rules", times, kept, flops)
        times *= 2


def any_right(solver: TrmCheckpoint, test: PuzzleSet, answers: np.ndarray, puzzle: int) -> bool:
    """Whether one of the answers [..., N, L] to a puzzle keeps the rules."""
    distinct = np.unique(answers[..., puzzle, :].reshape(-1, test.inputs.shape[1]), axis=0)
    return any(is_right(solver.puzzles, test.inputs[puzzle], answer) for answer in distinct)


def several_runs(solver: TrmCheckpoint, test: PuzzleSet, variant: str, search: Search, flops: float) -> Iterator[Row]:
    """1, 2, 4, ... runs of N_sup steps, picked in every way."""
    found = search_puzzles(solver.model, solver.puzzles, test.inputs, search)
    count = 1
    while count <= search.runs:
        runs = Runs(found.answers[:, :count], found.q_halt[:, :count])
        picks: tuple[Literal["q", "vote"], ...] = ("q", "vote")
        for pick in picks:
            right = (runs.taken(pick) == test.labels).all(-1)
            yield row(variant, pick, count, right.tolist(), flops)
        if has_rules(solver.puzzles):
            kept = [any_right(solver, test, runs.answers, i) for i in range(len(test))]
            yield row(variant, "rules", count, kept, flops)
        count *= 2


def measure(run: RunDir, *, puzzles: int, runs: int, noise: Sequence[float], seed: int) -> dict[str, Any]:
    """All curves of a run's model."""
    solver = load_trm(run.stage("trm").checkpoint_dir)
    test = unseen_puzzles(run, puzzles)
    flops = solver.model.shape.max_supervision_steps * solver.model.shape.flops_per_supervision_step()
    began = time.process_time()
    rows = list(longer_runs(solver, test, runs, flops))
    for level in noise:
        search = Search(runs=runs, noise=level, seed=seed)
        rows += several_runs(solver, test, f"noise {level:g}", search, flops)
    if symmetry_of(solver.puzzles):
        rows += several_runs(solver, test, "permuted", Search(runs=runs, permute=True, seed=seed), flops)
    return {
        "benchmark": "trm_compute",
        "run": run.path.name,
        "kind": solver.puzzles.kind,
        "puzzles": len(test),
        "supervision_steps": solver.model.shape.max_supervision_steps,
        "seed": seed,
        "cpu_s": time.process_time() - began,
        "torch": torch.__version__,
        "rows": rows,
    }


def curves(rows: Sequence[Row], pick: str) -> list[Line]:
    """One line for each variant, in the same colour in every panel; without rules a longer run has its last answer."""
    lines = []
    for name, colour in zip(dict.fromkeys(r["variant"] for r in rows), COLOURS, strict=False):
        wanted = "last" if name == "longer" and pick != "rules" else pick
        points = [(r["compute"], r["value"]) for r in rows if (r["variant"], r["pick"]) == (name, wanted)]
        lines.append(Line("one longer run" if name == "longer" else name, points, colour, dots=True))
    return [line for line in lines if line.points]


def figures(result: dict[str, Any]) -> list[LabFigure]:
    """Accuracy by compute on one scale, a panel for each way to pick."""
    panels = []
    titles = {"q": "Picked by confidence", "vote": "Picked by vote", "rules": "Picked by the rules"}
    lowest = min(r["value"] for r in result["rows"])
    for pick, title in titles.items():
        lines = curves(result["rows"], pick)
        if any(r["pick"] == pick for r in result["rows"]):
            unit = f"share of {result['puzzles']} unseen puzzles solved, by runs' worth of compute"
            chart = line_chart(
                lines, title=title, x_label="runs", y_format=lambda v: percent(v, 0), y_min=lowest, y_max=1.0
            )
            panels.append(LabFigure(pick, title, unit, "", lines, chart))
    return panels


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each variant and pick, a column for each amount of compute."""
    computes = sorted({r["compute"] for r in rows})
    lines = [["variant", "picked by", *(f"{c:g}x" for c in computes)], ["---"] * (2 + len(computes))]
    for key in dict.fromkeys((r["variant"], r["pick"]) for r in rows):
        found = {r["compute"]: r for r in rows if (r["variant"], r["pick"]) == key}
        lines.append([*key, *(f"{100 * found[c]['value']:.1f}" if c in found else "" for c in computes)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a trm recipe, or the JSON of an earlier measurement")
    parser.add_argument("--puzzles", type=int, default=500, help="test puzzles, at most")
    parser.add_argument("--runs", type=int, default=16, help="runs, at most")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.1, 0.3, 1.0], help="standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this file")
    args = parser.parse_args(arguments)
    if args.run.suffix == ".json":
        result = json.loads(args.run.read_text(encoding="utf-8"))
    else:
        result = measure(RunDir.open(args.run), puzzles=args.puzzles, runs=args.runs, noise=args.noise, seed=args.seed)
    print(table(result["rows"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_text(picture(figures(result), columns=3), encoding="utf-8")


if __name__ == "__main__":
    main()
