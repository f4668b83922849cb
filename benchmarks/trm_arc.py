"""What a recursive model solves of ARC tasks: pass@K by the number of forms that vote, beside simple rules.

    tafkir run trm-arc-mini
    python benchmarks/trm_arc.py runs/trm-arc-mini --out benchmarks/results/trm_arc.json

A run that is not finished is measured, too: the average of the weights in its newest training state.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tafkir.checkpoint.trm import load_trm
from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.models.trm import Trm, build_trm
from tafkir.recipe.load import load_recipe
from tafkir.recipe.schema import Recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tafkir.train.arc_scores import score_arc
from tafkir.train.deep_supervision import RecursiveTrainer


def newest_state(run: RunDir, recipe: Recipe, puzzles: ArcSets) -> tuple[Trm, int]:
    """The average of the weights in the newest training state, and its step."""
    assert recipe.trm is not None
    format = puzzles.format
    shape = recipe.trm.model.for_puzzles(format.vocab_size, format.num_cells, puzzles.num_puzzle_ids)
    trainer = RecursiveTrainer(build_trm(shape, 0), recipe.trm)
    step, _, _ = trainer.load_state(run.stage("trm").path / "state")
    if trainer.average is not None:
        average = trainer.average.tensors
        for name, parameter in trainer.model.named_parameters():
            parameter.data.copy_(average[name])
    return trainer.model.eval(), step


def measure(run: RunDir, votes: Sequence[int]) -> dict[str, Any]:
    """Scores of a run's model on its test tasks, for each number of forms that vote."""
    recipe = load_recipe([str(run.path / "recipe.resolved.toml")]).recipe
    assert recipe.trm is not None
    puzzles = build_puzzles(recipe.trm.puzzles, derive_seed(recipe.seed, "trm", "puzzles"))
    assert isinstance(puzzles, ArcSets)
    stage = run.stage("trm")
    if stage.checkpoint_dir.is_dir():
        model, step = load_trm(stage.checkpoint_dir).model, recipe.trm.steps
    else:
        model, step = newest_state(run, recipe, puzzles)
    began = time.process_time()
    rows = []
    for forms in votes:
        scores, _ = score_arc(model, puzzles, max_forms=forms)
        rows.append(scores)
    cpu_s = [row["time/cpu_s"] for row in read_jsonl(stage.path / "timings.jsonl") if row["step"] <= step]
    return {
        "benchmark": "trm_arc",
        "run": run.path.name,
        "step": step,
        "of_steps": recipe.trm.steps,
        "train_cpu_s_per_step": sum(cpu_s) / max(1, len(cpu_s)),
        "cpu_s": time.process_time() - began,
        "parameters": model.shape.num_parameters(puzzle_table=False),
        "counts": puzzles.counts(),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each number of forms, and the baselines."""
    lines = ["| who | pass@1 | pass@2 | 95 % interval of pass@2 |", "| --- | --- | --- | --- |"]

    def line(name: str, found: dict[str, Any]) -> str:
        two = found.get("2", found["1"])
        return f"| {name} | {100 * found['1']['value']:.1f} | {100 * two['value']:.1f} | {interval(two)} |"

    def interval(estimate: dict[str, Any]) -> str:
        return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"

    lines += [line(f"model, {row['forms']} forms vote", row["pass_at"]) for row in result["rows"]]
    baselines = result["rows"][-1]["baselines"]
    lines += [line("simple rules", baselines["rules"]), line("the input as it is", baselines["copy"])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a trm recipe on ARC tasks")
    parser.add_argument("--votes", type=int, nargs="*", default=[1, 2, 4], help="forms that vote")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    args = parser.parse_args(arguments)
    result = measure(RunDir.open(args.run), args.votes)
    print(f"after {result['step']} of {result['of_steps']} steps\n\n{table(result)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
