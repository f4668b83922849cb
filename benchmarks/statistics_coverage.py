"""How often the intervals of `tafkir eval` and `tafkir compare` hold the truth, by simulation of tasks as they are met.

A task is drawn anew each time: its questions have difficulties of their own (beta-distributed), and each model answers
each question k times. The truth is the expected score over all questions, or the expected difference. Wanted: 95 % of
the intervals of a score within 1.5 points, and at least 93 % of those of a comparison. TOST, at its edge (the true
difference is the margin), may claim too much in at most 5 %.

    python benchmarks/statistics_coverage.py --out benchmarks/results/statistics_coverage.json

About five CPU-minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from tafkir.eval.metrics import accuracy, avg_at_k, paired_difference, paired_ratio
from tafkir.eval.statistics import holm, judge, macro_average, paired_bootstrap

# Name, questions, samples a question, and the two parameters of the difficulties' distribution.
TASKS = (
    ("AIME-30 x16", 30, 16, 2.0, 2.0),
    ("AIME-30 x64", 30, 64, 1.0, 1.0),
    ("GPQA-198 x1", 198, 1, 4.0, 2.0),
    ("GPQA-198 x8", 198, 8, 1.5, 0.8),
    ("MATH-500 x1", 500, 1, 3.0, 0.4),
    ("MATH-500 x4", 500, 4, 1.5, 0.2),
    ("HumanEval-164 x1", 164, 1, 3.0, 0.6),
)
SCORES = 5  # simulations of a score for each of a comparison, whose intervals take longer
DROP = 0.03  # by which the second model is worse, in expectation


def draw(generator: Any, questions: int, samples: int, a: float, b: float) -> tuple[list[Any], list[Any]]:
    """Scores of two models; the second one's chances are the first one's, less a share of them."""
    chances = generator.beta(a, b, questions)
    lost = DROP / (a / (a + b))
    sides = (generator.random((questions, samples)) < p[:, None] for p in (chances, chances * (1 - lost)))
    first, second = (side.astype(float).tolist() for side in sides)
    return first, second


def cover(task: tuple[str, int, int, float, float], simulations: int, seed: int) -> dict[str, Any]:
    """Shares of simulations whose intervals hold the truth."""
    name, questions, samples, a, b = task
    generator = np.random.default_rng(seed)
    mean = a / (a + b)
    ratio = (mean - DROP) / mean
    scored = 0
    for _ in range(SCORES * simulations):
        first, _second = draw(generator, questions, samples, a, b)
        score = accuracy([s[0] > 0 for s in first]) if samples == 1 else avg_at_k(first)
        scored += score.low <= mean <= score.high
    hits = dict.fromkeys(("difference", "bootstrap", "retention", "claims"), 0)
    for _ in range(simulations):
        first, second = draw(generator, questions, samples, a, b)
        sides = [{str(i): scores for i, scores in enumerate(side)} for side in (first, second)]
        difference = paired_difference(*sides)
        hits["difference"] += difference.low <= -DROP <= difference.high
        resampled, _ratio = paired_bootstrap(*sides, draws=1000, seed=int(generator.integers(1 << 30)))
        hits["bootstrap"] += resampled.low <= -DROP <= resampled.high
        kept = paired_ratio(*sides)
        hits["retention"] += kept is not None and kept.low <= ratio <= kept.high
        hits["claims"] += judge(*sides, margin=DROP, draws=10).verdict == "equivalent"
    shares = {"score": scored / (SCORES * simulations)} | {key: count / simulations for key, count in hits.items()}
    return {"task": name, "questions": questions, "samples": samples, "mean": mean, **shares}


def several(simulations: int, seed: int) -> dict[str, float]:
    """The macro-average of all tasks' differences, and Holm's rate of any false alarm where no task differs."""
    generator = np.random.default_rng(seed)
    held, alarms = 0, 0
    for _ in range(simulations):
        differences, p_values = [], []
        for _name, questions, samples, a, b in TASKS[:4]:
            first, second = draw(generator, questions, samples, a, b)
            differences.append([float(np.mean(y) - np.mean(x)) for x, y in zip(first, second, strict=True)])
            chances = generator.beta(a, b, (questions, 1))
            equal = [(generator.random((questions, samples)) < chances).astype(float).tolist() for _ in range(2)]
            sides = [{str(i): scores for i, scores in enumerate(side)} for side in equal]
            p_values.append(paired_difference(*sides).p_value)
        found = macro_average(differences)
        held += found.low <= -DROP <= found.high
        alarms += min(holm(p_values)) <= 0.05
    return {"macro_average": held / simulations, "holm_false_alarms": alarms / simulations}


def main() -> None:
    """Simulate, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.process_time()
    rows = []
    print(f"{'task':18}{'score':>8}{'difference':>12}{'bootstrap':>11}{'retention':>11}{'claims':>8}", flush=True)
    for number, task in enumerate(TASKS):
        row = cover(task, given.simulations, given.seed + number)
        rows.append(row)
        shares = [row[key] for key in ("score", "difference", "bootstrap", "retention", "claims")]
        print(
            f"{row['task']:18}"
            + "".join(f"{share:>{w}.1%}" for share, w in zip(shares, (8, 12, 11, 11, 8), strict=True))
        )
    pooled = several(given.simulations, given.seed + 100)
    print(", ".join(f"{key} {share:.1%}" for key, share in pooled.items()))
    result = {
        "simulations": given.simulations,
        "seed": given.seed,
        "drop": DROP,
        "tasks": rows,
        "several": pooled,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
