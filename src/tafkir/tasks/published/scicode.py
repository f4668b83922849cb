"""SciCode: research problems in steps, each on the model's own code of those before it. Data: the user's.

A step is right when all of its tests pass (the share of steps is the sub-problem score), a problem when all of its
steps are. What the tests should give lies in an HDF5 file, and never in a process with a model's code.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from tafkir.errors import DataError
from tafkir.records import Example, Message, Outcome, Verdict
from tafkir.tasks.answers import extract_text
from tafkir.tasks.backends import default_sandbox
from tafkir.tasks.code import run_twice
from tafkir.tasks.published.base import TURN, ReadTask, TaskEntry, TaskSampling, bad_row, entry, find_file, read_rows
from tafkir.tasks.published.base import TaskCard as Card
from tafkir.tasks.published.scicode_tests import COMPARERS, SplitTest, split_tests
from tafkir.tasks.sandbox import Limits, ProgramResult, ProgramRunner

__all__ = ["TASKS", "SciCodeTask", "read_targets", "step_code"]

PACKAGES: Final = ("numpy.linalg", "scipy.integrate", "scipy.optimize", "scipy.sparse.linalg", "mpmath", "sympy")
# The published grader gives a step half an hour.
_LIMITS: Final = Limits(timeout_s=1800.0, memory_bytes=8 << 30, output_bytes=64 << 20)
_MAX_STEP_LENGTH: Final = 65_536
_TEMPLATES: Final = {False: "background_comment_template.txt", True: "multistep_template.txt"}

# The tests and the published solutions are of numpy 1 and an older scipy; a picture's package that is not there is
# needed by no test.
_PRELUDE = """
import numpy
if not hasattr(numpy, "trapz"):
    numpy.trapz = numpy.trapezoid
import scipy.integrate
if not hasattr(scipy.integrate, "simps"):
    scipy.integrate.simps = lambda y, x=None, dx=1.0, axis=-1: scipy.integrate.simpson(y, x=x, dx=dx, axis=axis)
for _tafkir_line in {dependencies!r}.splitlines():
    try:
        exec(_tafkir_line, globals())
    except ImportError:
        pass
"""
_OWN = """
_TAFKIR_TESTS = {tests!r}
def _tafkir_values_of(number):
    import __main__, json
    exec(_TAFKIR_TESTS[number], globals())
    return json.dumps(__main__.encode(globals().pop("_tafkir_values"), arrays=True))
"""
_CHECK = """
_TAFKIR_TESTS = {tests!r}
def _tafkir_check(number, wanted, values):
    import __main__, json
    global target, _tafkir_values
    target, _tafkir_values = wanted, __main__.decode(json.loads(values), arrays=True)
    exec(_TAFKIR_TESTS[number], globals())
    return True
"""


class SciCodeTask(ReadTask):
    """The problems of a checkout, as a conversation of steps that do not see each other's words, only their code.

    Args:
        card: what is known of it.
        data: folder with the problems, the prompt's template, `test_data.h5`, and the steps that are given.
        background: tell the scientists' background with each step.
        sandbox: where programs run; the chosen one, with numpy and scipy, when None.

    Raises:
        DataError: one of the files is missing.
    """

    ends_when_cut = False

    def __init__(
        self, card: Card, data: Path | None, *, background: bool = False, sandbox: ProgramRunner | None = None
    ) -> None:
        problems = find_file(card, data, ["problems_test.jsonl", "problems_all.jsonl", "*test*.parquet", "*.jsonl"])
        super().__init__(card, partial(_read, problems))
        folder = problems.parent
        self._template = find_file(card, folder, [_TEMPLATES[background]]).read_text("utf-8")
        self._targets = find_file(card, folder, ["test_data.h5"])
        self._given = {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt") if _NUMBER.match(path.stem)}
        self._background = background
        self.sandbox = sandbox or default_sandbox(PACKAGES)

    def prompt(self, example: Example) -> list[Message]:
        """The first step that is asked for."""
        first = self.next_prompt(example, ())
        assert first is not None
        return first

    def next_prompt(self, example: Example, answers: Sequence[str]) -> list[Message] | None:
        """The next step, after the code of those before it; None at the end."""
        steps, codes = example.extra["sub_steps"], self._codes(example, answers)
        number = len(codes)
        if number == len(steps):
            return None
        before = "\n\n------\n\n".join(
            f"{self._words(step)}\n\n{code}" for step, code in zip(steps, codes, strict=False)
        )
        step = steps[number]
        asked = f"{self._words(step)}\n\n{step['function_header']}\n\n{step['return_line']}"
        values = {"problem_steps_str": before, "next_step_str": asked, "dependencies": example.extra["dependencies"]}
        return [Message("user", self._template.format(**values))]

    def _words(self, step: Mapping[str, Any]) -> str:
        told = str(step["step_description_prompt"])
        return f"{told}\n{step['step_background']}" if self._background else told

    def _codes(self, example: Example, answers: Sequence[str]) -> list[str]:
        """The code of the steps so far: the answers', and between them that of the steps that are given."""
        left, codes = iter(answers), []
        for step in example.extra["sub_steps"]:
            given = self._given.get(step["step_number"])
            if given is not None:
                codes.append(_defined(given, step["function_header"]))
            elif (answer := next(left, None)) is not None:
                codes.append(step_code(answer))
            else:
                break
        return codes

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """The share of right steps as the reward, "correct" where all are; `extracted` has a digit a step.

        Args:
            text: the answers, joined by `TURN`.

        Raises:
            DataError: the targets cannot be read, or a test cannot be taken apart.
        """
        steps = example.extra["sub_steps"]
        codes = self._codes(example, text.split(TURN))
        marks, reasons, failure = "", [], ""
        for number, step in enumerate(steps):
            if step["step_number"] in self._given:
                continue
            outcome, reason = self._run(example, step, codes[: number + 1] if number < len(codes) else None)
            if outcome == "error":
                failure = reason
            marks += "1" if outcome == "correct" else "0"
            reasons += [f"step {step['step_number']}: {reason}"] if reason else []
        final: Outcome = "error" if failure else "correct" if "0" not in marks else "wrong" if finished else "length"
        verdict = Verdict(final, marks.count("1") / len(marks), marks, "1" * len(marks), "; ".join(reasons)[:1000])
        return replace(verdict, failure="sandbox" if failure else "", sandbox=self.sandbox.tier)

    def _run(self, example: Example, step: Mapping[str, Any], codes: Sequence[str] | None) -> tuple[Outcome, str]:
        """Whether a step's tests pass: the model's code gives values in one sandbox, another one compares them."""
        if codes is None:
            return "wrong", "there is no answer to it"
        if len(codes[-1]) > _MAX_STEP_LENGTH:
            return "wrong", f"the program has {len(codes[-1])} characters; at most {_MAX_STEP_LENGTH} are run"
        tests = self._split(example, step)
        targets = read_targets(self._targets, step["step_number"], len(tests))
        prelude = _PRELUDE.format(dependencies=example.extra["dependencies"])
        program = "\n".join([prelude, *codes, _OWN.format(tests=[test.own for test in tests])])
        calls = [(number,) for number in range(len(tests))]
        result = run_twice(self.sandbox, program, "_tafkir_values_of", calls, _LIMITS)
        values = [call.value for call in takewhile(lambda call: isinstance(call.value, str), result.calls)]
        if len(values) < len(tests):
            return _ended(result, len(values) + 1)
        checker = prelude + COMPARERS + _CHECK.format(tests=[test.check for test in tests])
        given = [(number, target, value) for number, (target, value) in enumerate(zip(targets, values, strict=True))]
        result = run_twice(self.sandbox, checker, "_tafkir_check", given, _LIMITS)
        right = [call.value for call in takewhile(lambda call: call.value is True, result.calls)]
        return ("correct", "") if len(right) == len(tests) else _ended(result, len(right) + 1)

    def _split(self, example: Example, step: Mapping[str, Any]) -> list[SplitTest]:
        return split_tests(example.extra["dependencies"], step["test_cases"], f"{example.id} {step['step_number']}")


def _ended(result: ProgramResult, number: int) -> tuple[Outcome, str]:
    if result.ending == "sandbox":
        return "error", result.detail
    failed = result.calls[number - 1] if number <= len(result.calls) else None
    if failed is None:
        return "wrong", f"test {number}: {result.detail}"
    return "wrong", f"test {number}: {failed.error or 'it returned something else than values'}"


_NUMBER = re.compile(r"\d+\.\d+$")
_IMPORT = re.compile(r"^\s*(import .*|from .*\s+import\s+.*)", re.MULTILINE)


def step_code(answer: str) -> str:
    """The first block of Python in an answer, or all of it, without its imports: the published rule.

    An answer without an end to its thinking has none; a fence that is not closed ends with the answer.
    """
    found = extract_text(answer, finished=True, boxed=False).text or ""
    fence = "```python" if "```python" in found else "```"
    block = found.split(fence)[1].split("```")[0] if fence in found else found
    return _IMPORT.sub("", block)


def _defined(source: str, header: str) -> str:
    """The function or class of a header in a given file."""
    name = re.search(r"\b(?:def|class)\s+(\w+)", header)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and name is not None and node.name == name[1]:
            return ast.unparse(node)
    raise DataError("a given step defines something else", where=header[:60], expected="the function of its header")


# ---- the targets ---------------------------------------------------------------------------------------------------


def read_targets(path: Path, step: str, count: int) -> list[Any]:
    """What the tests of a step should give, from the published HDF5 file: plain values, arrays, sparse matrices.

    Raises:
        DataError: h5py is not installed, or the file has no such step.
    """
    try:
        import h5py
    except ImportError:
        raise DataError("the targets of SciCode need h5py", where=str(path), fix="pip install 'tafkir[eval]'") from None
    try:
        with h5py.File(path, "r") as file:
            found = []
            for number in range(1, count + 1):
                group = file[f"{step}/test{number}"]
                values = tuple(_target(group[key], h5py) for key in group)
                found.append(values[0] if len(values) == 1 else values)
            return found
    except (OSError, KeyError) as error:
        raise DataError(
            f"no targets of step {step} ({error})", where=str(path), expected="SciCode's test_data.h5"
        ) from None


def _target(node: Any, h5py: Any) -> Any:
    if isinstance(node, h5py.Dataset):
        value = node[()]
        return value.decode("utf-8") if isinstance(value, bytes) else value
    if "list" in node:
        return [_target(node["list"][key], h5py) for key in node["list"]]
    if "sparse_matrix" in node:
        return _sparse(node["sparse_matrix"])
    return {_key(key): _target(node[key], h5py) for key in node}


def _key(name: str) -> float | str:
    try:
        return float(name)
    except ValueError:
        return name


def _sparse(group: Any) -> Any:
    import scipy.sparse

    data, shape = group["data"][()], tuple(map(int, group["shape"][()]))
    if "row" in group:
        return scipy.sparse.coo_matrix((data, (group["row"][()], group["col"][()])), shape=shape)
    parts = (data, group["indices"][()], group["indptr"][()])
    if "blocksize" in group:
        return scipy.sparse.bsr_matrix(parts, shape=shape, blocksize=tuple(map(int, group["blocksize"][()])))
    return scipy.sparse.csr_matrix(parts, shape=shape)


# ---- the table -----------------------------------------------------------------------------------------------------

_COLUMNS = ("problem_id", "problem_description_main", "required_dependencies", "sub_steps")
_STEP_COLUMNS = ("step_number", "step_description_prompt", "function_header", "test_cases", "return_line")


def _read(path: Any) -> Iterable[Example]:
    for where, row in read_rows(path, _COLUMNS):
        steps = row["sub_steps"]
        if not isinstance(steps, list) or not all(set(_STEP_COLUMNS) <= set(step) for step in steps):
            raise bad_row(where, f"sub_steps with {', '.join(_STEP_COLUMNS)}")
        extra = {"dependencies": row["required_dependencies"], "sub_steps": json.loads(json.dumps(steps))}
        name = str(row.get("problem_name") or "")
        yield Example(f"scicode/{row['problem_id']}", "scicode", "test", row["problem_description_main"], name, extra)


def _entry(name: str, title: str, *, background: bool) -> TaskEntry:
    return entry(
        name,
        title,
        65,
        partial(SciCodeTask, background=background),
        sampling=TaskSampling(0.0, 1.0, 32768, 1),
        license="Apache-2.0",
        metric="steps",
        source="prompt, steps and rule: arXiv 2407.13168, scicode-bench/SciCode",
        how_to_get="git clone https://github.com/scicode-bench/SciCode; huggingface-cli download SciCode1/SciCode "
        "--repo-type dataset --local-dir SciCode/eval/data; test_data.h5 from the folder on Google Drive that its "
        f"README names, into SciCode/eval/data; then --data {name}=SciCode/eval/data (needs tafkir[eval])",
    )


TASKS = (
    _entry("scicode", "SciCode: 65 research problems in 288 steps, on one's own code", background=False),
    _entry("scicode-background", "SciCode with the scientists' background of each step", background=True),
)
