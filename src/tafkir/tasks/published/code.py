"""Programs that tests decide on: HumanEval(+), MBPP and MBPP+.

The program gets inputs in a sandbox and returns values. What they should be is what the canonical solution returns
there, or what the test says, and is compared here, where no answer can reach it.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from tafkir.errors import GradingError
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.backends import default_sandbox
from tafkir.tasks.code import extract_program, run_twice, shorten
from tafkir.tasks.published.base import (
    ReadTask,
    TaskCard,
    TaskEntry,
    TaskSampling,
    bad_row,
    find_file,
    read_rows,
    verdict,
)
from tafkir.tasks.sandbox import Limits, ProgramResult, ProgramRunner
from tafkir.tasks.sandbox_program import decode

__all__ = ["TASKS", "ProgramTask", "Suite", "plus_equal"]

MAX_PROGRAM_LENGTH: Final = 65_536
# EvalPlus: 4 GB; four times what the canonical solution takes, and at least (here of computing time) four seconds.
_LIMITS: Final = Limits(timeout_s=60.0, call_s=4.0, memory_bytes=4 << 30, output_bytes=64 << 20)
_REFERENCE_LIMITS: Final = replace(_LIMITS, timeout_s=120.0, call_s=0.0)


@dataclass(frozen=True, slots=True)
class Suite:
    """The tests of one problem.

    Attributes:
        entry: expression in the program's names that is called.
        calls: arguments of each test.
        check: the number of a test and what its call returned -> whether that is right. Sees plain values only.
        limits: of the program.
        wrap: makes the program that is run of the one that was answered.
    """

    entry: str
    calls: Sequence[tuple[Any, ...]]
    check: Callable[[int, Any], bool]
    limits: Limits = _LIMITS
    wrap: Callable[[str], str] = str


class ProgramTask(ReadTask):
    """A data set of programming problems.

    Args:
        card: what is known of it.
        read: gives the examples; called once, when they are first asked for.
        ask: the prompt of an example.
        suite: the tests of an example; called once for each that is graded.
        sandbox: where programs run; the chosen one of `tafkir.tasks.backends` when None.
    """

    def __init__(
        self,
        card: TaskCard,
        read: Callable[[], Iterable[Example]],
        ask: Callable[[Example], str],
        suite: Callable[[Example, ProgramRunner], Suite],
        *,
        sandbox: ProgramRunner | None = None,
    ) -> None:
        super().__init__(card, read)
        self._ask, self._suite = ask, suite
        self.sandbox = sandbox or default_sandbox()
        self._suites: dict[str, Suite] = {}

    def prompt(self, example: Example) -> list[Message]:
        """One user turn."""
        return [Message("user", self._ask(example))]

    def suite(self, example: Example) -> Suite:
        """The tests of an example, made once."""
        if example.id not in self._suites:
            self._suites[example.id] = self._suite(example, self.sandbox)
        return self._suites[example.id]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 when every test passes; the verdict names the tier that the program ran in.

        The program is the last fenced block with the function asked for, else the last one. A text that was cut off
        with a whole block in it is graded, and "length" where that is not right.
        """
        program, reason = extract_program(text, finished=finished, entry=str(example.extra.get("entry", "")))
        if program is None:
            return verdict(example, "no_answer" if finished else "length", None, reason)
        if len(program) > MAX_PROGRAM_LENGTH:
            reason = f"the program has {len(program)} characters; at most {MAX_PROGRAM_LENGTH} are run"
            return verdict(example, "wrong", program[:40] + "…", reason)
        suite = self.suite(example)
        result = run_twice(self.sandbox, suite.wrap(program), suite.entry, suite.calls, suite.limits)
        outcome, reason = _decide(suite, result)
        if not finished and outcome == "wrong":
            outcome, reason = "length", f"cut off: {reason}"
        failure = "sandbox" if result.ending == "sandbox" else ""
        return replace(verdict(example, outcome, program[:1000], reason), failure=failure, sandbox=self.sandbox.tier)


def _decide(suite: Suite, result: ProgramResult) -> tuple[Outcome, str]:
    if result.ending == "sandbox":
        return "error", result.detail
    count = len(suite.calls)
    for number, call in enumerate(result.calls):
        where = f"test {number + 1} of {count}: {shorten(suite.calls[number])}"
        if call.error:
            return "wrong", f"{where} raised {call.error}"
        if not suite.check(number, call.value):
            return "wrong", f"{where} gave {shorten(call.value)}"
    if result.ending != "finished":
        place = "" if result.ending == "failed" else f"test {len(result.calls) + 1} of {count}: "
        return "wrong", f"{place}{result.detail}"
    return "correct", ""


# ---- HumanEval+ and MBPP+ ------------------------------------------------------------------------------------------

_SET_EQUAL = frozenset(
    "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array find_dissimilar"
    " Diff".split()
)
"""MBPP+ problems whose list may come in any order, and with repeats."""
_NOT_NONE = frozenset(("check_str", "text_match_three", "text_starta_endb"))
"""MBPP+ problems that ask for a match object or a truth value: only whether there is one counts."""
_IS_THERE = "(lambda f: lambda *a: (lambda v: v if isinstance(v, bool) else v is not None)(f(*a)))"


# Answers of megabytes come back as their hash; the canonical solution's do, too. 2 and 2.0 have one hash, as in Python.
_SHORT = """
def _tafkir_short(function):
    def call(*arguments):
        import hashlib
        value = function(*arguments)
        if type(value) not in (str, list, tuple) or len(value) <= 65536:
            return value
        is_text = type(value) is str
        whole = value if is_text else [int(x) if type(x) is float and x.is_integer() else x for x in value]
        return f"{type(value).__name__} {hashlib.sha256(repr(whole).encode('utf-8', 'replace')).hexdigest()}"
    return call
"""


def plus_equal(expected: Any, value: Any, atol: float) -> bool:
    """EvalPlus' rule: equal as Python has it; or, where floats or a tolerance are expected, the same type and close.

    Close is |value - expected| <= atol + 1e-7 |expected|, item by item; atol is 1e-6 where it is 0 and a float, or a
    list of them, is expected.
    """
    if value == expected:
        return True
    if atol == 0 and _is_floats(expected):
        atol = 1e-6
    return atol != 0 and type(value) is type(expected) and _is_close(expected, value, atol)


def _is_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _is_close(expected: Any, value: Any, atol: float) -> bool:
    if isinstance(expected, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(expected) != len(value):
            return False
        return all(_is_close(a, b, atol) for a, b in zip(expected, value, strict=True))
    if not isinstance(expected, (int, float, complex)) or not isinstance(value, (int, float, complex)):
        return False
    try:
        if isinstance(expected, float) and math.isnan(expected):
            return value != value
        return expected == value or bool(abs(value - expected) <= atol + 1e-7 * abs(expected))
    except OverflowError:
        return False


def _special(entry: str, arguments: tuple[Any, ...], expected: Any, value: Any, atol: float) -> bool:
    """Problems with more than one right answer (evalplus.eval._special_oracle)."""
    if entry == "find_zero":  # any root
        return isinstance(value, (int, float)) and abs(_polynomial(arguments[0], value)) <= atol
    if entry in _SET_EQUAL:
        return isinstance(value, (list, tuple, set, dict)) and set(value) == set(expected)
    if entry == "are_equivalent":
        return True
    if entry == "sum_div" and value == 0:
        return True
    if entry == "surface_Area" and isinstance(value, (int, float)):
        edge, height = arguments
        own = round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))
        return abs(value - own) <= atol or plus_equal(expected, value, atol)
    if entry == "digit_distance_nums":
        width = max(len(str(number)) for number in arguments)
        pairs = zip(*(str(number).zfill(width) for number in arguments), strict=True)
        if value == sum(abs(int(a) - int(b)) for a, b in pairs if a.isdigit() and b.isdigit()):
            return True
    return plus_equal(expected, value, atol)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    try:
        return sum(c * math.pow(x, power) for power, c in enumerate(coefficients))
    except (OverflowError, ValueError):
        return math.inf


def _plus_suite(example: Example, sandbox: ProgramRunner, *, plus: bool) -> Suite:
    extra = example.extra
    name, atol = extra["entry"], extra["atol"]
    entry = f"{_IS_THERE}({name})" if name in _NOT_NONE else f"_tafkir_short({name})"
    encoded = extra["base"] + (extra["plus"] if plus else [])
    calls = [decode(arguments) for arguments in encoded]
    expected = _reference(example, sandbox, entry, calls)

    def check(number: int, value: Any) -> bool:
        try:
            return _special(name, calls[number], expected[number], value, atol)
        except TypeError:  # such as a set of lists
            return False

    return Suite(entry, calls, check, wrap=_with_short)


def _with_short(program: str) -> str:
    return f"{program}\n{_SHORT}"


def _reference(example: Example, sandbox: ProgramRunner, entry: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What the canonical solution returns. Raises GradingError where it does not: that says nothing of an answer."""
    result = run_twice(sandbox, _with_short(example.answer), entry, calls, _REFERENCE_LIMITS)
    wrong = next((call.error for call in result.calls if call.error), "")
    if result.ending != "finished" or wrong:
        raise GradingError(f"the canonical solution fails: {wrong or result.detail}", where=example.id)
    return [call.value for call in result.calls]


_PLUS_COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "atol", "base_input", "plus_input")


def _read_plus(card: TaskCard, data: Path | None, name: str) -> Iterable[Example]:
    path = find_file(card, data, [f"{name}.jsonl*", "*Plus*.jsonl*"], shipped=f"evalplus/{name}.jsonl.gz")
    for where, row in read_rows(path, _PLUS_COLUMNS):
        extra = {"entry": row["entry_point"], "atol": row["atol"], "prompt": row["prompt"]}
        extra |= {"base": row["base_input"], "plus": row["plus_input"]}
        if not isinstance(extra["base"], list) or not isinstance(extra["plus"], list):
            raise bad_row(where, "base_input and plus_input as lists of argument lists")
        yield Example(row["task_id"], name, "test", row["prompt"], row["prompt"] + row["canonical_solution"], extra)


def _ask_evalplus(example: Example) -> str:
    return (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        f"```\n{example.question.strip()}\n```\n"
    )


def _plus(name: str, *, plus: bool) -> Callable[[TaskCard, Path | None], ProgramTask]:
    def build(card: TaskCard, data: Path | None) -> ProgramTask:
        return ProgramTask(card, partial(_read_plus, card, data, name), _ask_evalplus, partial(_plus_suite, plus=plus))

    return build


# ---- MBPP ----------------------------------------------------------------------------------------------------------


def _read_mbpp(card: TaskCard, data: Path | None) -> Iterable[Example]:
    path = find_file(card, data, ["mbpp.jsonl*"], shipped="mbpp/mbpp.jsonl.gz")
    for where, row in read_rows(path, ("task_id", "text", "code", "test_setup_code", "test_list")):
        number = int(row["task_id"])
        split: Split = "test" if 10 < number <= 510 else "validation" if 510 < number <= 600 else "train"
        tests = list(row["test_list"])
        if not all(_equation(test) for test in tests):
            raise bad_row(where, "test_list of `assert CALL == VALUE`")
        name = re.search(r"\bdef\s+(\w+)", row["code"])
        extra = {"tests": tests, "setup": row["test_setup_code"], "entry": _called(tests[0]) or (name and name[1])}
        yield Example(f"mbpp/{number}", "mbpp", split, row["text"], row["code"], extra)


@cache
def _equation(test: str) -> tuple[str, str] | None:
    """The two sides of `assert LEFT == RIGHT`."""
    try:
        (statement,) = ast.parse(test.strip()).body
    except (SyntaxError, ValueError):
        return None
    tested = getattr(statement, "test", None)
    if not isinstance(tested, ast.Compare) or len(tested.ops) != 1 or not isinstance(tested.ops[0], ast.Eq):
        return None
    return ast.unparse(tested.left), ast.unparse(tested.comparators[0])


def _called(test: str) -> str:
    """The function that a test is of: the innermost call of a name that is no builtin."""
    sides = _equation(test)
    names = [node.func.id for node in ast.walk(ast.parse(sides[0] if sides else "0"))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
    own = [name for name in names if name not in ("set", "sorted", "list", "tuple", "round", "str", "len")]
    return own[0] if own else ""


def _mbpp_suite(example: Example, sandbox: ProgramRunner) -> Suite:
    """Each left side is evaluated in the sandbox, among the program's names; each right side never goes there."""
    sides = [_equation(test) for test in example.extra["tests"]]
    lefts = [left for left, _ in sides]  # type: ignore[misc]
    expected = [ast.literal_eval(right) for _, right in sides]  # type: ignore[misc]
    entry = f"lambda n: [{', '.join(f'lambda: {left}' for left in lefts)}][n]()"
    setup = example.extra["setup"]
    return Suite(
        entry,
        [(number,) for number in range(len(lefts))],
        lambda number, value: bool(value == expected[number]),
        limits=replace(_LIMITS, call_s=15.0),
        wrap=lambda program: f"{program}\n{setup}",
    )


def _ask_mbpp(example: Example) -> str:
    tests = "\n".join(example.extra["tests"])
    return (
        f"You are an expert Python programmer, and here is your task: {example.question} Your code should pass these "
        f"tests:\n\n{tests}\n\nGive the whole program in one ```python block."
    )


def _mbpp(card: TaskCard, data: Path | None) -> ProgramTask:
    return ProgramTask(card, partial(_read_mbpp, card, data), _ask_mbpp, _mbpp_suite)


# ---- the table -----------------------------------------------------------------------------------------------------

_GREEDY = TaskSampling(0.0, 1.0, 8192, 1)


def _entry(
    name: str, title: str, items: int, license_: str, source: str, build: Callable[[TaskCard, Path | None], ProgramTask]
) -> TaskEntry:
    card = TaskCard(
        name=name,
        version="1",
        title=title,
        metric="pass@1",
        language="en",
        num_items=items,
        license=license_,
        source=source,
        shipped=True,
        how_to_get="",
        sampling=_GREEDY,
    )
    return TaskEntry(card, build)


_EVALPLUS = "prompt, inputs and rule: arXiv 2305.01210, EvalPlus 0.3.1"
TASKS = (
    _entry(
        "humaneval",
        "HumanEval: functions from their docstrings, on the original inputs",
        164,
        "MIT, Apache-2.0 (inputs)",
        f"data: arXiv 2107.03374; {_EVALPLUS}",
        _plus("humaneval", plus=False),
    ),
    _entry(
        "humaneval-plus",
        "HumanEval+: the same functions on 80 times the inputs",
        164,
        "MIT, Apache-2.0 (inputs)",
        f"data: arXiv 2107.03374; {_EVALPLUS}",
        _plus("humaneval", plus=True),
    ),
    _entry(
        "mbpp",
        "MBPP: 500 entry-level problems with three tests each",
        500,
        "CC BY 4.0",
        "data and prompt (no examples in front): arXiv 2108.07732",
        _mbpp,
    ),
    _entry(
        "mbpp-plus",
        "MBPP+: 378 of them on 35 times the inputs",
        378,
        "CC BY 4.0, Apache-2.0 (inputs)",
        f"data: arXiv 2108.07732; {_EVALPLUS}",
        _plus("mbpp", plus=True),
    ),
)
