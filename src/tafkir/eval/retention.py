"""What a changed checkpoint keeps of what its source can do: the same problems and seeds, before and after.

The change may be anything; the usual one is quantization. A share of a score is worth little without its interval, so
a task is `kept` only where the whole interval lies above the limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tafkir.data.sources import read_source
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RecipeError
from tafkir.eval.metrics import mean_interval, paired_ratio
from tafkir.eval.records import EvalRecord
from tafkir.eval.run import evaluate
from tafkir.eval.summary import ALL, Metric, difference_table, problem_scores, score_table, sources_of
from tafkir.protocols import Completer, Task
from tafkir.recipe.tasks import LEVELS, TaskConfig
from tafkir.records import Example
from tafkir.tasks.math import WordProblems
from tafkir.tasks.mixture import TaskMixture

__all__ = ["MIN_RETENTION", "RetentionSettings", "Side", "Verdict", "build_problems", "measure_retention", "verdict_of"]

MIN_RETENTION = 0.98
"""The least share of a score that counts as kept: what NVIDIA's published FP4 checkpoints reach on every benchmark."""

Verdict = Literal["kept", "not shown", "below"]
"""kept: the whole interval is above the limit; below: the estimate itself is under it; not shown: neither."""

_NUM_CHANGED = 6
_SOURCES = {"wordmath": ("gsm8k", "svamp"), "gsm8k": ("gsm8k",), "svamp": ("svamp",)}
_KIND = re.compile(r"(\w+?)(?::(\d+)(?:-(\d+))?)?")


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """What is asked, and what counts as kept.

    Attributes:
        samples: sampled answers a problem, besides the greedy one; 0 leaves the greedy one alone.
        temperature: of the sampled answers.
        max_tokens: length limit of an answer.
        max_problems: of each source or level; 0 takes all, or 100 of each level of generated problems.
        split: which held-out part.
        seed: of the samples; both sides use the same.
        min_retention: the least share that counts as kept.
    """

    samples: int = 4
    temperature: float = 1.0
    max_tokens: int = 128
    max_problems: int = 0
    split: Literal["validation", "test"] = "test"
    seed: int = 0
    min_retention: float = MIN_RETENTION


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        name: of its file of answers, "before" or "after".
        fingerprint: what identifies its weights, and how they are computed with.
        build_completer: makes the engine; not called where all answers are there already.
    """

    name: str
    fingerprint: str
    build_completer: Callable[[], Completer]


def build_problems(name: str, settings: RetentionSettings) -> tuple[Task, list[Example]]:
    """A task and its held-out problems.

    Args:
        name: `wordmath`, `gsm8k`, `svamp`, a JSON-lines file of one's own, or a generated kind such as `countdown`
            with all of its levels, or with some: `countdown:2`, `countdown:1-3`.

    Raises:
        RecipeError: there is no such task or level.
        DataError: there is no held-out problem.
    """
    if name in _SOURCES or Path(name).suffix == ".jsonl":
        sources = _SOURCES.get(name, (name,))
        task: Task = WordProblems([problem for source in sources for problem in read_source(source)[0]])
    else:
        task = TaskMixture([_task_config(name)], samples=settings.max_problems or 100)
    taken: dict[str, int] = {}
    chosen = []
    for example in task.examples(settings.split):
        taken[example.source] = taken.get(example.source, 0) + 1
        if not settings.max_problems or taken[example.source] <= settings.max_problems:
            chosen.append(example)
    if not chosen:
        raise DataError(f"no problem is in the {settings.split} part", where=name, fix="take another task or split")
    return task, chosen


def _task_config(name: str) -> TaskConfig:
    found = _KIND.fullmatch(name)
    levels = next((number for kind, number in LEVELS.items() if found and kind == found[1]), None)
    if found is None or levels is None or found[1] == "word_problems":
        known = ", ".join([*_SOURCES, *(kind for kind in LEVELS if kind != "word_problems")])
        raise RecipeError(
            f"there is no task {name!r}", where="--task", expected=f"one of {known}, or a .jsonl file of problems"
        )
    first, last = int(found[2] or 1), int(found[3] or found[2] or levels)
    if not 1 <= first <= last <= levels:
        raise RecipeError(f"{found[1]} has levels 1 to {levels}", where=f"--task {name}")
    return TaskConfig(kind=found[1], difficulty=tuple(range(first, last + 1)))  # type: ignore[arg-type]


def measure_retention(
    name: str, sides: tuple[Side, Side], tokenizer: Tokenizer, settings: RetentionSettings, folder: Path
) -> dict[str, Any]:
    """Ask both sides the same problems with the same seeds, and say what the second keeps.

    Answers go to `folder/retention-<task>-<side>.jsonl` as they come; a killed measurement goes on from there.

    Args:
        name: of the task, as `build_problems` takes it.
        sides: the source, and what was made of it.
        tokenizer: of the source; both sides read the same tokens.

    Returns:
        Settings, the scores of both sides and their paired differences as `eval` has them, `retention` (by metric:
        value, low, high, the last two null where nothing bounds them), `verdict`, `lengths` (mean tokens of an
        answer, their paired difference, and answers cut off), and `changed`: problems that were right and are wrong.

    Raises:
        RecipeError: there is no such task.
        DataError: there is no problem.
    """
    task, examples = build_problems(name, settings)
    label = Path(name).stem if name.endswith(".jsonl") else name.replace(":", "-")
    answers = {
        side.name: _answers(side, tokenizer, task, examples, settings, folder / f"retention-{label}-{side.name}.jsonl")
        for side in sides
    }
    pair = answers[sides[0].name], answers[sides[1].name]
    metric: Metric = "average" if settings.samples else "greedy"
    retention = {one: _retention(*pair, one) for one in (("average", "greedy") if settings.samples else ("greedy",))}
    return {
        "task": label,
        "split": settings.split,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "num_problems": len(examples),
        "sources": sources_of(pair[0]),
        "metric": metric,
        "before": score_table(pair[0]),
        "after": score_table(pair[1]),
        "differences": difference_table(*pair, (sides[0].name, sides[1].name)),
        "retention": retention,
        "verdict": verdict_of(retention[metric], settings.min_retention),
        "lengths": _lengths(*pair),
        "changed": _changed(*pair),
    }


def _answers(
    side: Side, tokenizer: Tokenizer, task: Task, examples: Sequence[Example], settings: RetentionSettings, path: Path
) -> list[EvalRecord]:
    return evaluate(
        _Lazy(side.build_completer),
        tokenizer,
        task,
        examples,
        samples=settings.samples,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        path=path,
        fingerprint=side.fingerprint,
        label=f"{task.name} {side.name}",
    )


class _Lazy:
    """A completer that is built when it is first asked for something."""

    def __init__(self, build: Callable[[], Completer]) -> None:
        self._build = build
        self._built: Completer | None = None

    def __getattr__(self, name: str) -> Any:
        self._built = self._built or self._build()
        return getattr(self._built, name)


def verdict_of(retention: Mapping[str, Any] | None, min_retention: float) -> Verdict:
    """What an interval of `measure_retention` says against a limit; without an estimate nothing is shown."""
    if retention is None:
        return "not shown"
    if retention["value"] < min_retention:
        return "below"
    return "kept" if retention["low"] >= min_retention else "not shown"


def _retention(before: Sequence[EvalRecord], after: Sequence[EvalRecord], metric: Metric) -> dict[str, Any] | None:
    found = paired_ratio(problem_scores(before, metric, ALL), problem_scores(after, metric, ALL))
    if found is None:
        return None
    return {**found.to_dict(), "high": found.high if math.isfinite(found.high) else None}


def _lengths(before: Sequence[EvalRecord], after: Sequence[EvalRecord]) -> dict[str, Any]:
    """Tokens of an answer: quantized reasoning models are known to write longer ones."""
    sides = [_by_problem(records) for records in (before, after)]
    first, second = ([fmean(side[i]) for i in sides[0]] for side in sides)
    difference = mean_interval([b - a for a, b in zip(first, second, strict=True)])
    return {
        "before": fmean(first),
        "after": fmean(second),
        "ratio": fmean(second) / max(1e-9, fmean(first)),
        "difference": {
            key: value if math.isfinite(value) else None
            for key, value in (("value", difference.value), ("low", difference.low), ("high", difference.high))
        },
        "cut_off_before": fmean(record.outcome == "length" for record in before),
        "cut_off_after": fmean(record.outcome == "length" for record in after),
    }


def _by_problem(records: Sequence[EvalRecord]) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {}
    for record in records:
        lengths.setdefault(record.example_id, []).append(record.tokens)
    return lengths


def _changed(before: Sequence[EvalRecord], after: Sequence[EvalRecord]) -> list[dict[str, str]]:
    """The first few answers that were right and are wrong, with both texts; greedy ones first."""
    theirs = {(record.example_id, record.repeat): record for record in after}
    lost = [(a, theirs[a.example_id, a.repeat]) for a in before if a.correct]
    lost = sorted(((a, b) for a, b in lost if not b.correct), key=lambda pair: pair[0].repeat)
    seen: dict[str, dict[str, str]] = {}
    for a, b in lost:
        if a.example_id not in seen and len(seen) < _NUM_CHANGED:
            seen[a.example_id] = {
                "id": a.example_id,
                "question": a.question,
                "expected": a.expected,
                "before": a.text,
                "after": b.text,
                "reason": b.reason,
            }
    return list(seen.values())
