"""What learning vectors for tasks that a model has never seen is worth, and costs: test-time training.

    python benchmarks/trm_unseen_tasks.py --runs-dir runs --out benchmarks/results/trm_unseen.1d-arc.json
    python benchmarks/trm_unseen_tasks.py --run runs/trm-arc-mini --out benchmarks/results/trm_unseen.mini-arc.json

Without a run, every tenth task of 1D-ARC is put aside, and `trm-arc-mini` is trained on the others with `tafkir run` (a
finished run is taken as it is, a killed one goes on). With a run, which may be half way, the unseen tasks are those of
ARC-AGI-1 whose grids all fit its canvas and that share no pair with its own. They are answered with the mean of the
known vectors, with vectors learned from their demonstrations, and with the network learning along: pass@2, and the
paired difference to the mean vectors. Test inputs whose pair, in whatever form, belongs to another task are not scored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trm_arc import newest_state

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.arc import ArcTask, read_tasks
from tafkir.data.puzzles.arc_baselines import answer_by_rules
from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.leakage import clean_tests, known_pairs, shared_tasks
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.data.puzzles.votes import ATTEMPTS, Ranking, pass_at
from tafkir.engine.arc import answer_tasks
from tafkir.intervals import Estimate, mean_interval, wilson
from tafkir.recipe.load import load_recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.runlog.atomic import write_json, write_text
from tafkir.runlog.rundir import RunDir
from tafkir.train.arc_adaptation import learn_tasks

EVERY = 10
ELSEWHERE = ("arc-agi-1/training", "arc-agi-1/evaluation")

Unseen = Sequence[tuple[ArcTask, tuple[int, ...]]]
"""Tasks, with the numbers of their test inputs that may be scored."""


def put_aside(tasks: Sequence[ArcTask]) -> tuple[list[ArcTask], Unseen]:
    """The tasks to train on, and every tenth one."""
    seen = [task for number, task in enumerate(tasks) if number % EVERY]
    unseen = list(tasks[::EVERY])
    scored = clean_tests(unseen, seen)
    return seen, [(task, numbers) for task, numbers in zip(unseen, scored, strict=True) if numbers]


def fitting(solver: TrmCheckpoint, trained: Sequence[ArcTask]) -> Unseen:
    """Tasks of ARC-AGI-1 that the model could hold and has seen no pair of."""
    sides = solver.puzzles.rows, solver.puzzles.columns
    tasks = [
        task
        for source in ELSEWHERE
        for task in read_tasks(source)
        if all(
            grid is None or (grid.shape[0] <= sides[0] and grid.shape[1] <= sides[1])
            for pair in (*task.train, *task.test)
            for grid in (pair.input, pair.output)
        )
    ]
    shared = {task.id for task in shared_tasks(tasks, known_pairs(trained))}
    clean = [task for task in tasks if task.id not in shared]
    scored = clean_tests(clean, trained)
    return [(task, numbers) for task, numbers in zip(clean, scored, strict=True) if numbers]


def open_run(run: RunDir) -> tuple[TrmCheckpoint, Unseen, dict[str, Any]]:
    """The model of a run, or of its newest training state, and tasks that are new to it."""
    recipe = load_recipe([str(run.path / "recipe.resolved.toml")]).recipe
    assert recipe.trm is not None
    puzzles = build_puzzles(recipe.trm.puzzles, derive_seed(recipe.seed, "trm", "puzzles"))
    assert isinstance(puzzles, ArcSets)
    folder = run.stage("trm").checkpoint_dir
    if folder.is_dir():
        solver, step = load_trm(folder), recipe.trm.steps
    else:
        model, step = newest_state(run, recipe, puzzles)
        solver = TrmCheckpoint(folder, model, puzzles.format, None, tuple(puzzles.identifiers))
    trained = [task for path in recipe.trm.puzzles.paths for task in read_tasks(path)]
    known = {"steps": step, "of_steps": recipe.trm.steps, "parameters": solver.model.shape.num_parameters()}
    return solver, fitting(solver, trained), {"run": known, "trained_on": len(trained)}


def as_line(task: ArcTask) -> str:
    """A task as JSON lines hold it."""
    parts = {
        part: [
            {"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs if pair.output is not None
        ]
        for part, pairs in (("train", task.train), ("test", task.test))
    }
    return json.dumps({"id": task.id, **parts})


def train_without(
    tasks: Sequence[ArcTask], name: str, runs_dir: Path, overrides: Sequence[str]
) -> tuple[TrmCheckpoint, Unseen, dict[str, Any]]:
    """A model that was trained on all tasks but those that were put aside."""
    seen, unseen = put_aside(tasks)
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir.absolute() / f"{name}-tasks.jsonl"
    write_text(path, "".join(as_line(task) + "\n" for task in seen))
    given = [f"trm.puzzles.path={json.dumps(str(path))}", "threads=1", "trm.puzzles.num_validation=40", *overrides]
    command = [sys.executable, "-m", "tafkir.cli.main", "run", "trm-arc-mini", "--name", name]
    command += ["--runs-dir", str(runs_dir), *(word for value in given for word in ("--set", value))]
    subprocess.run(command, check=True)
    stage = RunDir(runs_dir / name).stage("trm")
    result = json.loads((stage.path / "result.json").read_text(encoding="utf-8"))
    known = {key: result[key] for key in ("steps", "cpu_s", "parameters", "arc")}
    return load_trm(stage.checkpoint_dir), unseen, {"run": known, "trained_on": len(seen)}


def shares(tasks: Unseen, rankings: Sequence[Sequence[Ranking]]) -> list[float]:
    """Pass@2 of each task."""
    found = []
    for (task, numbers), answers in zip(tasks, rankings, strict=True):
        outputs = [output for number in numbers if (output := task.test[number].output) is not None]
        found.append(pass_at([answers[number] for number in numbers], outputs, ATTEMPTS))
    return found


def measure(solver: TrmCheckpoint, unseen: Unseen, steps: int, weights_rate: float) -> list[dict[str, Any]]:
    """A row for the rules, for mean vectors, and for each way of learning."""
    tasks = [task for task, _ in unseen]
    ruled = shares(unseen, [answer_by_rules(task) for task in tasks])
    rows = [{"who": "simple rules", "cpu_s": 0.0, "pass_at_2": estimate(ruled).to_dict()}]
    before: list[float] = []
    ways = (("mean vectors", 0, None), ("vectors learned", steps, None), ("weights, too", steps, weights_rate))
    for who, count, rate in ways:
        began = time.process_time()
        learned = learn_tasks(solver, tasks, steps=count, learning_rate=rate)
        cpu_s = time.process_time() - began
        answers = answer_tasks(learned, tasks)
        found = shares(unseen, [answers[task.id] for task in tasks])
        before = before or found
        gained = mean_interval([after - first for after, first in zip(found, before, strict=True)])
        row = {"who": who, "steps": count, "learning_rate": rate, "cpu_s": cpu_s}
        rows.append(row | {"pass_at_2": estimate(found).to_dict(), "over_mean_vectors": gained.to_dict()})
        print(f"{who}: {100 * row_value(rows[-1]):.1f} %, {cpu_s:.0f} CPU-s", file=sys.stderr, flush=True)
    return rows


def estimate(shares: Sequence[float]) -> Estimate:
    """Wilson's interval where every task is solved or not; Student's where there are parts."""
    if all(share in (0.0, 1.0) for share in shares):
        return wilson(round(sum(shares)), len(shares))
    return mean_interval(shares)


def row_value(row: dict[str, Any]) -> float:
    return float(row["pass_at_2"]["value"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown has it."""
    lines = ["| tasks never seen | pass@2 (95 %) | against mean vectors | CPU-s of learning |", "|---|---|---|---|"]
    for row in rows:
        cells = [row["who"], _percent(row["pass_at_2"])]
        cells += [_percent(row["over_mean_vectors"]) if "over_mean_vectors" in row else "–", f"{row['cpu_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of a recipe on ARC tasks; else one is trained on 1D-ARC")
    parser.add_argument("--name", default="trm-arc-1d", help="of the run")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="more changes of the recipe")
    parser.add_argument("--steps", type=int, default=600, help="of learning the tasks that were put aside")
    parser.add_argument("--weights-rate", type=float, default=1e-3, help="learning rate of the weights in the last row")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.run is not None:
        solver, unseen, about = open_run(RunDir.open(args.run))
    else:
        solver, unseen, about = train_without(read_tasks("1d-arc"), args.name, args.runs_dir, args.overrides)
    rows = measure(solver, unseen, args.steps, args.weights_rate)
    print(table(rows))
    if args.out:
        write_json(args.out, {"benchmark": "trm_unseen_tasks", **about, "unseen": len(unseen), "rows": rows})


if __name__ == "__main__":
    main()
