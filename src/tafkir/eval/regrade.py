"""`tafkir regrade`: stored answers get their verdicts again, by the tasks as they are now; no model is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tafkir.eval.harness import grade_sample
from tafkir.eval.perplexity import PERPLEXITY
from tafkir.eval.samples import Sample, append_sample, load_samples, samples_file
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.progress import Progress
from tafkir.tasks.catalog import EvalTask, as_asked

__all__ = ["Regraded", "regrade_samples"]

_VERDICT = ("key", "outcome", "reward", "extracted", "expected", "reason")


@dataclass(slots=True)
class Regraded:
    """What grading again has changed.

    Attributes:
        graded: answers that were graded again.
        unknown: answers to items that the task does not have any more; they stay as they are.
        changed: (before, after) of those whose outcome or reward is another one now.
    """

    graded: int = 0
    unknown: int = 0
    changed: list[tuple[Sample, Sample]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        moves = Counter(f"{before.outcome} -> {after.outcome}" for before, after in self.changed)
        rows = [
            {
                "model": after.model,
                "task": after.task,
                "item": after.item,
                "repeat": after.repeat,
                "before": before.outcome,
                "after": after.outcome,
                "extracted": after.extracted,
                "expected": after.expected,
                "reason": after.reason,
            }
            for before, after in self.changed
        ]
        return {"graded": self.graded, "unknown": self.unknown, "moves": dict(moves), "changed": rows}


def regrade_samples(path: Path, tasks: Mapping[str, EvalTask], *, graders: int = 4, write: bool = True) -> Regraded:
    """Grade the stored answers to these tasks again, and append the verdicts that differ.

    Args:
        path: the results file, or its folder; the caller sees to it that no other process writes it.
        tasks: name -> task; answers to other tasks are left alone.
        graders: answers that are graded at once.
        write: False only tells what would change.

    Raises:
        RunDirError, DataError: there is no such file, or it is damaged.
    """
    tasks = {name: task for name, task in tasks.items() if task.card.metric != PERPLEXITY}
    examples = {(name, one.id): one for name, task in tasks.items() for one in task.examples("test")}
    stored = [s for s in load_samples(path) if s.task in tasks and s.finish_reason != "error"]
    wanted = [sample for sample in stored if (sample.task, sample.item) in examples]
    result = Regraded(graded=len(wanted), unknown=len(stored) - len(wanted))

    def again(sample: Sample) -> Sample:
        task = as_asked(tasks[sample.task], sample.task_version)
        version = task.card.version
        fresh = replace(sample, key=f"{sample.identity}-v{version}", task_version=version)
        return grade_sample(task, examples[sample.task, sample.item], fresh)

    with (
        JsonlWriter(samples_file(path)) as writer,
        ThreadPoolExecutor(graders) as pool,
        Progress("regrade", total=len(wanted)) as progress,
    ):
        for number, (before, after) in enumerate(zip(wanted, pool.map(again, wanted), strict=True), start=1):
            if write and _verdict(before) != _verdict(after):
                append_sample(writer, after)
            if (before.outcome, before.reward) != (after.outcome, after.reward):
                result.changed.append((before, after))
            progress.update(number)
    return result


def _verdict(sample: Sample) -> Sequence[object]:
    return [getattr(sample, name) for name in _VERDICT]
