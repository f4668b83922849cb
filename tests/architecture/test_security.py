"""No pickle, no shell with a model's text, no code from strings outside the sandbox, no secret in what is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_house_rules import MODULES, name_of, tree_of
from tests.conftest import Cli

# Where what is forbidden elsewhere stands for a reason.
ALLOWED = {
    # LiveCodeBench's own files are pickled strings: an unpickler that knows no function reads them.
    ("tasks/published/contests.py", "import pickle"),
    # Ray sends actors their work pickled, from one process of a cluster to another; here is the exception alone.
    ("cluster/actors.py", "import pickle"),
    # The exception of torch.load(weights_only=True) is a class of that module.
    ("checkpoint/trm.py", "import pickle"),
    # What refuses pickles looks at their opcodes, and runs none.
    ("registry/admission.py", "import pickletools"),
    # The program inside the sandbox, whose purpose it is.
    ("tasks/sandbox_program.py", "exec"),
    ("tasks/sandbox_program.py", "eval"),
    ("tasks/sandbox_program.py", "__import__"),
}
MODULES_REFUSED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickletools"}

KEYWORDS = {"shell", "allow_pickle", "weights_only"}
ATTRIBUTES = {"system", "popen", "getoutput", "getstatusoutput", "save", "load"}


def _calls(tree: ast.Module) -> Iterator[str]:
    """What a module does that may run code which somebody else wrote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES_REFUSED)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES_REFUSED:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    named = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in KEYWORDS}
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
        yield node.func.id
    if named.get("shell", "False") != "False":
        yield "shell"
    if named.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    called = ast.unparse(node.func) if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES else ""
    if called in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
        yield "shell"
    if called == "torch.save" or (called == "torch.load" and named.get("weights_only") != "True"):
        yield called


def test_nothing_runs_code_that_others_wrote() -> None:
    found = {(name_of(path), call) for path in MODULES for call in _calls(tree_of(path))}
    assert found - ALLOWED == set()
    assert found == ALLOWED, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "subprocess.run(x, shell=True)", "os.system(x)", "eval(x)",
     "torch.load(x)", "np.load(x, allow_pickle=True)"],
)  # fmt: skip
def test_the_search_finds_it(source: str) -> None:
    assert list(_calls(ast.parse(source)))


SECRET = "sk-planted-5ecre7"


def test_a_secret_is_in_nothing_that_a_run_writes(here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "TAFKIR_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    only = [word for stage in ("pretrain", "sft", "rlvr", "eval") for word in ("--set", f"{stage}=")]
    done = here("run", "smoke", *only)
    assert done.returncode == 0, done.stderr
    (tmp_path / "items.jsonl").write_text('{"question": "1 + 1?", "answer": 2}\n')
    # Nobody listens there: what fails is told, and the key is not.
    failed = here("eval", "http://127.0.0.1:9/v1#m", "--tasks", f"{tmp_path}/items.jsonl:number", "--retries", "0")
    assert failed.returncode != 0
    assert SECRET not in done.stdout + done.stderr + failed.stdout + failed.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and [path.name for path in written if SECRET.encode() in path.read_bytes()] == []
