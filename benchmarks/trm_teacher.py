"""What a teacher is worth where few puzzles come with their answers: 4x4 Sudoku, a handful of them labelled.

    python benchmarks/trm_teacher.py --labelled 3 --seeds 3

Each arm is a recipe of its own, run by `tafkir run`: without a teacher; with the teacher's answers to the unlabelled
puzzles, kept where they keep the rules; the same with its distributions to imitate; and with every label, as a ceiling.
The teacher is a model of the same size that trained half again as long on every label. Scores are whole grids right on
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
_COMMON = (
    "report=", "threads=1", "trm.optimizer=muon", "trm.muon_learning_rate=0.005", "trm.learning_rate=3e-3",
    "trm.warmup_steps=20", "trm.save_every=1000", "trm.validate_every=0", "trm.select=last", "trm.precision=bfloat16",
    "trm.model.hidden_size=64",
)  # fmt: skip


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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/trm-teacher"))
    args = parser.parse_args()
    steps = f"trm.steps={args.steps}"
    teacher = run(args.runs_dir, "teacher", 100, f"trm.steps={3 * args.steps // 2}")
    place = RunDir(args.runs_dir / "teacher").stage("trm").checkpoint_dir
    few = f"trm.num_labelled={args.labelled}"
    taught = (few, "trm.teacher.kind=checkpoint", f"trm.teacher.checkpoint={json.dumps(str(place))}")
    arms = {
        "no teacher": (few,),
        "its answers": (*taught, "trm.teacher.weight=0"),
        "its answers and distributions": (*taught, "trm.teacher.weight=0.5"),
        "every label": (),
    }
    rows = []
    for arm, overrides in arms.items():
        results = [
            run(args.runs_dir, f"{arm.replace(' ', '-')}-{seed}", seed, steps, *overrides) for seed in range(args.seeds)
        ]
        exact = [result["test"]["exact"]["value"] for result in results]
        cells = [result["test"]["cells"] for result in results]
        counts = [result.get("teacher") for result in results]
        cpu = median(result["cpu_s"] for result in results)
        rows.append({"arm": arm, "exact": exact, "cells": cells, "teacher": counts, "cpu_s": cpu})
        shown = ", ".join(f"{100 * value:.1f}" for value in exact)
        print(f"{arm:<30} median {100 * median(exact):5.1f} % ({shown})  {cpu:.0f} CPU-s", flush=True)
    settings = {"labelled": args.labelled, "seeds": args.seeds, "steps": args.steps}
    write_json(_RESULT, {**settings, "teacher": teacher["test"]["exact"], "arms": rows})


if __name__ == "__main__":
    main()
