"""Reads word problems: the sets that ship with the package, and JSON-lines files of one's own.

Every row becomes a `Problem` whose equations are checked with exact arithmetic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from tafkir.data.arithmetic import (
    ExpressionError,
    evaluate,
    format_number,
    parse_expression,
    parse_number,
    render,
    split,
)
from tafkir.data.lines import BadRowError, numbered_lines, parse_row
from tafkir.data.split import gsm8k_split, own_split, svamp_split
from tafkir.errors import DataError
from tafkir.records import Example, Split

__all__ = ["BUNDLED_SETS", "Problem", "SourceReport", "Step", "read_source"]

BUNDLED_SETS = ("gsm8k", "svamp")

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_WHOLE_EQUATION = re.compile(r"([0-9]{1,15})([-+*/])([0-9]{1,15})=([0-9]{1,15})")
_FINAL = re.compile(r"####\s*(.+?)\s*$")


@dataclass(frozen=True, slots=True)
class Step:
    """One equation of a solution: `expression` = `result`, both without spaces, numbers as plain decimals."""

    expression: str
    result: str

    def __str__(self) -> str:
        return f"{self.expression}={self.result}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem with a numeric answer.

    `steps` is empty when the row brings no equations or they cannot be trusted; `flaw` then says why (an empty flaw
    with empty steps is a row that never claimed to have equations: fit for RL and eval, not for supervised training).
    """

    id: str
    source: str
    split: Split
    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    flaw: str = ""

    def as_example(self) -> Example:
        """The problem as tasks see it."""
        return Example(self.id, self.source, self.split, self.question, self.answer)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What reading one source gave: rows read, rows refused as malformed, and flawed rows by reason."""

    source: str
    rows: int
    bad_rows: tuple[str, ...] = ()
    flaws: Mapping[str, int] = field(default_factory=dict)


def _lines(path: Path | Any, where: str) -> Iterator[tuple[int, str]]:
    expected = f"a JSONL file, or one of the bundled sets {', '.join(BUNDLED_SETS)}"
    return numbered_lines(path, where, expected=expected, fix="correct data.sources in the recipe")


def _whole_step(equation: str) -> Step | None:
    """One true operation on whole numbers, which most annotations are, without the cost of fractions."""
    match = _WHOLE_EQUATION.fullmatch(equation)
    if match is None:
        return None
    left, operator, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
    if operator == "+":
        true = left + right == result
    elif operator == "-":
        true = left - right == result
    else:
        true = left * right == result if operator == "*" else right * result == left and right != 0
    return Step(f"{left}{operator}{right}", str(result)) if true else None


def _steps_from(equations: list[str], answer: Fraction, split_operations: bool) -> tuple[tuple[Step, ...], str]:
    """Steps of `a+b=c` texts, and the flaw that forbids to train on them ("" for none)."""
    steps: list[Step] = []
    last: Fraction | None = None
    for equation in equations:
        whole = _whole_step(equation)
        if whole is not None:
            steps.append(whole)
            last = Fraction(int(whole.result))
            continue
        left, equals, right = equation.replace(" ", "").partition("=")
        try:
            expression = parse_expression(left)
            value = evaluate(expression)
        except ExpressionError:
            return (), "malformed equation"
        result = parse_number(right) if equals else value
        if result is None:
            return (), "malformed equation"
        if value != result:
            return (), "equation does not recompute"
        # a lone number (`12=12`) is no operation: it says nothing that the next equation does not repeat
        parts = split(expression)
        if parts and not split_operations:
            parts = [(render(expression), value)]
        if any("/" in format_number(part) for _, part in parts):
            return (), "result has no exact decimal"
        steps += [Step(text, format_number(part)) for text, part in parts]
        last = value if parts else last
    if not steps:
        return (), "no operation" if equations else "no equations"
    if last != answer:
        return (), "last result is not the answer"
    return tuple(steps), ""


def _text_field(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"a non-empty string in field {key!r}")
    return " ".join(value.split())


def _number_field(text: str, key: str) -> Fraction:
    value = parse_number(text.strip().removeprefix("$").removesuffix("."))
    if value is None:
        raise BadRowError(f"a number as {key}, not {text[:40]!r}")
    return value


def _gsm8k_answer(text: str) -> tuple[Fraction, list[str]]:
    match = _FINAL.search(text)
    if match is None:
        raise BadRowError("a last line '#### NUMBER' in field 'answer'")
    return _number_field(match[1], "the answer after ####"), _ANNOTATION.findall(text)


_Rows = Iterator[tuple[str, Callable[[], Problem]]]
"""Where each row stands, and what reads it."""


def _gsm8k_rows(split_operations: bool) -> _Rows:
    parts: tuple[Literal["train", "test"], ...] = ("train", "test")
    for part in parts:
        where = f"gsm8k/{part}.jsonl.gz"
        for number, line in _lines(files("tafkir") / "datasets" / "gsm8k" / f"{part}.jsonl.gz", where):
            id = f"gsm8k-{part}-{number - 1}"

            def build(line: str = line, id: str = id, part: Literal["train", "test"] = part) -> Problem:
                row = parse_row(line)
                answer, equations = _gsm8k_answer(row["answer"])
                steps, flaw = _steps_from(equations, answer, split_operations)
                question = _text_field(row, "question")
                return Problem(id, "gsm8k", gsm8k_split(id, part), question, format_number(answer), steps, flaw)

            yield f"{where}:{number}", build


def _svamp_rows(split_operations: bool) -> _Rows:
    where = "svamp/svamp.jsonl.gz"
    for number, line in _lines(files("tafkir") / "datasets" / "svamp" / "svamp.jsonl.gz", where):

        def build(line: str = line) -> Problem:
            row = parse_row(line)
            answer = parse_number(str(row["Answer"]))
            if answer is None:
                raise BadRowError("a number in field 'Answer'")
            # a nested binary equation is one operation a line whatever the reader of GSM8K's asks for
            steps, flaw = _steps_from([row["Equation"]], answer, split_operations=True)
            body = _text_field(row, "Body")
            body += "" if body.endswith((".", ",", "?", "!")) else ","
            id = f"svamp-{row['ID']}"
            question = f"{body} {_text_field(row, 'Question')}"
            return Problem(id, "svamp", svamp_split(id), question, format_number(answer), steps, flaw)

        yield f"{where}:{number}", build


def _own_rows(path: Path, split_operations: bool) -> _Rows:
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    for number, line in _lines(path, str(path)):

        def build(line: str = line, number: int = number) -> Problem:
            row = parse_row(line)
            question = _text_field(row, "question")
            raw = row.get("answer")
            if isinstance(raw, (int, float)) and not isinstance(raw, bool):
                raw = repr(raw)
            if not isinstance(raw, str):
                raise BadRowError("a number or a worked solution in field 'answer'")
            if "####" in raw:
                answer, equations = _gsm8k_answer(raw)
            else:
                answer, equations = _number_field(raw, "the answer"), []
            if row.get("equation") is not None:
                equations = [part for part in _text_field(row, "equation").split(";") if part.strip()]
            steps, flaw = _steps_from(equations, answer, split_operations) if equations else ((), "")
            split = row.get("split", own_split(question))
            if split not in ("train", "validation", "test"):
                raise BadRowError("train, validation or test in field 'split'")
            id = str(row.get("id", f"{name}-{number}"))
            return Problem(id, name, split, question, format_number(answer), steps, flaw)

        yield f"{path}:{number}", build


def read_source(
    source: str | Path, *, on_bad_row: Literal["error", "skip"] = "error", split_operations: bool = True
) -> tuple[list[Problem], SourceReport]:
    """Every problem of one source, in file order, with what was found wrong.

    Args:
        source: "gsm8k", "svamp", or the path of a JSONL file (`.gz` allowed) with `question` and `answer`:
            a GSM8K-style solution (`... <<48/2=24>> ... #### 72`), or a number beside an optional `equation`
            ("( 8 - 3 ) * 2", or several joined by ";"). Optional: `id`, and `split` (else the question's hash decides).
        on_bad_row: "error" stops at the first malformed row; "skip" counts and reports it.
        split_operations: write `16-3-4=9` as `16-3=13`, `13-4=9`; False keeps the annotation in one piece.

    Raises:
        DataError: the file is missing or unreadable, a row is malformed, or no row is valid.
    """
    if isinstance(source, str) and source in BUNDLED_SETS:
        problems, report = _read_bundled(source, split_operations)
        return list(problems), report
    return _read(str(source), _own_rows(Path(source), split_operations), on_bad_row)


@lru_cache(maxsize=2 * len(BUNDLED_SETS))
def _read_bundled(source: str, split_operations: bool) -> tuple[tuple[Problem, ...], SourceReport]:
    """A set of the package, whose rows are checked once in a process: every stage of a run reads it again."""
    rows = {"gsm8k": _gsm8k_rows, "svamp": _svamp_rows}[source](split_operations)
    problems, report = _read(source, rows, "error")
    return tuple(problems), report


def _read(source: str, rows: _Rows, on_bad_row: Literal["error", "skip"]) -> tuple[list[Problem], SourceReport]:
    problems: list[Problem] = []
    bad_rows: list[str] = []
    for where, build in rows:
        try:
            problems.append(build())
        except BadRowError as bad:
            if on_bad_row == "error":
                fix = 'correct the row, or set data.on_bad_row = "skip" to leave such rows out'
                raise DataError("malformed row", where=where, expected=str(bad), fix=fix) from None
            bad_rows.append(f"{where}: expected {bad}")
    if not problems:
        raise DataError(
            f"no valid rows ({len(bad_rows)} malformed)",
            where=source,
            expected='lines like {"question": "...", "answer": "... #### 72"}',
        )
    flaws = Counter(problem.flaw for problem in problems if problem.flaw)
    return problems, SourceReport(source, len(problems), tuple(bad_rows), dict(flaws))
