"""The plan of `make bench` and the page it writes: figures in benchmarks/figures.toml, values from benchmarks/results.

A value is looked up by a path such as `rows[case=paper;dtype=float32]/train/ratio`: keys between slashes,
`[key=value]` or `[0]` picks one of a list, `*` takes all that have the rest of the path; `FILE#path` reads another
results file than the step's own. `max:`, `min:`, `median:`, `sum:` or `count:` before it make one number of many,
`* 100` (or `+`, `-`, `/`) behind it another unit, and a pair of paths is a quotient.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import statistics
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["PLAN", "Figure", "Missing", "Plan", "Step", "find", "git", "now", "read_json"]

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "benchmarks" / "figures.toml"
RESULTS = ROOT / "benchmarks" / "results"

OF_MANY: dict[str, Callable[[list[Any]], Any]] = {
    "max": max, "min": min, "median": statistics.median, "sum": sum, "count": len,
}  # fmt: skip
ARITHMETIC = {"*": operator.mul, "/": operator.truediv, "+": operator.add, "-": operator.sub}
BOUNDS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
PATH = re.compile(r"(?:(max|min|median|sum|count):\s*)?(.+?)(?:\s([*/+-])\s([\d.e-]+))?")


class Missing(LookupError):
    """A results file or a key in it is not there."""


def _walk(data: Any, keys: list[str]) -> Iterator[Any]:
    if not keys:
        yield data
        return
    name, _, chosen = keys[0].rstrip("]").partition("[")
    if name == "*":
        for each in data.values() if isinstance(data, dict) else data:
            with suppress(KeyError):  # of many, those that have it
                yield from _walk(each, keys[1:])
        return
    if name:
        data = data[name]
    if chosen.lstrip("-").isdigit():
        data = data[int(chosen)]
    elif chosen:
        wanted = [pair.split("=", 1) for pair in chosen.split(";")]
        data = [each for each in data if all(str(each[key]) == value for key, value in wanted)][0]  # noqa: RUF015
    yield from _walk(data, keys[1:])


def find(data: Any, path: str) -> Any:
    """What a path (see the module) leads to.

    Raises:
        Missing: nothing.
    """
    match = PATH.fullmatch(path)
    assert match, path
    of_many, joined, sign, number = match.groups()
    keys = joined.split("/")
    try:
        found = list(_walk(data, keys))
        value = OF_MANY[of_many](found if "*" in keys else found[0]) if of_many else found[0]
        return ARITHMETIC[sign](value, float(number)) if sign else value
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Missing(path) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Missing(path.name) from error


def git(*command: str) -> str:
    env = os.environ | {"TZ": "UTC"}
    done = subprocess.run(["git", *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def now() -> str:
    """The time of day in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True)
class Step:
    """One command of the plan, and the results file that it writes.

    `run` are the arguments of a Python, `tests` groups of test files instead; `{name}` in them is a place of the plan
    (`{out}`: the results file). `long` ones are run when they are named alone. `keep` says that the command changes a
    results file that is there, `part` which of its keys are this step's. An exit code of `held` is no failure.
    """

    name: str
    out: str
    minutes: float
    results: Path
    run: str = ""
    tests: Mapping[str, str] | None = None
    long: bool = False
    keep: bool = False
    part: tuple[str, ...] = ()
    held: tuple[int, ...] = (0,)
    env: Mapping[str, str] | None = None

    @property
    def file(self) -> Path:
        return self.results / self.out

    @property
    def stamp_file(self) -> Path:
        return self.results / "bench" / f"{self.name}.json"

    @property
    def needs(self) -> list[str]:
        """Names of the places that it takes."""
        found = re.findall(r"\{(\w+)\}", " ".join([self.run, *(self.env or {}).values()]))
        return [name for name in dict.fromkeys(found) if name != "out"]

    @property
    def command(self) -> str:
        """What one types, places in capitals."""
        env = "".join(f"{key}={value} " for key, value in (self.env or {}).items())
        if self.tests:
            return f"python -m pytest {' '.join(self.tests.values())}"
        places = {name: name.upper() for name in self.needs}
        return f"{env}python {self.run}".format(out=f"benchmarks/results/{self.out}", **places)

    def stamp(self) -> dict[str, Any]:
        """When and at which commit the results file came to be, and on what, where it was `make bench`."""
        return dict(read_json(self.stamp_file)) if self.stamp_file.exists() else {}

    def is_stamped(self) -> bool:
        """Whether the stamp is that of the results file as it is."""
        return bool(self.stamp()) and self.stamp()["sha256"] == self._sha256()

    def _sha256(self) -> str | None:
        if not self.file.exists():
            return None
        found = read_json(self.file)
        kept = {key: found.get(key) for key in self.part} if self.part else found
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def write_stamp(self, **found: Any) -> None:
        """Stamp the results file as it is.

        What comes from elsewhere than `make bench` gets the day and the commit that brought it into the repository.
        """
        if not found:
            changed = git("status", "--porcelain", "--", str(self.file))
            shape = ("--date=format-local:%Y-%m-%d %H:%M", "--format=%cd|%h")
            committed = "" if changed else git("log", "-1", *shape, "--", str(self.file))
            date, _, commit = (committed or f"{now()}|{git('rev-parse', '--short', 'HEAD')}").partition("|")
            found = {"date": date, "commit": commit}
        self.stamp_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"step": self.name, **found, "sha256": self._sha256()}, indent=1)
        self.stamp_file.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Figure:
    """One figure that was asked for: where its numbers are, how they are told, and why it falls short if it does.

    `reached` and `beside` are format strings of what `at` finds; `bounds` are conditions on them such as `v >= 1.5`.
    """

    id: str
    name: str
    asked: str
    step: Step
    at: Mapping[str, str | list[str]]
    reached: str
    bounds: tuple[str, ...] = ()
    beside: str = ""
    why: str = ""

    @cached_property
    def values(self) -> dict[str, Any]:
        """Numbers by their names in `at`.

        Raises:
            Missing: a results file lacks one.
        """
        return {name: self._value(path) for name, path in self.at.items()}

    def _value(self, path: str | list[str]) -> Any:
        if isinstance(path, list):
            return self._value(path[0]) / self._value(path[1])
        other, _, inside = path.rpartition("#")
        return find(read_json(self.step.results / other if other else self.step.file), inside)

    @property
    def state(self) -> str:
        """`reached`, `short`, `missing` (not measured), or `told`: nothing to hold it against."""
        try:
            kept = [BOUNDS[sign](self.values[name], float(bound)) for name, sign, bound in map(str.split, self.bounds)]
        except Missing:
            return "missing"
        return "told" if not kept else "reached" if all(kept) else "short"

    def row(self) -> str:
        """Its line of the page."""
        stamp = self.step.stamp()
        measured = f"`{self.step.name}` {stamp.get('date', '')[:10]} {stamp.get('commit', '')}".strip()
        if self.state == "missing":
            return f"| {self.name} | {self.asked} | **not measured yet** | | `{self.step.name}` |"
        reached, beside = self.reached.format(**self.values), self.beside.format(**self.values)
        if self.state == "short":
            reached = f"**{reached}**; short: {self.why}"
        return f"| {self.name} | {self.asked} | {reached} | {beside} | {measured} |"


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they run, figures by milestone, pictures, and places by what they are."""

    steps: dict[str, Step]
    milestones: dict[str, list[Figure]]
    plots: list[dict[str, Any]]
    places: dict[str, str]

    @classmethod
    def read(cls, path: Path = PLAN, results: Path = RESULTS) -> Plan:
        """The plan in a file.

        Raises:
            TypeError, KeyError: a key that is not known, or a step that is not there.
        """
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        steps = {name: Step(name=name, results=results, **keys) for name, keys in data["step"].items()}
        milestones = {
            part["title"]: [Figure(**{**keys, "step": steps[keys["step"]]}) for keys in part["figure"]]
            for part in data["milestone"]
        }
        return cls(steps, milestones, data.get("plot", []), data.get("places", {}))

    @property
    def figures(self) -> list[Figure]:
        return [figure for figures in self.milestones.values() for figure in figures]
