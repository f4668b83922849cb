"""Contest problems that a program solves from stdin or as a method: LiveCodeBench, Codeforces. Data: the user's."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

from tafkir.records import Example
from tafkir.tasks.backends import default_sandbox
from tafkir.tasks.published.base import TaskCard, TaskEntry, TaskSampling, bad_row, find_file, read_rows
from tafkir.tasks.published.code import ProgramTask, Suite
from tafkir.tasks.sandbox import Limits, ProgramRunner

__all__ = ["TASKS", "same_lines", "stdin_program"]

# LiveCodeBench: 6 s a test, all tests, 4 GB; the whole may take five minutes.
_CALL_S: Final = 6.0
_WHOLE_S: Final = 300.0
_MEMORY: Final = 4 << 30
_PACKAGES: Final = ("numpy.linalg",)

_IMPORTS = (
    "import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random, re\n"
    "import statistics, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom copy import *\nfrom functools import *\n"
    "from heapq import *\nfrom itertools import *\nfrom math import *\nfrom operator import *\nfrom typing import *\n"
    "from builtins import *\nsys.setrecursionlimit(50000)\n"
)
"""What LeetCode and the like have imported already; the published grader does, too."""

_RUNNER = """
def _tafkir_run(text):
    import fcntl, io, os, sys
    data = text.encode("utf-8", "surrogatepass")
    if "open(0" in _TAFKIR_SOURCE or "/dev/stdin" in _TAFKIR_SOURCE or "os.read" in _TAFKIR_SOURCE:
        read, write = os.pipe()
        fcntl.fcntl(write, 1031, max(len(data), 4096))
        os.set_blocking(write, False)
        os.write(write, data)
        os.close(write)
        if read != 0:  # which it is where the program closed its stdin the last time
            os.dup2(read, 0)
            os.close(read)
    before = sys.stdin, sys.stdout
    out = io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    wrapper = sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    scope = {"__name__": "__main__"}
    try:
        exec(_TAFKIR_IMPORTS, scope)
        exec(_TAFKIR_CODE, scope)
    except SystemExit:
        pass
    finally:
        sys.stdin, sys.stdout = before
    return out.getvalue().decode("utf-8", "replace")
"""


def stdin_program(program: str) -> str:
    """A program with a function `_tafkir_run(text)` that runs the given one on stdin and returns what it wrote."""
    return (
        f"_TAFKIR_SOURCE = {program!r}\n_TAFKIR_IMPORTS = {_IMPORTS!r}\n"
        f"_TAFKIR_CODE = compile(_TAFKIR_SOURCE, 'program.py', 'exec')\n{_RUNNER}"
    )


def same_lines(expected: str, output: str) -> bool:
    """Line by line without surrounding spaces: equal texts, or equal rows of decimal numbers (LiveCodeBench's rule)."""
    wanted, got = ([line.strip() for line in text.strip().split("\n")] for text in (expected, output))
    return len(wanted) == len(got) and all(a == b or _same_numbers(a, b) for a, b in zip(wanted, got, strict=True))


def _same_numbers(expected: str, output: str) -> bool:
    try:
        return [Decimal(word) for word in expected.split()] == [Decimal(word) for word in output.split()]
    except ArithmeticError:
        return False


def _limits(tests: int, call_s: float = _CALL_S) -> Limits:
    whole = min(_WHOLE_S, call_s * (tests + 1))
    return Limits(timeout_s=whole, call_s=call_s, memory_bytes=_MEMORY, output_bytes=64 << 20)


def _stdin_suite(tests: Sequence[Mapping[str, str]], call_s: float = _CALL_S) -> Suite:
    outputs = [test["output"] for test in tests]

    def check(number: int, value: Any) -> bool:
        return isinstance(value, str) and same_lines(outputs[number], value)

    return Suite("_tafkir_run", [(t["input"],) for t in tests], check, _limits(len(tests), call_s), stdin_program)


# ---- LiveCodeBench -------------------------------------------------------------------------------------------------

_LCB_COLUMNS = (
    "question_id", "question_content", "platform", "contest_date", "difficulty", "starter_code", "public_test_cases",
    "private_test_cases", "metadata",
)  # fmt: skip
_LCB_FORMAT = {
    True: "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters.",
    False: "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the "
    "sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it "
    "reads the inputs, runs the algorithm and writes output to STDOUT.",
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickled text and nothing else: a pickle may name any function, and this one knows none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a file of tests")


def _tests(packed: str) -> list[dict[str, Any]]:
    """The tests of a field: JSON, or JSON that was pickled, deflated and written in base 64."""
    try:
        found = json.loads(packed)
    except ValueError:
        raw = zlib.decompress(base64.b64decode(packed.encode(), validate=True))
        found = json.loads(_PlainUnpickler(io.BytesIO(raw)).load())
    return [dict(test) for test in found]


def _read_lcb(card: TaskCard, data: Path | None) -> Iterable[Example]:
    for path in _lcb_files(card, data):
        for where, row in read_rows(path, _LCB_COLUMNS):
            try:
                tests = _tests(row["public_test_cases"]) + _tests(row["private_test_cases"])
                name = json.loads(row["metadata"] or "{}").get("func_name", "")
            except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
                raise bad_row(where, f"test cases as LiveCodeBench packs them ({error})") from None
            extra = {"tests": tests, "entry": "Solution" if name else "", "method": name}
            extra |= {"starter": row["starter_code"], "date": str(row["contest_date"])[:10]}
            yield Example(
                f"lcb/{row['question_id']}", "livecodebench", "test", row["question_content"], "", extra,
                str(row["platform"]), str(row["difficulty"]),
            )  # fmt: skip


def _lcb_files(card: TaskCard, data: Path | None) -> Sequence[Any]:
    """All parts of the release: the hub's repository has `test.jsonl`, `test2.jsonl`, ..."""
    if data is not None and data.is_dir() and (parts := sorted(data.glob("test*.jsonl*"))):
        return parts
    return [find_file(card, data, ["*.jsonl", "*.jsonl.gz", "*.json", "*.parquet"])]


def _ask_lcb(example: Example) -> str:
    starter = example.extra["starter"]
    return (
        f"### Question:\n{example.question}\n\n### Format: {_LCB_FORMAT[bool(starter)]}\n"
        f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    )


def _lcb_suite(example: Example, _: ProgramRunner) -> Suite:
    tests, method = example.extra["tests"], example.extra["method"]
    if not method:
        return _stdin_suite(tests)
    calls = [tuple(json.loads(line) for line in test["input"].split("\n")) for test in tests]
    outputs = [json.loads(test["output"]) for test in tests]

    def check(number: int, value: Any) -> bool:
        return bool((list(value) if isinstance(value, tuple) else value) == outputs[number])

    entry = f"(Solution().{method} if 'Solution' in globals() else {method})"
    return Suite(entry, calls, check, _limits(len(tests)), lambda program: f"{_IMPORTS}\n{program}")


def _lcb(card: TaskCard, data: Path | None) -> ProgramTask:
    _lcb_files(card, data)
    sandbox = default_sandbox(_PACKAGES)
    return ProgramTask(card, partial(_read_lcb, card, data), _ask_lcb, _lcb_suite, sandbox=sandbox)


# ---- Codeforces ----------------------------------------------------------------------------------------------------


def _read_codeforces(card: TaskCard, data: Path | None) -> Iterable[Example]:
    path = find_file(card, data, ["*codeforces*.jsonl*", "*.jsonl", "*.jsonl.gz"])
    for where, row in read_rows(path, ("id", "question", "tests")):
        tests = row["tests"]
        if not isinstance(tests, list) or not tests or not all({"input", "output"} <= set(test) for test in tests):
            raise bad_row(where, "tests as a list of objects with input and output")
        extra = {"tests": tests, "entry": "", "time_limit": float(row.get("time_limit") or _CALL_S)}
        yield Example(
            str(row["id"]), "codeforces", "test", row["question"], "", extra, difficulty=str(row.get("rating") or "")
        )


def _ask_codeforces(example: Example) -> str:
    return f"### Question:\n{example.question}\n\n### Format: {_LCB_FORMAT[False]}\n```python\n# YOUR CODE HERE\n```\n"


def _codeforces(card: TaskCard, data: Path | None) -> ProgramTask:
    find_file(card, data, ["*codeforces*.jsonl*", "*.jsonl", "*.jsonl.gz"])

    def suite(example: Example, _: ProgramRunner) -> Suite:
        return _stdin_suite(example.extra["tests"], example.extra["time_limit"])

    sandbox = default_sandbox(_PACKAGES)
    return ProgramTask(card, partial(_read_codeforces, card, data), _ask_codeforces, suite, sandbox=sandbox)


TASKS = (
    TaskEntry(
        TaskCard(
            name="livecodebench",
            version="2",
            title="LiveCodeBench: contest problems by date, every test of each",
            metric="pass@1",
            language="en",
            num_items=None,
            license="CC (see the data card)",
            source="prompt and rule: arXiv 2403.07974; sampling: DeepSeek-R1, arXiv 2501.12948",
            shipped=False,
            how_to_get="huggingface-cli download livecodebench/code_generation_lite --repo-type dataset --local-dir lcb"
            ", then --data livecodebench=lcb (a file test6.jsonl alone gives the window of that release)",
            sampling=TaskSampling(0.6, 0.95, 32768, 16),
        ),
        _lcb,
    ),
    TaskEntry(
        TaskCard(
            name="codeforces",
            version="2",
            title="Codeforces: problems with tests of one's own; `tafkir.tasks.ratings` makes Elo of what is solved",
            metric="pass@1",
            language="en",
            num_items=None,
            license="the user's data",
            source="8 tries a problem: CodeElo, arXiv 2501.01257",
            shipped=False,
            how_to_get="a JSON-lines file with id (1971A), question, tests [{input, output}], and where known rating "
            "and time_limit in seconds, then --data codeforces=FILE; such as made of open-r1/codeforces on the hub",
            sampling=TaskSampling(0.6, 0.95, 32768, 8),
        ),
        _codeforces,
    ),
)
