"""Time, memory and pooled accuracy of finished runs of the demo's recipe, from what they left behind.

make demo
tafkir run recipes/wordmath-tiny.toml --set seed=1 --name wordmath-tiny-1
python benchmarks/demo.py runs/wordmath-tiny runs/wordmath-tiny-1 --out benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tafkir.data.corpus import load_corpus
from tafkir.eval.metrics import pooled_difference
from tafkir.eval.sides import load_run
from tafkir.eval.summary import problem_scores
from tafkir.recipe.load import load_recipe
from tafkir.tasks.baselines import fit_single_operator
from tafkir.tasks.math import WordProblems


def describe_run(run: Path) -> dict[str, Any]:
    """Seconds and peak bytes of each stage of a run, and over all of them."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("stages/*/result.json"))]
    measured = [result for result in results if result.get("wall_s") is not None]
    keys = ("stage", "wall_s", "cpu_s", "peak_rss_bytes", "kernels")
    return {
        "name": run.name,
        "wall_s": sum(result["wall_s"] for result in measured),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in measured),
        "stages": [{key: result.get(key) for key in keys} for result in measured],
    }


def against_baseline(runs: list[Path], stage: str) -> dict[str, Any]:
    """Greedy answers of a stage less those of the best single operator, problem by problem, pooled over the runs."""
    corpus = load_corpus(load_recipe(["wordmath-tiny"]).recipe.data)
    guess, task = fit_single_operator(corpus.train), WordProblems()
    solved = {
        example.id: [float(task.grade(example, guess(example.question) or "").correct)]
        for example in (problem.as_example() for problem in corpus.part("test"))
    }
    rows = {}
    for source in ("all", "gsm8k", "svamp"):
        pairs = []
        for run in runs:
            scores = problem_scores(load_run(run).answers[stage], "greedy", source)
            pairs.append(({name: solved[name] for name in scores}, scores))
        rows[source] = pooled_difference(pairs).to_dict()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="write the JSON to this file")
    args = parser.parse_args()
    compare = [sys.executable, "-m", "tafkir.cli.main", "compare", "--pool", *map(str, args.runs), "--json"]
    pooled = json.loads(subprocess.run(compare, check=True, capture_output=True, text=True).stdout)
    outcome = {
        "benchmark": "demo",
        "runs": [describe_run(run) for run in args.runs],
        "compare": pooled,
        "sft_less_best_single_operator": against_baseline(args.runs, "sft"),
    }
    args.out.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
