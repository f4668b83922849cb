"""Whole runs through the command line: a recipe that learns in seconds, and processes that start at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

HERE = Path(__file__).resolve().parent
NAMES = ("Ann", "Bob", "Eve", "Ian", "Kim", "Leo", "Mia", "Tom")
THINGS = ("pens", "cups", "hats", "keys", "nuts", "eggs", "cans", "figs")

Outcome = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended; `code` is -9 for a process that was killed."""

    code: int
    out: str
    err: str
    cpu_s: float

    @property
    def error(self) -> str:
        """The one line that a failed command says: nothing but log lines before it, and nothing after."""
        assert self.code > 0, (self.code, self.err)
        assert "Traceback" not in self.err and "Exception ignored" not in self.err, self.err
        lines = self.err.splitlines()
        others = [line for line in lines[:-1] if " INFO " not in line and " WARNING " not in line]
        assert others == [], self.err
        assert lines[-1].startswith("error: "), self.err
        return lines[-1]


Tafkir = Callable[..., Done]


class Launcher:
    """Runs `tafkir ARGS...` in a process of its own, forked from one that has imported everything, and `modules`."""

    def __init__(self, place: Path, *modules: str) -> None:
        self.place = place
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        command = [sys.executable, str(HERE / "launcher.py"), *modules]
        self.process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *args: object, cwd: Path | None = None, stdin: str | None = None, **job: Any) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        out, err = self.place / "stdout", self.place / "stderr"
        words = [str(arg) for arg in args]
        if stdin is not None:
            job["stdin"] = str(self.place / "stdin")
            (self.place / "stdin").write_text(stdin, encoding="utf-8")
        job |= {"args": words, "cwd": str(cwd or self.place), "stdout": str(out), "stderr": str(err)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        return Done(ended["code"], out.read_text(), err.read_text(), ended["cpu_s"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def tafkir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tafkir]:
    """Runs `tafkir ARGS...`; see launcher.py for what else a job may ask for."""
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


def rows_of_sums() -> list[dict[str, Any]]:
    """Sums whose answers are 4 or 5: so few that a small model soon knows them, so many that it sometimes errs."""
    rows = []
    for number, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS):
        first, total = 1 + number % 3, 4 + (number % 3 == 0)
        part = "test" if number % 8 == 6 else "validation" if number % 16 == 5 else "train"
        question = f"{name} has {first} {thing} and gets {total - first}. How many {thing}?"
        equation = f"{first} + {total - first}"
        rows.append({"id": f"sum-{number}", "split": part, "question": question, "answer": total, "equation": equation})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of word problems."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", rows_of_sums())


@pytest.fixture(scope="session")
def tiny(sums: Path) -> tuple[str, ...]:
    """What stands behind `tafkir` to run the tiny recipe on the sums."""
    return ("run", "smoke", str(HERE / "tiny.toml"), "--set", f"data.sources=[{str(sums)!r}]")


@pytest.fixture(scope="session")
def reference(tafkir: Tafkir, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe once through, undisturbed. Tests only read it, or take a copy."""
    place = tmp_path_factory.mktemp("reference")
    done = tafkir(*tiny, cwd=place)
    assert done.code == 0, done.err
    return place / "runs" / "tiny"


def copy_of(folder: Path, place: Path) -> Path:
    """A copy that a test may change; of a run, it lies where a command started in `place` finds it."""
    return Path(shutil.copytree(folder, place / ("runs" if (folder / "stages").is_dir() else ".") / folder.name))


def outcome(run: Path) -> Outcome:
    """All that equal runs must share to the last bit: weights, metrics, answers, and the recipe as it ran."""
    patterns = ("stages/??-*/checkpoint/*", "stages/??-*/metrics.jsonl", "eval/*.jsonl", "recipe.resolved.toml")
    paths = [path for pattern in patterns for path in run.glob(pattern) if ".old-" not in str(path)]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(paths)}


def differing(one: Outcome, other: Outcome) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def listing(folder: Path) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
