"""What models answered, wherever it lies: results files of `tafkir eval`, run directories, other tools' folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tafkir.errors import DataError, RunDirError
from tafkir.eval.every_eval_ever import load_every_eval_ever
from tafkir.eval.lm_eval_files import load_lm_eval
from tafkir.eval.records import GREEDY, EvalRecord, load_records
from tafkir.eval.samples import Sample, load_samples, samples_file
from tafkir.runlog.rundir import RunDir

__all__ = ["EvaluatedRun", "Side", "load_foreign", "load_run", "load_sides", "load_stages"]

_SETTINGS = ("task", "split", "samples", "temperature", "max_tokens")


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run with its answers: stage -> answers, in the order of the stages."""

    name: str
    path: Path
    result: Mapping[str, Any]
    answers: Mapping[str, Sequence[EvalRecord]]


@dataclass(frozen=True, slots=True)
class Side:
    """One model in a comparison: task -> samples. `settings` are what two sides should have in common."""

    name: str
    answers: Mapping[str, Sequence[Sample]]
    settings: Mapping[str, Any] = field(default_factory=dict)


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


def load_stages(path: Path) -> tuple[list[Side], Mapping[str, Any]]:
    """The scored stages of one run as models of their own, greedy and sampled answers apart; and the eval's result.

    Raises:
        RunDirError: see `load_run`.
    """
    run = load_run(path)
    name = str(run.result.get("task"))
    sides = []
    for stage, records in run.answers.items():
        answers: dict[str, list[Sample]] = {}
        for record in records:
            task = f"{name}, {'greedy' if record.repeat == GREEDY else 'sampled'}"
            answers.setdefault(task, []).append(_sample_of(record, stage, task))
        sides.append(Side(stage, answers))
    return sides, run.result


def load_sides(places: Sequence[Path]) -> list[Side]:
    """The models in all places, in order; a results file may hold several.

    A place is a results file or its folder, a run directory with a finished evaluation (its tasks are the stages,
    greedy and sampled apart), or a folder of lm-evaluation-harness or Every Eval Ever.

    Raises:
        RunDirError: there is nothing of these in a place.
        DataError: a file is damaged, or two models share a name that their places do not tell apart.
    """
    found: list[tuple[Path, Side]] = []
    for place in places:
        found += [(place, side) for side in _load(place)]
    names = [side.name for _, side in found]
    sides = [
        replace(side, name=f"{side.name} ({place})") if names.count(side.name) > 1 else side for place, side in found
    ]
    if len({side.name for side in sides}) != len(sides):
        raise DataError("the same model is given twice", where=", ".join(map(str, places)))
    return sides


def _load(place: Path) -> list[Side]:
    foreign = load_foreign(place)
    if foreign is not None:
        return _by_model(foreign, str(place))
    if samples_file(place).is_file():
        return _by_model(load_samples(place), str(place))
    run = load_run(place)
    answers: dict[str, list[Sample]] = {}
    for stage, records in run.answers.items():
        for record in records:
            task = f"{stage}, {'greedy' if record.repeat == GREEDY else 'sampled'}"
            answers.setdefault(task, []).append(_sample_of(record, run.name, task))
    return [Side(run.name, answers, {key: run.result.get(key) for key in _SETTINGS})]


def load_foreign(place: Path) -> list[Sample] | None:
    """The samples of lm-evaluation-harness or Every Eval Ever in a file or below a folder; None without any."""
    files = [place] if place.is_file() else sorted(place.rglob("*.jsonl")) if place.is_dir() else []
    of_lm_eval = [file for file in files if file.name.startswith("samples_")]
    if of_lm_eval:
        return load_lm_eval(of_lm_eval)
    shared = [file for file in files if file.name.endswith("_samples.jsonl")]
    return load_every_eval_ever(shared) if shared else None


def _by_model(samples: Sequence[Sample], where: str) -> list[Side]:
    models: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        models.setdefault(sample.model, {}).setdefault(sample.task, []).append(sample)
    if not models:
        raise DataError("there is no answer", where=where, fix="evaluate first: tafkir eval MODEL --tasks ...")
    return [
        Side(name, answers, {f"version of {task}": own[0].task_version for task, own in answers.items()})
        for name, answers in models.items()
    ]


def _sample_of(record: EvalRecord, model: str, task: str) -> Sample:
    return Sample(
        key=record.key,
        model=model,
        task=task,
        task_version="",
        item=record.example_id,
        source=record.source,
        subject="",
        difficulty="",
        repeat=record.repeat,
        seed=0,
        question=record.question,
        text=record.text,
        reasoning="",
        outcome=record.outcome,
        reward=record.reward,
        extracted=record.extracted,
        expected=record.expected,
        reason=record.reason,
        tokens=record.tokens,
        finish_reason=record.finish_reason,
        latency_s=0.0,
        fingerprint="",
    )
