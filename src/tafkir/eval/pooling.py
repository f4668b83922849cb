"""One change between two stages of a recipe, pooled over runs with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.errors import RunDirError
from tafkir.eval.metrics import PooledDifference, pooled_difference
from tafkir.eval.sides import load_run
from tafkir.eval.summary import ALL, METRICS, problem_scores, sources_of

__all__ = ["PooledComparison", "pool_runs"]


@dataclass(frozen=True, slots=True)
class PooledComparison:
    """One change between two stages over several runs: (measure, source) -> the pooled difference."""

    before: str
    after: str
    runs: Sequence[str]
    differences: Mapping[tuple[str, str], PooledDifference]

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"metric": metric, "source": source, **pooled.to_dict()}
            for (metric, source), pooled in self.differences.items()
        ]
        return {"before": self.before, "after": self.after, "runs": list(self.runs), "rows": rows}

    def lines(self) -> list[str]:
        """The pooled differences as lines of text for a terminal."""
        lines = [
            f"{self.after} against {self.before}, pooled over {len(self.runs)} runs, in points with 95 % intervals "
            "(problems as clusters; [seeds]: what a fresh seed would do)"
        ]
        for (metric, source), difference in self.differences.items():
            row = difference.pooled.to_dict()
            each = ", ".join(f"{100 * value:+.1f}" for value in difference.by_run)
            across = difference.across_runs
            seeds = f"  [seeds] {100 * across.low:+.1f} to {100 * across.high:+.1f}" if across else ""
            lines.append(
                f"{metric:<9}{source:<10}{_points(row)} {_conclude(row):<9}  {_counts(row)}  by run: {each}{seeds}"
            )
        return lines


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:+6.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def _counts(row: Mapping[str, Any]) -> str:
    return (
        f"{row['wins']} up, {row['losses']} down of {row['num_problems']}, p = {row['p_value']:.2g}, "
        f"detectable {100 * row['min_detectable']:.1f}"
    )


def _conclude(row: Mapping[str, Any]) -> str:
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "undecided"


def pool_runs(paths: Sequence[Path], *, before: str = "sft", after: str = "rlvr") -> PooledComparison:
    """Pool the change from one stage to another over several runs, such as one recipe with several seeds.

    Raises:
        RunDirError: there is no run, or one lacks an evaluation of one of the two stages.
        DataError: the runs answered different problems.
    """
    runs = [load_run(path) for path in paths]
    for run in runs:
        absent = [kind for kind in (before, after) if kind not in run.answers]
        if absent:
            raise RunDirError(
                f"stage {absent[0]} was not evaluated",
                where=str(run.path),
                expected=f"one of {', '.join(run.answers)}",
            )
    if not runs:
        raise RunDirError("no run to pool", expected="at least one run directory")
    differences: dict[tuple[str, str], PooledDifference] = {}
    for metric in METRICS:
        for source in (ALL, *sources_of(runs[0].answers[after])):
            sides = [[problem_scores(run.answers[kind], metric, source) for kind in (before, after)] for run in runs]
            pairs = [(side[0], side[1]) for side in sides]
            if any(pairs[0]):
                differences[(metric, source)] = pooled_difference(pairs)
    return PooledComparison(before, after, [run.name for run in runs], differences)
