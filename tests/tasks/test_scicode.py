"""SciCode: steps on one's own code, targets that no model's code can reach, and numpy in the sandbox."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.errors import BackendUnavailable, DataError
from tafkir.eval.endpoint import EndpointAnswers, EndpointOptions
from tafkir.eval.harness import EvalSettings, evaluate_models
from tafkir.eval.table import render_scores, score_samples
from tafkir.tasks.backends import Backends, choose_backends
from tafkir.tasks.bubblewrap import package_folders
from tafkir.tasks.catalog import load_task
from tafkir.tasks.published.base import TURN
from tafkir.tasks.published.scicode import PACKAGES, SciCodeTask, read_targets
from tafkir.tasks.published.scicode_tests import split_tests
from tafkir.tasks.sandbox import Limits, Sandbox
from tests.eval.chat_server import Body, ChatServer, completion
from tests.tasks.test_sandbox import needs_bwrap

GOLDENS = Path(__file__).with_name("goldens") / "code"
h5py, numpy, sparse = (pytest.importorskip(name) for name in ("h5py", "numpy", "scipy.sparse"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SciCodeTask]:
    """A made-up problem of three steps, the second of which is given, with targets as the published file has them."""
    folder = tmp_path_factory.mktemp("scicode")
    shutil.copytree(GOLDENS / "scicode", folder, dirs_exist_ok=True)
    with h5py.File(folder / "test_data.h5", "w") as file:
        file["1.1/test1/var1"] = numpy.array([0.6, 0.8])
        file["1.1/test2/var1"] = numpy.array([0.0, 0.0, 1.0])
        file["1.3/test1/var1"] = 5.0
        file["1.3/test1/var2/x"] = 3.0
        file["1.3/test1/var2/unit"] = [0.6, 0.8]
        matrix = sparse.csr_matrix(numpy.array([[3.0, 4.0]]))
        for name in ("data", "indices", "indptr", "shape"):
            file[f"1.3/test1/var3/sparse_matrix/{name}"] = getattr(matrix, name)
        file["1.3/test2/var1"] = 0
        file["1.3/test3/var1"] = True
        file["1.4/test1/var1/list/var1"] = 1.5
        file["1.4/test1/var1/list/var2"] = "text"
    with choose_backends(Backends()):
        try:
            found = load_task("scicode", folder)
        except BackendUnavailable:
            pytest.skip("bubblewrap does not work here")
        assert isinstance(found, SciCodeTask)
        yield found


def test_golden_answers(task: SciCodeTask) -> None:
    (example,) = task.examples("test")
    for line in (GOLDENS / "scicode.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        verdict = task.grade(example, TURN.join(row["answers"]), finished=row["outcome"] != "length")
        assert (verdict.extracted, verdict.outcome) == (row["marks"], row["outcome"]), (row["what"], verdict)
        assert verdict.reward == row["marks"].count("1") / 2 and verdict.sandbox == "bwrap"


def test_each_step_is_asked_with_the_code_of_those_before_and_none_of_the_words(
    task: SciCodeTask, tmp_path: Path
) -> None:
    """Through the harness: one prompt a step, which has the given step's code, too; sub-problem and main score."""
    right = next(json.loads(line) for line in (GOLDENS / "scicode.jsonl").read_text("utf-8").splitlines())["answers"]

    def react(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, completion(right[0] if "BEFORE:\n\n" in body["messages"][-1]["content"] else "def parts(v): 1")

    with ChatServer(react) as server:
        model = EndpointAnswers(server.url, options=EndpointOptions(concurrency=1, timeout_s=5.0))
        done = evaluate_models([model], [task], EvalSettings(), tmp_path / "samples.jsonl")
    first, second = (body["messages"] for body in server.bodies)
    assert [message["role"] for message in second] == ["user"]
    text = second[0]["content"]
    assert "def unit(v):\n    return v / np.linalg.norm(v)" in text and "Here it is" not in text
    assert text.index("class Box:\n\n    def __init__") < text.index("NEXT:") < text.index("def parts(v):")
    assert first[0]["content"].endswith("USE:\nimport numpy as np\nfrom scipy import sparse\n"
                                        "from mpl_toolkits.mplot3d import Axes3D\n")  # fmt: skip
    (row,) = score_samples(done.samples, {"scicode": task.card.metric})
    assert row["accuracy"]["value"] == 0 and row["steps"]["value"] == 0.5 and "steps:  50.0 %" in render_scores([row])
    assert "Background: divide by the norm." not in first[0]["content"]
    with choose_backends(Backends()):
        told = load_task("scicode-background", task._targets.parent)
        assert "Background: divide by the norm." in told.prompt(told.examples("test")[0])[0].content


def test_a_test_is_taken_apart_where_the_models_values_end() -> None:
    trusted = "a, b = 2, [0]\nfor i in range(3): b[0] = f(i)\nassert all(g(x) for x in b) == target and np.sin(a) > 0"
    (split,) = split_tests("import numpy as np", [trusted], "1.1")
    assert split.own.endswith("_tafkir_values = ([g(x) for x in b],)")
    assert split.check.splitlines()[1:] == ["assert all(_tafkir_values[0]) == target and np.sin(a) > 0"]
    with pytest.raises(DataError, match="gives its target to the model's code"):
        split_tests("", ["assert f(target)"], "1.1")
    with pytest.raises(DataError, match=r"1\.1.*no Python"):
        split_tests("", ["assert ("], "1.1")


def test_targets_and_what_is_missing(task: SciCodeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_targets(task._targets, "1.4", 1) == [[1.5, "text"]]
    with pytest.raises(DataError, match=r"no targets of step 9\.9"):
        read_targets(task._targets, "9.9", 1)
    with pytest.raises(DataError, match=r"scicode.*Google Drive.*SciCode/eval/data"):
        load_task("scicode")
    shutil.copy(GOLDENS / "scicode" / "problems_test.jsonl", tmp_path)
    with pytest.raises(DataError, match="background_comment_template"):
        load_task("scicode", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"need h5py.*tafkir\[eval\]"):
        read_targets(task._targets, "1.1", 1)
    with pytest.raises(BackendUnavailable, match="numpy_of_nobody"):
        package_folders(("numpy_of_nobody",))


# With numpy at hand: each must raise, or return None.
ESCAPES = {
    "a pickle": """
        import io, os, pickle
        class Harm:
            def __reduce__(self): return os.system, ("id > /tmp/x",)
        def f(secret):
            file = io.BytesIO()
            np.save(file, np.array([Harm()], dtype=object), allow_pickle=True)
            file.seek(0)
            np.load(file, allow_pickle=True)
            return open("/tmp/x").read() or None
        """,
    "a library": """
        def f(secret):
            libc = np.ctypeslib.load_library("libc.so.6", "/lib/x86_64-linux-gnu")
            return (libc.fork() >= 0 or libc.socket(2, 1, 0) >= 0 or libc.kill(1, 9) >= 0) or None
        """,
    "a file": "def f(secret): return str(np.fromfile(secret, dtype='S1')[:1])",
    "a mapped file": "def f(secret): return len(np.memmap(secret, dtype='u1', mode='r'))",
    "a package's own file": "def f(secret): return open(np.__file__, 'a').write('x')",
    "a package beside it": "def f(secret):\n    import torch, tafkir",
    "a written package": "def f(secret): return open('/packages/evil.py', 'w').write('x')",
    "a compiler": "def f(secret):\n    import subprocess\n    return subprocess.run(['/usr/bin/cc', '-v'])",
    "memory": "def f(secret): return np.ones(1 << 31).nbytes",
    "a pointer": """
        import ctypes
        def f(secret):
            array = np.zeros(1)
            return ctypes.c_double.from_address(array.ctypes.data + (1 << 46)).value
        """,
}


@needs_bwrap
@pytest.mark.parametrize("name", ESCAPES)
def test_numpy_opens_no_door(name: str, numpy_box: Sandbox) -> None:
    program = "import numpy as np\n" + __import__("textwrap").dedent(ESCAPES[name])
    result = numpy_box.run(program, "f", [(str(Path(__file__).resolve()),)])
    assert result.ending in ("died", "memory") or result.calls[0].error or result.calls[0].value is None, result


@pytest.fixture(scope="module")
def numpy_box() -> Iterator[Sandbox]:
    box = Sandbox(limits=Limits(timeout_s=3.0, memory_bytes=1 << 30), packages=PACKAGES[:1])
    yield box
    box.close()


@needs_bwrap
def test_arrays_stay_inside_and_numbers_come_out(numpy_box: Sandbox) -> None:
    numbers = "import numpy as np\ndef f(x): return np.int64(3), np.float32(0.5), np.bool_(True), np.array(x).sum()"
    assert numpy_box.run(numbers, "f", [([1, 2],)]).calls[0].value == (3, 0.5, True, 3)
    array = numpy_box.run("import numpy as np\ndef f(): return np.zeros(2)", "f", [()])
    assert array.calls[0].error == "TypeError: a value of type ndarray"
    forged = (
        "import os\ndef f():\n    for fd in range(3, 32):\n        try: os.write(fd, LINE)\n        except OSError: 0"
    )
    line = b'{"call": 0, "value": ["array", ["<f8", [1], "AAAAAAAA8D8="]]}\n'
    assert numpy_box.run(f"LINE = {line!r}\n{forged}", "f", [()]).ending == "died", "no array is compared outside"
    assert not Sandbox().run("import numpy\ndef f(): 1", "f", [()]).calls, "who does not ask for it has no numpy"
    draws = [numpy_box.run("import numpy\ndef f(): return numpy.random.rand()", "f", [()]).calls[0].value for _ in "ab"]
    assert draws[0] != draws[1], "programs do not share their chance"
