"""What finished runs of the demo's recipe took and reached, stage by stage, from what they left behind.

    make demo
    python benchmarks/demo.py runs/wordmath-tiny --out benchmarks/results/demo.json

Of several runs, with seeds of their own, what RLVR changes and what SFT is above the best single operator is pooled:

    tafkir run recipes/wordmath-tiny.toml --set seed=1 --name wordmath-tiny-1
    python benchmarks/demo.py runs/wordmath-tiny runs/wordmath-tiny-1 --out benchmarks/results/demo.seeds.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
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
    """Seconds, peak bytes and scores of a run: of each stage, what four bits keep, drafts, the solver."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("stages/*/result.json"))]
    stages = {result["stage"]: result for result in results}
    measured = [result for result in results if result.get("wall_s") is not None]
    keys = ("stage", "wall_s", "cpu_s", "peak_rss_bytes", "kernels")
    evaluation = stages.get("eval", {})
    drafts = stages.get("mtp", {}).get("mtp", {})
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (datetime.fromisoformat(json.loads(line)["time"]) for line in (lines[0], lines[-1]))
    return {
        "name": run.name,
        "clock_s": (last - first).total_seconds(),
        "wall_s": sum(result["wall_s"] for result in measured),
        "peak_rss_bytes": max(result.get("peak_rss_bytes", 0) for result in measured),
        "stages": [{key: result.get(key) for key in keys} for result in measured],
        "samples": evaluation.get("samples"),
        "scores": {
            name: {source: {key: found[key] for key in ("greedy", "average")} for source, found in sources.items()}
            for name, sources in evaluation.get("stages", {}).items()
        },
        "baselines": evaluation.get("baselines", {}),
        "differences": evaluation.get("differences", []),
        "kept": evaluation.get("retention", []),
        "drafts_accepted": {key.split("/")[1]: value for key, value in drafts.items() if "acceptance" in key},
        "solver": stages.get("trm", {}).get("test", {}).get("exact"),
        "reward_model": stages.get("reward", {}).get("heldout", {}).get("accuracy"),
        "quantized_ratio": stages.get("quantize", {}).get("ratio"),
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
    outcome: dict[str, Any] = {"benchmark": "demo", "runs": [describe_run(run) for run in args.runs]}
    if len(args.runs) > 1:
        compare = [sys.executable, "-m", "tafkir.cli.main", "compare", "--pool", *map(str, args.runs), "--json"]
        outcome["compare"] = json.loads(subprocess.run(compare, check=True, capture_output=True, text=True).stdout)
        outcome["sft_less_best_single_operator"] = against_baseline(args.runs, "sft")
    text = json.dumps(outcome, indent=1)
    print(text)
    args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
