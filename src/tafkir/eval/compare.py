"""`tafkir compare`: two runs on the same problems, or one change pooled over runs with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tafkir.errors import RunDirError
from tafkir.eval.metrics import PooledDifference, pooled_difference
from tafkir.eval.records import EvalRecord, load_records
from tafkir.eval.summary import ALL, METRICS, difference_table, problem_scores, sources_of
from tafkir.runlog.rundir import RunDir

__all__ = ["Comparison", "EvaluatedRun", "PooledComparison", "compare_runs", "load_run", "pool_runs"]

Conclusion = Literal["better", "worse", "undecided"]
_SETTINGS = ("task", "split", "samples", "temperature", "max_tokens")


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run with its answers: stage -> answers, in the order of the stages."""

    name: str
    path: Path
    result: Mapping[str, Any]
    answers: Mapping[str, Sequence[EvalRecord]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the second run stands above the first, per stage, measure and source.

    `rows` are those of `difference_table` with the stage and a conclusion: `better` or `worse` where the 95 %
    interval leaves zero, `undecided` otherwise.
    """

    first: str
    second: str
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "rows": list(self.rows), "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """The comparison as lines of text for a terminal."""
        lines = [f"{self.second} against {self.first}, in points with 95 % intervals, on the same problems"]
        for row in self.rows:
            lines.append(f"{row['stage']:<9}{row['metric']:<9}{row['source']:<10}{_points(row)}  {_counts(row)}")
        return [*lines, *(f"Note: {note}" for note in self.notes)]


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
            lines.append(f"{metric:<9}{source:<10}{_points(row)}  {_counts(row)}  by run: {each}{seeds}")
        return lines


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:+6.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}) {_conclude(row):<9}"


def _counts(row: Mapping[str, Any]) -> str:
    return (
        f"{row['wins']} up, {row['losses']} down of {row['num_problems']}, p = {row['p_value']:.2g}, "
        f"detectable {100 * row['min_detectable']:.1f}"
    )


def _conclude(row: Mapping[str, Any]) -> Conclusion:
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "undecided"


def load_run(path: Path) -> EvaluatedRun:
    """Read the answers of a run whose `eval` stage is finished.

    Raises:
        RunDirError: it is no run directory, or has no finished evaluation.
    """
    run = RunDir.open(path)
    result = run.stage("eval").read_result()
    files = result.get("records") if result else None
    if not result or not isinstance(files, dict) or not files:
        raise RunDirError(
            "the run has no finished evaluation",
            where=str(path),
            fix="run it to its eval stage: tafkir run RECIPE --only eval",
        )
    answers = {stage: load_records(run.path / name) for stage, name in files.items()}
    return EvaluatedRun(run.path.resolve().name, run.path, result, answers)


def compare_runs(first: Path, second: Path, *, stage: str | None = None) -> Comparison:
    """Compare two runs, stage by stage, on the problems that both answered.

    Args:
        stage: compare only this stage; by default every stage that both runs evaluated.

    Raises:
        RunDirError: a run has no evaluation, or the two share no evaluated stage.
        DataError: the two runs answered different problems.
    """
    a, b = load_run(first), load_run(second)
    names = (a.name, b.name) if a.name != b.name else (str(first), str(second))
    common = [kind for kind in a.answers if kind in b.answers and stage in (None, kind)]
    if not common:
        raise RunDirError(
            f"no evaluated stage in common{f' named {stage}' if stage else ''}",
            where=f"{first} and {second}",
            expected=f"one of {', '.join(a.answers)} in both",
        )
    rows = []
    for kind in common:
        for row in difference_table(a.answers[kind], b.answers[kind], names):
            rows.append({"stage": kind, **row, "conclusion": _conclude(row)})
    notes = [
        f"{key} differs: {a.result.get(key)} against {b.result.get(key)}."
        for key in _SETTINGS
        if a.result.get(key) != b.result.get(key)
    ]
    return Comparison(*names, rows, notes)


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
