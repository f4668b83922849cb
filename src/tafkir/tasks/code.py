"""Programming problems: a function is asked for, run in a sandbox on inputs, and its outputs are compared outside."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

from tafkir.errors import DataError
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import extract_text
from tafkir.tasks.sandbox import Limits, ProgramResult, ProgramRunner, Sandbox

__all__ = ["CodeProblems", "bundled_problems", "extract_program", "run_twice", "same_value", "shorten"]

MAX_PROGRAM_LENGTH = 20_000
_TOLERANCE = 1e-6
_BLOCK = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)```", re.DOTALL)
_OPEN_BLOCK = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*)\Z", re.DOTALL)


@cache
def bundled_problems() -> tuple[Example, ...]:
    """The problems that ship with the package: MBPP-like, of Tafkir's own making, at levels 1 to 3.

    `answer` is a reference program; `extra` holds `level`, `entry` and `tests`, pairs of Python literals: the tuple of
    arguments, and the value that is right.
    """
    text = (files("tafkir") / "datasets" / "code" / "problems.jsonl").read_text("utf-8")
    return tuple(_example(json.loads(line)) for line in text.splitlines())


def _example(row: dict[str, Any]) -> Example:
    arguments, value = _read_tests(row["tests"])[0]
    shown = f"{row['entry']}({', '.join(map(repr, arguments))}) is {value!r}"
    question = f"Write a Python function {row['signature']}: {row['task']} For example, {shown}."
    extra = {"level": row["level"], "entry": row["entry"], "tests": row["tests"]}
    return Example(f"code-{row['entry']}", f"code/{row['level']}", row["split"], question, row["program"], extra)


def _read_tests(tests: Sequence[Sequence[str]]) -> list[tuple[tuple[Any, ...], Any]]:
    return [(ast.literal_eval(arguments), ast.literal_eval(value)) for arguments, value in tests]


def extract_program(text: str, *, finished: bool = True, entry: str = "") -> tuple[str | None, str]:
    """The last fenced block of an answer, else all of it; or None and why there is none.

    Args:
        finished: False for a text that a length limit cut off; only whole blocks count then.
        entry: name of the function or class that is asked for; the last block that defines it goes before a later one,
            which often shows how to call it.
    """
    found = extract_text(text, finished=True, boxed=False)
    if found.text is None:
        return None, found.reason
    blocks = [str(block) for block in _BLOCK.findall(found.text)]
    if finished and (rest := _OPEN_BLOCK.search(_BLOCK.sub("", found.text))):
        blocks.append(rest[1])
    if blocks:
        defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", re.MULTILINE)
        return next((block for block in reversed(blocks) if entry and defines.search(block)), blocks[-1]), ""
    if not finished:
        return None, "cut off before the end of a program"
    return (found.text, "") if "def " in found.text else (None, "there is no program")


def same_value(expected: Any, value: Any) -> bool:
    """Equality of plain values as Python has it, with a tolerance of 1e-6 where a float is expected."""
    if isinstance(expected, float) and isinstance(value, (int, float)):
        if math.isnan(expected):
            return math.isnan(value)
        try:
            return math.isclose(expected, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:
            return False
    if isinstance(expected, (list, tuple)):
        if type(expected) is not type(value) or len(expected) != len(value):
            return False
        return all(same_value(a, b) for a, b in zip(expected, value, strict=True))
    if isinstance(expected, dict):
        if not isinstance(value, dict) or expected.keys() != value.keys():
            return False
        return all(same_value(expected[key], value[key]) for key in expected)
    return bool(expected == value)


class CodeProblems:
    """Programming problems as a task; the reward is 1 when every test passes.

    Args:
        problems: as `bundled_problems` describes them; those when None.
        levels: of the examples that `examples` gives.
        sandbox: where programs run; a new one of the default kind when None.

    Raises:
        BackendUnavailable: there is no sandbox here.
    """

    def __init__(
        self,
        problems: Sequence[Example] | None = None,
        *,
        levels: Sequence[int] = (1, 2, 3),
        sandbox: ProgramRunner | None = None,
    ) -> None:
        self.problems = bundled_problems() if problems is None else tuple(problems)
        self.levels = tuple(levels)
        self.sandbox: ProgramRunner = sandbox or Sandbox()

    @property
    def name(self) -> str:
        return "code"

    def examples(self, split: Split) -> Sequence[Example]:
        """The problems of one part at the task's levels."""
        return [p for p in self.problems if p.split == split and p.extra["level"] in self.levels]

    def example(self, seed: int, level: int, split: Split = "train") -> Example:
        """One of the problems of a level and part, drawn by the seed. Raises DataError where there is none."""
        known = [p for p in self.problems if p.split == split and p.extra["level"] == level]
        if not known:
            raise DataError(f"there is no {split} problem at level {level}", where="code")
        return known[Random(seed).randrange(len(known))]

    def prompt(self, example: Example) -> list[Message]:
        """What the function is to do, with its name and arguments and an example."""
        return [Message("user", example.question)]

    def solution(self, example: Example) -> tuple[str, str]:
        """No chain of thought, and the reference program in a block."""
        return "", f"```python\n{example.answer}\n```"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Run the program on the tests' inputs; what it returns is compared here, where it cannot reach."""
        program, reason = extract_program(text, finished=finished)
        if program is None:
            return _verdict(example, "no_answer" if finished else "length", None, reason)
        if len(program) > MAX_PROGRAM_LENGTH:
            reason = f"the program has {len(program)} characters; at most {MAX_PROGRAM_LENGTH} are run"
            return _verdict(example, "wrong", program[:40] + "…", reason)
        tests = _read_tests(example.extra["tests"])
        entry = example.extra["entry"]
        calls = [arguments for arguments, _ in tests]
        result = run_twice(self.sandbox, program, entry, calls)
        outcome, reason = _compare(entry, tests, result)
        failure = "sandbox" if result.ending == "sandbox" else ""
        return replace(_verdict(example, outcome, program, reason), failure=failure, sandbox=self.sandbox.tier)


def run_twice(
    sandbox: ProgramRunner, program: str, entry: str, calls: Sequence[tuple[Any, ...]], limits: Limits | None = None
) -> ProgramResult:
    """Run a program, and again where the sandbox failed: a machine short of processes for a moment costs no answer."""
    result = sandbox.run(program, entry, calls, limits)
    return sandbox.run(program, entry, calls, limits) if result.ending == "sandbox" else result


def _compare(entry: str, tests: Sequence[tuple[tuple[Any, ...], Any]], result: ProgramResult) -> tuple[Outcome, str]:
    if result.ending == "sandbox":
        return "error", result.detail
    for number, (call, (arguments, expected)) in enumerate(zip(result.calls, tests, strict=False), start=1):
        where = f"test {number} of {len(tests)}: {entry}({', '.join(map(repr, arguments))})"
        if call.error:
            return "wrong", f"{where} raised {call.error}"
        if not same_value(expected, call.value):
            return "wrong", f"{where} gave {shorten(call.value)} instead of {expected!r}"
    if result.ending != "finished":
        place = f"test {len(result.calls) + 1} of {len(tests)}: " if result.ending != "failed" else ""
        return "wrong", f"{place}{result.detail}"
    return "correct", ""


def shorten(value: Any, limit: int = 100) -> str:
    """What a value looks like, in so many characters at most."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a very long number"
    return text if len(text) <= limit else text[:limit] + "…"


def _verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str) -> Verdict:
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason)
