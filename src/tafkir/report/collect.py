"""Reads a run directory into one record. What is missing or damaged becomes a note, never a crash."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tafkir.errors import RunDirError
from tafkir.records import POLICY_STAGES, STAGES, Outcome, StageName
from tafkir.runlog.atomic import read_json
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir, StageDir

__all__ = ["Chain", "MismatchRecord", "RunRecord", "StageRecord", "VariantRecord", "collect", "series"]

StageState = Literal["finished", "unfinished", "not started"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage left behind."""

    kind: StageName
    state: StageState
    result: Mapping[str, Any]
    metrics: Rows
    timings: Rows
    mismatch: Rows = ()


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """What one variant of the lab left behind; the result is empty while it is not finished."""

    kind: str
    depth: int
    seed: int
    result: Mapping[str, Any]
    metrics: Rows


@dataclass(frozen=True, slots=True)
class MismatchRecord:
    """What one variant of the mismatch laboratory left behind; the result is empty while it is not finished."""

    rollout: str
    loss: str
    replay: bool
    seed: int
    result: Mapping[str, Any]
    metrics: Rows


@dataclass(frozen=True, slots=True)
class Chain:
    """One greedy answer with its verdict, and the answer of the stage before to the same problem."""

    example_id: str
    source: str
    question: str
    text: str
    outcome: str
    extracted: str | None
    expected: str
    reason: str
    tokens: int
    before: Chain | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that the page shows."""

    name: str
    path: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    stages: Mapping[StageName, StageRecord]
    chains: Sequence[Chain]
    chain_stage: str | None
    chain_pool: int
    notes: Sequence[str] = field(default_factory=tuple)
    variants: Sequence[VariantRecord] = field(default_factory=tuple)
    mismatch_variants: Sequence[MismatchRecord] = field(default_factory=tuple)

    def result(self, kind: StageName) -> Mapping[str, Any]:
        """The result of a stage; empty where it is not finished."""
        return self.stages[kind].result if kind in self.stages else {}

    @property
    def evaluation(self) -> Mapping[str, Any]:
        return self.result("eval")


def collect(run: RunDir, *, num_chains: int = 10) -> RunRecord:
    """Read a run directory.

    Args:
        num_chains: sample chains to pick.
    """
    notes: list[str] = []
    recipe_text, recipe = _read_recipe(run, notes)
    stages = {kind: _read_stage(run.stage(kind), notes) for kind in _expected_stages(run, recipe)}
    variants, mismatch_variants = _read_variants(run.stage("lab"), run, notes)
    evaluation = stages["eval"].result if "eval" in stages else {}
    chains, chain_stage, pool = _read_chains(run, evaluation, num_chains, notes)
    return RunRecord(
        name=str(recipe.get("name") or run.path.resolve().name),
        path=run.path,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_environment(run, notes),
        variants=variants,
        mismatch_variants=mismatch_variants,
        stages=stages,
        chains=chains,
        chain_stage=chain_stage,
        chain_pool=pool,
        notes=tuple(notes),
    )


def series(rows: Rows, name: str) -> list[tuple[float, float | None]]:
    """The (step, value) points of one metric; a value that was not finite is None."""
    points: list[tuple[float, float | None]] = []
    for row in rows:
        if name in row and isinstance(row.get("step"), int | float):
            value = row[name]
            points.append((float(row["step"]), float(value) if isinstance(value, int | float) else None))
    return points


def _read_recipe(run: RunDir, notes: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = run.recipe_path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        notes.append(f"{run.recipe_path.name} is missing: the settings of this run are not known.")
        return "", {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        notes.append(f"{run.recipe_path.name} cannot be read: {error}.")
        return "", {}


def _read_environment(run: RunDir, notes: list[str]) -> dict[str, Any]:
    value = _read_object(run.env_path, run, notes)
    if value is None:
        notes.append(f"{run.env_path.name} is missing: the machine of this run is not known.")
    return value or {}


def _expected_stages(run: RunDir, recipe: Mapping[str, Any]) -> list[StageName]:
    """Stages that the recipe names or that left a directory; the report itself is none of its own subjects."""
    return [kind for kind in STAGES if kind != "report" and (kind in recipe or run.stage(kind).path.is_dir())]


def _read_stage(stage: StageDir, notes: list[str]) -> StageRecord:
    run = RunDir(stage.path.parent.parent)
    trains = stage.kind in (*POLICY_STAGES, "reward", "trm")
    result = _read_object(stage.result_path, run, notes)
    metrics = _read_rows(stage.metrics_path, run, notes)
    timings = _read_rows(stage.timings_path, run, notes)
    started = stage.path.is_dir()
    state: StageState = "finished" if result is not None else "unfinished" if started else "not started"
    if state != "finished":
        notes.append(f"Stage {stage.kind} is {state}.")
    elif trains and metrics is None:
        notes.append(f"{_relative(stage.metrics_path, run)} is missing: the curves of {stage.kind} cannot be drawn.")
    mismatch = _read_rows(stage.path / "mismatch.jsonl", run, notes)
    return StageRecord(stage.kind, state, result or {}, metrics or [], timings or [], mismatch or [])


def _read_variants(stage: StageDir, run: RunDir, notes: list[str]) -> tuple[list[VariantRecord], list[MismatchRecord]]:
    """A lab's variants, by the names of their folders.

    `<kind>-<depth>-seed<n>` in the laboratory of residuals, `<rollout>-<loss>-<own or replay>-seed<n>` in that of
    mismatch.
    """
    variants: list[VariantRecord] = []
    mismatch: list[MismatchRecord] = []
    for folder in sorted(stage.path.glob("variants/*-*-seed*")):
        *parts, last = folder.name.split("-")
        seed, own = int(last.removeprefix("seed")), StageDir(folder, stage.kind)
        result, rows = _read_object(own.result_path, run, notes) or {}, _read_rows(own.metrics_path, run, notes) or []
        if len(parts) == 2:
            variants.append(VariantRecord(parts[0], int(parts[1]), seed, result, rows))
        else:
            mismatch.append(MismatchRecord(parts[0], parts[1], parts[2] == "replay", seed, result, rows))
    return variants, mismatch


def _read_object(path: Path, run: RunDir, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except RunDirError as error:
        notes.append(f"{_relative(path, run)} cannot be read: {error.what}.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{_relative(path, run)} does not hold an object.")
        return None
    return value


def _read_rows(path: Path, run: RunDir, notes: list[str]) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(read_jsonl(path))
    except RunDirError as error:
        notes.append(f"{_relative(path, run)} is damaged ({error}); the {len(rows)} rows before that are shown.")
    return rows


def _relative(path: Path, run: RunDir) -> str:
    return path.relative_to(run.path).as_posix()


# ---- sample chains -----------------------------------------------------------------------------------------------


def _read_chains(
    run: RunDir, evaluation: Mapping[str, Any], num_chains: int, notes: list[str]
) -> tuple[list[Chain], str | None, int]:
    """Greedy answers of the last evaluated stage, each outcome in its share of the whole and at least one of each."""
    files = evaluation.get("records")
    if not isinstance(files, dict) or not files:
        return [], None, 0
    stages = list(files)
    answers = {stage: _greedy_rows(run, str(files[stage]), notes) for stage in stages}
    last = stages[-1]
    before = answers[stages[-2]] if len(stages) > 1 else {}
    picked = pick_by_outcome(answers[last], num_chains)
    chains = [_chain(answers[last][i], _chain(before[i]) if i in before else None) for i in picked]
    return chains, last, len(answers[last])


def _greedy_rows(run: RunDir, name: str, notes: list[str]) -> dict[str, Mapping[str, Any]]:
    path = run.path / name
    rows = _read_rows(path, run, notes)
    if rows is None:
        notes.append(f"{name} is missing: its sample chains cannot be shown.")
        return {}
    return {str(row["example_id"]): row for row in rows if row.get("repeat") == 0 and "example_id" in row}


def pick_by_outcome(answers: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """Ids of up to `count` answers: every outcome in its share of the whole, at least one of each that fits.

    Within an outcome the order is that of the ids' hashes, so nobody chose them and reruns agree.
    """
    groups: dict[str, list[str]] = {}
    for example_id in sorted(answers, key=lambda i: hashlib.sha256(i.encode("utf-8")).digest()):
        groups.setdefault(str(answers[example_id].get("outcome")), []).append(example_id)
    total = len(answers)
    count = min(count, total)
    if not count:
        return []
    picked: list[str] = []
    ordered = sorted(groups, key=lambda outcome: (-len(groups[outcome]), outcome))[:count]
    quota = {outcome: max(1, int(count * len(groups[outcome]) / total)) for outcome in ordered}
    # Whole shares rarely add up: take from, or give to, the outcome that is furthest from its exact share.
    while (missing := count - sum(quota.values())) != 0:
        step = 1 if missing > 0 else -1
        able = [o for o in ordered if (quota[o] < len(groups[o]) if step > 0 else quota[o] > 1)]
        if not able:
            break
        furthest = max(able, key=lambda o: step * (count * len(groups[o]) / total - quota[o]))
        quota[furthest] += step
    for outcome in sorted(ordered, key=_reading_order):
        picked += groups[outcome][: quota[outcome]]
    return picked


def _reading_order(outcome: str) -> tuple[int, str]:
    known = get_args(Outcome)
    return (known.index(outcome) if outcome in known else len(known), outcome)


def _chain(row: Mapping[str, Any], before: Chain | None = None) -> Chain:
    extracted = row.get("extracted")
    return Chain(
        example_id=str(row.get("example_id", "")),
        source=str(row.get("source", "")),
        question=str(row.get("question", "")),
        text=str(row.get("text", "")),
        outcome=str(row.get("outcome", "error")),
        extracted=None if extracted is None else str(extracted),
        expected=str(row.get("expected", "")),
        reason=str(row.get("reason", "")),
        tokens=int(row.get("tokens", 0)),
        before=before,
    )
