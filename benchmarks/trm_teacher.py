"""What a teacher is worth where few puzzles come with their answers: 4x4 Sudoku, a handful of them labelled.

    python benchmarks/trm_teacher.py --labelled 3 --seeds 3

Each arm is a recipe of its own, run by `tafkir run`: without a teacher; with the teacher's answers to the unlabelled
puzzles, kept where they keep the rules; the same with its distributions to imitate; and with every label, as a ceiling.
The teacher is a model of the same size that trained twice as long on every label. Scores are whole grids right on
unseen puzzles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from tafkir.runlog.atomic import read_json, write_json
from tafkir.runlog.rundir import RunDir

_RESULT = Path(__file__).parent / "results" / "trm_teacher.json"
_COMMON = ("report=", "threads=1", "trm.validate_every=0", "trm.select=last")


def run(folder: Path, name: str, seed: int, *overrides: str) -> dict[str, Any]:
    """One training; its result."""
    given = [f"seed={seed}", *_COMMON, *overrides]
    command = [sys.executable, "-m", "tafkir.cli.main", "run", "trm-sudoku4", "--name", name, "--runs-dir", str(folder)]
    subprocess.run([*command, *(part for value in given for part in ("--set", value))], check=True)
    result: dict[str, Any] = read_json(RunDir(folder / name).stage("trm").path / "result.json")
    return result


def main() -> None:
    """Run every arm with every seed, print the table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=int, default=3, help="puzzles whose answers are known")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--teacher", type=Path, help="a trained model's run directory; else one is trained first")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/trm-teacher"))
    args = parser.parse_args()
    teacher = args.teacher or args.runs_dir / "teacher"
    if args.teacher is None:
        run(args.runs_dir, "teacher", 100, f"trm.steps={2 * args.steps}")
    few = f"trm.num_labelled={args.labelled}"
    taught = (few, "trm.teacher.kind=checkpoint", f"trm.teacher.checkpoint={json.dumps(str(teacher.absolute()))}")
    arms: dict[str, tuple[str, ...]] = {
        "no teacher": (few,),
        "its answers": (*taught, "trm.teacher.weight=0"),
        "its answers and distributions": (*taught, "trm.teacher.weight=0.5"),
        "every label": (),
    }
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):
        for arm, overrides in arms.items():
            name = f"{arm.replace(' ', '-')}-{seed}"
            result = run(args.runs_dir, name, seed, f"trm.steps={args.steps}", *overrides)
            test = result["test"]
            taught_by = {"teacher": result.get("teacher"), "cpu_s": result["cpu_s"]}
            rows[arm].append({"seed": seed, "exact": test["exact"]["value"], "cells": test["cells"], **taught_by})
            print(
                f"seed {seed}  {arm:<30} {100 * test['exact']['value']:5.1f} %  {result['cpu_s']:.0f} CPU-s", flush=True
            )
        write_json(_RESULT, summarize(rows, args, teacher))


def summarize(rows: dict[str, list[dict[str, Any]]], args: argparse.Namespace, teacher: Path) -> dict[str, Any]:
    """The settings, the teacher's own score, and each arm with its median."""
    scored = read_json(RunDir(teacher).stage("trm").path / "result.json")
    arms = [
        {"arm": arm, "median_exact": median(row["exact"] for row in found), "runs": found}
        for arm, found in rows.items()
    ]
    settings = {"labelled": args.labelled, "steps": args.steps, "teacher_exact": scored["test"]["exact"]}
    return {**settings, "teacher_steps": scored["steps"], "arms": arms}


if __name__ == "__main__":
    main()
