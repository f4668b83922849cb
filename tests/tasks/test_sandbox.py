"""The sandbox against programs that mean harm: each is stopped, and said to have been, and none passes for right."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tafkir.errors import BackendUnavailable, TafkirError
from tafkir.records import Example
from tafkir.tasks import bubblewrap as bubblewrap_module
from tafkir.tasks import sandbox as sandbox_module
from tafkir.tasks.backends import open_sandbox
from tafkir.tasks.code import CodeProblems, bundled_problems, extract_program, same_value
from tafkir.tasks.sandbox import CallResult, Limits, Sandbox
from tafkir.tasks.sandbox_program import decode, encode
from tafkir.tasks.sandbox_remote import RemoteSandbox
from tafkir.tasks.sandbox_server import Ran, SandboxServer
from tafkir.tasks.syscalls import build_filter


def _works() -> bool:
    try:
        Sandbox()
    except BackendUnavailable:
        return False
    return True


needs_bwrap = pytest.mark.skipif(not _works(), reason="bubblewrap does not work here")

SQUARE = Example(
    "i", "code/1", "test", "q", "", {"entry": "square", "tests": [["(3,)", "9"], ["(5,)", "25"]], "level": 1}
)


@pytest.fixture(scope="module")
def task() -> CodeProblems:
    return CodeProblems(sandbox=Sandbox(limits=Limits(timeout_s=1.0, memory_bytes=256 << 20)))


def block(program: str) -> str:
    return f"```python\n{textwrap.dedent(program)}\n```"


FORGERIES = {
    "an object that equals everything": """
        class Same:
            def __eq__(self, other): return True
        def square(n): return Same()
        """,
    "a number that equals everything": """
        class Same(int):
            def __eq__(self, other): return True
            def __repr__(self): return "9"
        def square(n): return Same(0)
        """,
    "the caller's frames": """
        import sys
        def square(n):
            frame, found = sys._getframe(), []
            while frame:
                for value in list(frame.f_locals.values()):
                    if isinstance(value, (list, tuple)): found += [v for v in value if isinstance(v, int)]
                frame = frame.f_back
            return next((v for v in found if v == n * 3), 1)
        """,
    "patched builtins": """
        import builtins, json
        builtins.type = lambda value: int
        builtins.isinstance = lambda *_: True
        json.dumps = lambda *_, **__: '{"call": 0, "value": true}'
        def square(n): return n
        """,
    "printed verdicts": """
        import os
        print('{"call": 0, "value": "correct"}', 'passed', 'OK')
        for fd in range(3, 32):
            try: os.write(fd, b'{"call": 0, "value": true}\\n{"call": 1, "value": true}\\n{"passed": true}\\n')
            except OSError: pass
        def square(n): return n
        """,
    "an early exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "an exit in the call": "import os\ndef square(n): os._exit(0)",
    "an exit after one answer": """
        import os
        def square(n):
            if n == 5: os._exit(0)
            return n * n
        """,
    "a huge number": "def square(n): return 9 ** (10 ** 5)",
    "nothing but noise": """
        import os
        for fd in range(3, 32):
            try: os.write(fd, b'x' * 5000 + b'\\n')
            except OSError: pass
        """,
    "deep nesting": "def square(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "reading the tests": """
        import glob
        def square(n):
            for path in glob.glob('/**/problems.jsonl', recursive=True) + ['/etc/passwd', '/etc/hostname']:
                open(path).read()
            return sum(1 for line in open('/proc/self/environ'))
        """,
}


@needs_bwrap
@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(task: CodeProblems, name: str) -> None:
    verdict = task.grade(SQUARE, block(FORGERIES[name]))
    assert (verdict.outcome, verdict.reward) == ("wrong", 0.0), verdict
    assert verdict.reason


@needs_bwrap
def test_a_right_program_passes_whatever_it_prints(task: CodeProblems) -> None:
    noisy = "print('0 of 2')\nimport sys\nsys.stderr.write('x' * 10**6)\ndef square(n):\n    print(n)\n    return n * n"
    assert task.grade(SQUARE, block(noisy)).correct
    assert task.grade(SQUARE, "<think>\nmultiply\n</think>\ndef square(n): return n ** 2").correct


@cache
def warm() -> Sandbox:
    return Sandbox()


def call(program: str, *arguments: Any, timeout_s: float = 1.0) -> tuple[str, Any]:
    limits = Limits(timeout_s=timeout_s, memory_bytes=256 << 20)
    result = warm().run(textwrap.dedent(program), "f", [arguments], limits)
    if result.ending == "finished":
        return result.calls[0].error or "returned", result.calls[0].value
    return result.ending, result.detail


@needs_bwrap
def test_an_endless_loop_is_stopped_in_every_thread() -> None:
    results = []

    def run() -> None:
        began = time.monotonic()
        results.append((call("def f():\n    while True: pass"), time.monotonic() - began))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (ending, detail), seconds = results[0]
    assert (ending, detail) == ("time", "took longer than 1 s")
    assert seconds < 20
    assert call("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f():\n    while True: pass")[0] in (
        "time",
        "died",
    )


@needs_bwrap
def test_waiting_for_nothing_is_stopped_by_the_clock() -> None:
    began = time.monotonic()
    assert call("import time\ndef f(): time.sleep(1000)", timeout_s=0.2)[0] == "time"
    assert time.monotonic() - began < 15


@needs_bwrap
def test_a_fork_bomb_does_not_get_a_single_process() -> None:
    bomb = """
        import os
        def f():
            made = 0
            for _ in range(100):
                try: made += os.fork() > 0
                except OSError as error: refused = error.errno
            return made, refused
        """
    ending, value = call(bomb)
    assert ending == "returned" and value[0] == 0 and value[1] in (1, 11)
    threads = "import threading\ndef f():\n    for _ in range(9): threading.Thread(target=print).start()"
    assert call(threads)[0].startswith("RuntimeError: can't start new thread")
    assert call("import subprocess, sys\ndef f(): subprocess.run([sys.executable, '-c', ''])")[0].partition(":")[0] in (
        "PermissionError",
        "BlockingIOError",
    )


@needs_bwrap
def test_a_memory_bomb_goes_off_in_its_own_process() -> None:
    assert call("def f(): return len(bytearray(1 << 30))")[0] == "MemoryError"
    assert call("x = [0] * (1 << 29)\ndef f(): pass")[0] == "memory"
    assert call("def f(): return 'x' * (1 << 20)") == ("memory", "wrote more than 262144 bytes")


@needs_bwrap
def test_files_and_network_are_out_of_reach(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("42")
    read = "def f(path): return open(path).read()"
    for path in (secret, "/etc/passwd", "/proc/1/environ", Path.home() / ".bashrc", __file__, sandbox_module.__file__):
        assert call(read, str(path))[0].startswith("FileNotFoundError"), path
    write = """
        import os, sys
        def f():
            folders = [folder + '/' + name for folder in ['/', '/usr', *sys.path] if os.path.isdir(folder)
                       for name in ['.', *os.listdir(folder)] if name != 'tmp']
            for folder in folders:
                try: open(folder + '/x', 'w')
                except OSError: continue
                return folder
        """
    assert call(write) == ("returned", None)
    for link in ("/tmp/x", "/x"):
        follow = "import os\ndef f(target, link):\n    os.symlink(target, link)\n    return open(link).read()"
        assert call(follow, str(secret), link)[0].startswith(("FileNotFoundError", "OSError: [Errno 30]")), link
    assert call("import os\ndef f(): return os.listdir('/tmp')") == ("returned", []), (
        "the link is gone with its sandbox"
    )
    fill = """
        def f():
            try:
                for n in range(9): open(f'/tmp/{n}', 'w').write('x' * (5 << 20))
            except OSError as error: return n, error.errno
        """
    assert call(fill) == ("returned", (3, 28))
    connect = "import socket\ndef f(): socket.create_connection(('1.1.1.1', 80), timeout=1)"
    assert call(connect)[0].startswith(("PermissionError", "OSError"))
    environment = "import os\ndef f(): return dict(os.environ)"
    assert set(call(environment)[1]) <= {"PYTHONHASHSEED", "PWD", "LC_CTYPE", "TMPDIR", "OPENBLAS_NUM_THREADS"}
    assert call("def f():\n    import tafkir")[0].startswith("ModuleNotFoundError")


@needs_bwrap
def test_the_server_of_a_sandbox_is_out_of_its_programs_reach() -> None:
    attack = """
        import ctypes, os, resource, signal
        def f():
            parent, libc, failed = os.getppid(), ctypes.CDLL(None, use_errno=True), []
            for harm in (lambda: os.kill(1, 9), lambda: os.kill(parent, 9), lambda: os.kill(0, 15),
                         lambda: os.killpg(1, 9), lambda: os.sched_setaffinity(parent, [0]),
                         lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
                         lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (0, 0))):
                try: harm()
                except OSError as error: failed.append(error.errno)
            # ptrace, pidfd_open, pidfd_getfd, process_vm_writev, memfd_create, shmget
            for number in (101, 434, 438, 311, 319, 29) if os.uname().machine == 'x86_64' else ():
                failed.append(ctypes.get_errno() if libc.syscall(number, parent, 0, 0, 0, 0, 0) == -1 else 0)
            return failed, os.getuid(), sorted(os.listdir('/proc')) if os.path.exists('/proc') else []
        """
    ending, (errors, uid, processes) = call(attack)
    assert (ending, set(errors), uid, processes) == ("returned", {1}, 65534, [])
    assert call(attack)[0] == "returned"


@needs_bwrap
def test_an_interpreter_is_used_again_only_as_it_was() -> None:
    sandbox = Sandbox(limits=Limits(timeout_s=1.0, call_s=0.2))
    count = "n = 0\ndef f():\n    global n\n    n += 1\n    return n, __import__('os').getppid()"
    first, second = sandbox.run(count, "f", [()]), sandbox.run(count, "f", [(), ()])
    assert [call.value[0] for call in (*first.calls, *second.calls)] == [1, 1, 2]
    (server,) = sandbox._idle
    assert sandbox.run("def f():\n    while True: pass", "f", [()]).ending == "time"
    assert sandbox._idle == [server], "a call that its own alarm ended leaves nothing behind"
    for spoil in ("open('/tmp/x', 'w')", "os.chmod('/tmp', 0)", "time.sleep(9)", "os.write(3, b'x' * 300000)"):
        sandbox.run(f"import os, time\n{spoil}", "f", [()], Limits(timeout_s=0.2))
        assert server not in sandbox._idle, spoil
        assert sandbox.run(count, "f", [()]).calls[0].value[0] == 1
        (server,) = sandbox._idle
    os.kill(server._process.pid, 9)
    assert sandbox.run(count, "f", [()]).ending == "finished", "one that died in the meantime is replaced"
    sandbox.close()


def test_a_server_whose_output_closes_before_its_control() -> None:
    server = object.__new__(SandboxServer)
    server._output, written = os.pipe()
    server._control, theirs = socket.socketpair()
    server._process, server._said = subprocess.Popen(["true"]), b""
    os.set_blocking(server._output, False)
    os.close(written)
    later = threading.Timer(0.2, theirs.close)
    later.start()
    assert server._watch(5.0, 100) == Ran(b"", 0)
    later.join()
    server._control.close()
    os.close(server._output)


@needs_bwrap
def test_equal_programs_get_equal_results() -> None:
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert call(program) == call(program)


@needs_bwrap
def test_nothing_runs_on_when_it_is_over() -> None:
    before = _bwraps()
    call("import time\ndef f(): time.sleep(1000)", timeout_s=0.1)
    deadline = time.monotonic() + 10
    while _bwraps() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _bwraps() - before


def _bwraps() -> set[str]:
    """Processes that run our runner."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"/runner.py" in (folder / "cmdline").read_bytes() and f"{os.getpid()}" in (folder / "stat").read_text():
                found.add(folder.name)
        except OSError:
            continue
    return found


def test_without_bubblewrap_it_is_refused_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    bubblewrap_module.bwrap_command.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"bwrap.*not installed.*apt install bubblewrap.*the tier rlimit"):
        CodeProblems()
    monkeypatch.undo()
    bubblewrap_module.bwrap_command.cache_clear()


def test_a_sandbox_that_does_not_work_is_refused_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(broken))
    for cached in (bubblewrap_module.bwrap_command, sandbox_module._probe):
        cached.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"does not work here: .*uid map: Permission denied.*user namespaces"):
        Sandbox()
    result = Sandbox(probe=False).run("def f(): pass", "f", [()])
    assert (result.ending, result.detail) == ("sandbox", "the sandbox failed: exit code 1")
    verdict = CodeProblems(sandbox=Sandbox(probe=False)).grade(SQUARE, block("def square(n): return n * n"))
    assert (verdict.outcome, verdict.reason) == ("error", "the sandbox failed: exit code 1")
    assert verdict.failure == "sandbox" and verdict.is_ungraded
    gone = Sandbox(probe=False)
    broken.unlink()
    verdict = CodeProblems(sandbox=gone).grade(SQUARE, block("def square(n): return n * n"))
    assert verdict.is_ungraded and "the sandbox cannot be started: " in verdict.reason and "bwrap" in verdict.reason
    monkeypatch.undo()
    for cached in (bubblewrap_module.bwrap_command, sandbox_module._probe):
        cached.cache_clear()


def test_without_a_sandbox_limits_still_hold(tmp_path: Path) -> None:
    sandbox = Sandbox("rlimit", Limits(timeout_s=0.3, memory_bytes=256 << 20))
    assert sandbox.run("def f(n): return n + 1", "f", [(1,), (2,)]).calls == (CallResult(2), CallResult(3))
    assert sandbox.run("def f():\n    while True: pass", "f", [()]).ending == "time"
    assert sandbox.run("def f(): return bytearray(1 << 30)", "f", [()]).calls[0].error == "MemoryError"
    write = "def f(path):\n    with open(path, 'w') as file: file.write('x' * 9)"
    assert "File too large" in sandbox.run(write, "f", [(str(tmp_path / "x"),)]).calls[0].error


def test_only_who_says_so_gets_less_than_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TafkirError, match=r"rlimit protects nothing but memory and time.*--unsafe"):
        open_sandbox("rlimit")
    assert open_sandbox("rlimit", unsafe=True).tier == "rlimit"
    monkeypatch.delenv("TAFKIR_SANDBOX_URL", raising=False)
    with pytest.raises(TafkirError, match=r"remote needs the address.*TAFKIR_SANDBOX_URL"):
        open_sandbox("remote")
    with pytest.raises(TafkirError, match="no sandbox 'docker'"):
        open_sandbox("docker")  # type: ignore[arg-type]


class Fusion(BaseHTTPRequestHandler):
    """SandboxFusion's `POST /run_code` as its documentation has it, for Python, by a process of its own."""

    broken: tuple[int, bytes] | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/run_code" and body["language"] == "python"
        status, content = type(self).broken or (200, json.dumps(self.execute(body)).encode())
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def execute(self, body: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, "-c", body["code"]]
        try:
            done = subprocess.run(
                command, input=body["stdin"], capture_output=True, text=True, timeout=body["run_timeout"]
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode()
            result = {"status": "TimeLimitExceeded", "execution_time": body["run_timeout"], "return_code": None}
            return {"status": "Failed", "message": "", "run_result": result | {"stdout": said, "stderr": ""}}
        result = {"status": "Finished", "execution_time": 0.1, "return_code": done.returncode}
        result |= {"stdout": done.stdout, "stderr": done.stderr}
        return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": result}

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def fusion() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fusion)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Fusion.broken = None
    server.shutdown()
    server.server_close()


def test_the_remote_tier_says_what_the_others_say(fusion: str) -> None:
    sandbox = RemoteSandbox(fusion, Limits(timeout_s=0.5, memory_bytes=256 << 20))
    task = CodeProblems(sandbox=sandbox)
    right = task.grade(SQUARE, block("print('passed')\ndef square(n): return n * n"))
    assert right.correct and right.sandbox == "remote"
    for name in ("an object that equals everything", "printed verdicts", "an exit after one answer"):
        verdict = task.grade(SQUARE, block(FORGERIES[name]))
        assert (verdict.outcome, verdict.sandbox) == ("wrong", "remote"), name
    assert sandbox.run("import time\ndef f(): time.sleep(99)", "f", [()]).ending == "time"
    assert sandbox.run("x = [0] * (1 << 29)", "f", [()]).ending == "memory"
    for broken in ((500, b"busy"), (200, b"<html>"), (200, b'{"status": "SandboxError", "message": "no room"}')):
        Fusion.broken = broken
        verdict = task.grade(SQUARE, block("def square(n): return n * n"))
        assert verdict.is_ungraded and verdict.outcome == "error", broken
    assert "no room" in verdict.reason


def test_the_filter_is_a_seccomp_program() -> None:
    for machine, denied in (("x86_64", (56, 41, 425, 62)), ("aarch64", (220, 198, 425, 129))):
        program = build_filter(machine)
        assert program is not None and len(program) % 8 == 0
        assert _run_filter(program, machine, 1 if machine == "x86_64" else 64) == 0x7FFF0000  # write
        assert all(_run_filter(program, machine, number) == 0x00050001 for number in denied)
        serving = build_filter(machine, server=True)
        assert serving is not None
        forked, limited = (56, 302) if machine == "x86_64" else (220, 261)
        assert _run_filter(serving, machine, forked) == _run_filter(serving, machine, limited, 7) == 0x7FFF0000
        assert _run_filter(serving, machine, denied[1]) == 0x00050001
        assert _run_filter(program, machine, limited, 7) == 0x00050001, "another process"
        assert _run_filter(program, machine, limited, 0) == 0x7FFF0000, "itself"
        assert _run_filter(program, machine, 435) == 0x00050000 | 38
        assert _run_filter(program, "other", 1) == 0x80000000
        assert _run_filter(program, machine, 0x40000001) == 0x80000000
    assert build_filter("m68k") is None
    assert platform.machine() not in ("x86_64", "aarch64") or build_filter() == build_filter(platform.machine())


def _run_filter(program: bytes, machine: str, number: int, argument: int = 0) -> int:
    """A classic-BPF machine for the four instructions that filters here are made of."""
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(machine, 1)
    at, register = 0, 0
    while True:
        code, true, false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            register = {0: number, 4: arch, 16: argument}[value]
        elif code == 0x06:
            return int(value)
        else:
            taken = register == value if code == 0x15 else register >= value
            at += true if taken else false


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(10**30),
        1 + 2j,
        0.5,
        "سلام",
        [1, [2]],
        (1, (2,)),
        {1, 2},
        frozenset("a"),
        {"a": [1], 2: None},
    ],
)
def test_plain_values_go_through_unchanged(value: Any) -> None:
    found = decode(encode(value))
    assert found == value and type(found) is type(value)


def test_a_number_longer_than_python_prints_goes_through() -> None:
    assert decode(json.loads(json.dumps(encode([7**9000])))) == [7**9000]


def test_other_values_are_refused() -> None:
    for value in (object(), b"x", [object()], type("Int", (int,), {})(3)):
        with pytest.raises(TypeError, match="a value of type"):
            encode(value)


def test_values_compare_as_python_does_with_a_tolerance_for_floats() -> None:
    equal = [
        (0.3, 0.1 + 0.2),
        (2.0, 2),
        (float("nan"), float("nan")),
        ([1.5], [1.5 + 1e-9]),
        ({1: 0.1}, {1: 0.1}),
        (1, True),
    ]
    different = [
        (2, "2"),
        ([1], (1,)),
        (0.3, 0.31),
        (1.0, 10**400),
        ([1, 2], [1]),
        ({1: 2}, {2: 1}),
        ({1}, [1]),
        (None, 0),
    ]
    assert all(same_value(a, b) for a, b in equal)
    assert not any(same_value(a, b) for a, b in different)


@needs_bwrap
@pytest.mark.parametrize("problem", bundled_problems(), ids=lambda p: p.id)
def test_reference_programs_pass_and_broken_ones_say_where(task: CodeProblems, problem: Example) -> None:
    assert task.grade(problem, block(problem.answer)).correct
    head = problem.answer.splitlines()[0]
    verdict = task.grade(problem, block(f"{head}\n    return 'no'"))
    assert (
        verdict.outcome == "wrong"
        and verdict.reason.startswith("test 1 of 4: ")
        and "'no' instead of" in verdict.reason
    )


def test_bundled_problems_cover_levels_and_parts() -> None:
    problems = bundled_problems()
    assert len({p.id for p in problems}) == len(problems) == 16
    assert {p.extra["level"] for p in problems if p.split == "train"} == {1, 2, 3}
    assert {p.extra["level"] for p in problems if p.split == "test"} == {1, 2, 3}
    assert all("For example" in p.question and len(p.extra["tests"]) == 4 for p in problems)


def test_where_the_program_stands() -> None:
    text = "First:\n```python\ndef f(): pass\n```\nbetter:\n```\ndef g(): pass\n```\n"
    assert extract_program(text) == ("def g(): pass\n", "")
    assert extract_program(text, finished=False) == ("def g(): pass\n", "")
    assert extract_program("def f(): pass", finished=False) == (None, "cut off before the end of a program")
    assert extract_program("I cannot") == (None, "there is no program")
    assert extract_program("<think>def f(): pass") == (None, "the chain of thought never ends")


def test_the_runner_imports_nothing_of_the_package() -> None:
    runner = Path(sandbox_module.__file__).with_name("sandbox_program.py")
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print('tafkir' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(runner)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
