"""Does the sandbox hold, and how fast is it? Escapes and forgeries tried, runs a second, cold start; whole code sets.

python benchmarks/sandbox.py [--sets humaneval,mbpp] [--state FOLDER] [--evalplus PYTHON]

With --sets: canonical solutions and forged ones of every problem; verdicts are kept in --state, and the same command
goes on after the last one. With --evalplus, an interpreter that has evalplus: its own checker's verdicts on the same
HumanEval answers (canonical, corrupted, forged), and where the two differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tafkir.tasks.backends import Backends, choose_backends  # noqa: E402
from tafkir.tasks.catalog import load_task  # noqa: E402
from tafkir.tasks.code import CodeProblems  # noqa: E402
from tafkir.tasks.sandbox import Limits, Sandbox  # noqa: E402
from tests.tasks.test_sandbox import FORGERIES, SQUARE, block  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sandbox.json"
FORGED = "class Same:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"

# Each returns True where it got out of its box.
ESCAPES = {
    "a second process": "import os\ndef f():\n    if os.fork() == 0: os._exit(0)\n    return True",
    "a fork bomb": "import os\ndef f():\n    made = 0\n    for _ in range(99):\n        try: made += os.fork() > 0\n"
    "        except OSError: pass\n    return made > 0",
    "a thread": "import threading\ndef f():\n    threading.Thread(target=print).start()\n    return True",
    "a file": "def f():\n    open('/etc/passwd').read()\n    return True",
    "a file written": "import os\ndef f():\n    for d in ('/', '/usr', '/etc', '/root', '/home', '/var'):\n"
    "        try: open(d + '/x', 'w')\n        except OSError: continue\n        return True\n    return False",
    "a link to a file": "import os\ndef f():\n    os.symlink('/etc/passwd', '/tmp/x')\n    open('/tmp/x').read()\n"
    "    return True",
    "a full disk": "def f():\n    for n in range(9): open(f'/tmp/{n}', 'w').write('x' * (9 << 20))\n    return True",
    "the network": "import socket\ndef f():\n    socket.create_connection(('1.1.1.1', 80), timeout=1)\n    return True",
    "a signal": "import os\ndef f():\n    os.kill(os.getppid(), 9)\n    return True",
    "the parent's limits": "import os, resource\ndef f():\n"
    "    resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\n    return True",
    "other processes": "import os\ndef f():\n    return len(os.listdir('/proc')) > 0",
    "the grader": "def f():\n    import tafkir\n    return True",
    "more memory": "def f(): return len(bytearray(1 << 30)) > 0",
    "endless output": "import os\ndef f():\n    while True: os.write(3, b'x' * 65536)",
    "endless time": "def f():\n    while True: pass",
    "endless sleep": "import time\ndef f():\n    time.sleep(1000)\n    return True",
}


def _escapes() -> dict[str, str]:
    sandbox = Sandbox(limits=Limits(timeout_s=1.0, memory_bytes=256 << 20))
    found = {}
    for name, program in ESCAPES.items():
        result = sandbox.run(program, "f", [()])
        got = result.calls[0] if result.ending == "finished" else None
        found[name] = "escaped" if got is not None and got.value is True else (got.error if got else result.ending)
    sandbox.close()
    return found


def _forgeries() -> dict[str, str]:
    task = CodeProblems(sandbox=Sandbox(limits=Limits(timeout_s=1.0, memory_bytes=256 << 20)))
    return {name: task.grade(SQUARE, block(program)).outcome for name, program in FORGERIES.items()}


def _timed(run: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def _speed() -> dict[str, Any]:
    sandbox = Sandbox()

    def one() -> None:
        assert sandbox.run("def f(x): return x * x", "f", [(3,)]).ending == "finished"

    def cold() -> None:
        sandbox.close()
        one()

    def many() -> None:
        for _ in range(50):
            one()

    cold_s = _timed(cold, 9)
    many_s = _timed(many, 5)
    sandbox.close()
    return {
        "cold_start_ms": {"median": 1000 * statistics.median(cold_s), "best": 1000 * min(cold_s)},
        "warm_runs_per_s": {"median": 50 / statistics.median(many_s), "best": 50 / min(many_s)},
    }


def _set(name: str, state: Path) -> dict[str, Any]:
    task, path = load_task(name), state / f"{name}.jsonl"
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    with path.open("a") as file:
        for number, example in enumerate(task.examples("test"), start=1):
            if example.id in rows:
                continue
            began = time.perf_counter()
            forged = f"{FORGED}def {example.extra['entry']}(*a, **k): return Same()"
            verdict = task.grade(example, f"```python\n{example.answer}\n```")
            rows[example.id] = {
                "id": example.id,
                "canonical": verdict.correct,
                "forged": task.grade(example, f"```python\n{forged}\n```").correct,
                "reason": verdict.reason[:160],
                "seconds": time.perf_counter() - began,
            }
            file.write(f"{json.dumps(rows[example.id])}\n")
            file.flush()
            print(f"{name}: {number} done", file=sys.stderr)
    return {
        "problems": len(rows),
        "canonical_right": sum(row["canonical"] for row in rows.values()),
        "forged_right": sum(row["forged"] for row in rows.values()),
        "failed": {row["id"]: row["reason"] for row in rows.values() if not row["canonical"]},
        "seconds": round(sum(row["seconds"] for row in rows.values()), 1),
    }


_PEER = """
import json, sys
from evalplus.eval import untrusted_check
for line in sys.stdin:
    row = json.loads(line)
    inputs, scope = [eval(x) for x in row["inputs"]], {}
    exec(row["reference"], scope)
    import copy
    expected = [scope[row["entry"]](*copy.deepcopy(x)) for x in inputs]
    got, _ = untrusted_check("humaneval", row["program"], inputs, row["entry"], expected, row["atol"],
                             [0.5] * len(inputs), fast_check=True)
    print(json.dumps([row["id"], row["kind"], got]), flush=True)
"""


def _against_evalplus(python: str) -> dict[str, Any]:
    """Verdicts on the base inputs of HumanEval: three answers a problem."""
    from tafkir.tasks.sandbox_program import decode

    task = load_task("humaneval")
    own: dict[tuple[str, str], bool] = {}
    rows = []
    for example in task.examples("test"):
        extra = example.extra
        entry = extra["entry"]
        programs = {
            "canonical": example.answer,
            "corrupted": f"{example.answer}\n_own = {entry}\ndef {entry}(*a): return [_own(*a)]",
            "forged": f"{FORGED}def {entry}(*a, **k): return Same()",
        }
        inputs = [repr(decode(arguments)) for arguments in extra["base"]]
        for kind, program in programs.items():
            own[example.id, kind] = task.grade(example, f"```python\n{program}\n```").correct
            rows.append({"id": example.id, "kind": kind, "program": program, "entry": entry, "atol": extra["atol"],
                         "reference": example.answer, "inputs": inputs})  # fmt: skip
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write("".join(f"{json.dumps(row)}\n" for row in rows))
        stdin.seek(0)
        done = subprocess.run([python, "-c", _PEER], stdin=stdin, capture_output=True, text=True, check=True)
    theirs = {(name, kind): got == "pass" for name, kind, got in map(json.loads, done.stdout.splitlines())}
    differ = {f"{name} {kind}": {"tafkir": own[name, kind], "evalplus": theirs[name, kind]}
              for name, kind in own if own[name, kind] != theirs[name, kind]}  # fmt: skip
    kinds = ("canonical", "corrupted", "forged")
    return {
        "answers": len(own),
        "right": {kind: {"tafkir": sum(v for (_, k), v in own.items() if k == kind),
                         "evalplus": sum(v for (_, k), v in theirs.items() if k == kind)} for kind in kinds},
        "differences_but_forged": {name: row for name, row in differ.items() if not name.endswith("forged")},
        "differences": len(differ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default="")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tafkir-sandbox-sets")
    parser.add_argument("--evalplus", metavar="PYTHON")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with choose_backends(Backends()):
        if not given.sets and not given.evalplus:
            escapes, forgeries = _escapes(), _forgeries()
            found |= {"escapes_tried": len(escapes), "escaped": [n for n, v in escapes.items() if v == "escaped"]}
            found |= {"forgeries_tried": len(forgeries), "forged": [n for n, v in forgeries.items() if v == "correct"]}
            found |= {"escapes": escapes, "speed": _speed()}
        given.state.mkdir(parents=True, exist_ok=True)
        for name in filter(None, given.sets.split(",")):
            found.setdefault("sets", {})[name] = _set(name, given.state)
        if given.evalplus:
            found["against_evalplus"] = _against_evalplus(given.evalplus)
    RESULTS.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
