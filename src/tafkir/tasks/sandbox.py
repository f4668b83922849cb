"""Runs untrusted Python in a sandbox: bubblewrap, a system-call filter and resource limits, one process a program.

Inside there is no network, no file but the interpreter's own, nothing to write to and no second process. The program
gets inputs and returns outputs; what they should be is known outside only.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from tafkir.errors import BackendUnavailable
from tafkir.tasks.sandbox_program import decode, encode
from tafkir.tasks.syscalls import build_filter

__all__ = ["CallResult", "ProgramResult", "Sandbox", "SandboxKind"]

SandboxKind = Literal["bwrap", "none"]
Ending = Literal["finished", "failed", "time", "memory", "died", "sandbox"]

START_LIMIT_S = 30.0
MAX_OUTPUT_BYTES = 1 << 18
_MAX_MESSAGE_BYTES = 1 << 12
_NOBODY = "65534"
_INSTALL = "install it: apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora), pacman -S bubblewrap"
_UNSAFE = 'or set sandbox = "none" for this task, which runs what the model writes with your own rights'


@dataclass(frozen=True, slots=True)
class CallResult:
    """What one call returned (plain types only), or why it returned nothing."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How a program ended, and the results of its calls as far as it came.

    `ending`: "finished"; "failed", its code raised while it was loaded; "time" or "memory", it went over a limit;
    "died", it ended its process; "sandbox", the sandbox itself did not work, which says nothing about the program.
    """

    ending: Ending
    detail: str
    calls: tuple[CallResult, ...] = ()


class Sandbox:
    """Where programs run. Safe to use from any thread; every run is a process of its own.

    Args:
        kind: "bwrap", or "none" for limits of time, memory and file size alone: no protection from malice.
        timeout_s: computing time of one program with all its calls, rounded up to whole seconds; three times as much
            may pass on the clock, so that a busy machine does not turn right programs into wrong ones.
        memory_bytes: address space of the program, the interpreter's 20 MiB included.

    Raises:
        BackendUnavailable: bubblewrap is missing or may not make namespaces here, or this machine has no filter that
            would hold root.
    """

    def __init__(
        self, kind: SandboxKind = "bwrap", *, timeout_s: float = 5.0, memory_bytes: int = 512 << 20, probe: bool = True
    ) -> None:
        self.kind, self.timeout_s, self.memory_bytes = kind, timeout_s, memory_bytes
        self._command = _bwrap_command() if kind == "bwrap" else ()
        if kind == "bwrap" and probe:
            _probe()

    def run(self, program: str, entry: str, calls: Sequence[tuple[Any, ...]]) -> ProgramResult:
        """Load a program and call its function `entry` with each tuple of arguments; never raises, never hangs.

        Args:
            program: Python source; a lone surrogate in it, which is no text, becomes a question mark.
            entry: name of the function.
            calls: arguments of plain types.
        """
        request = {
            "program": program.encode("utf-8", "replace").decode("utf-8"),
            "entry": entry,
            "calls": [encode(tuple(arguments)) for arguments in calls],
            "cpu_s": math.ceil(self.timeout_s),
            "memory_bytes": self.memory_bytes,
        }
        try:
            with _process(self._command, request) as process:
                output, ending = _read(process, 3 * self.timeout_s)
        except OSError as error:  # bubblewrap is gone, or there is no process, memory or file left
            return ProgramResult("sandbox", f"the sandbox cannot be started: {error}")
        lines = output.splitlines() if output.endswith(b"\n") else output.splitlines()[:-1]
        return _judge(lines, ending, process, len(calls), self.timeout_s)


@contextmanager
def _process(command: Sequence[str], request: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The running program; gone, with all that it started, when the block is left."""
    python = os.path.realpath(sys.executable)
    runner = str(Path(__file__).with_name("sandbox_program.py"))
    filter_fd = _filter_file() if command else None
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        full = [
            *command,
            *(["--seccomp", str(filter_fd), "--"] if filter_fd is not None else ["--"] if command else []),
        ]
        # -P: the folder of the script is no place to import from; a fixed hash seed gives equal runs equal results
        full += [python, "-s", "-S", "-P", "-B", "/runner.py" if command else runner]
        try:
            process = subprocess.Popen(
                full,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
                pass_fds=() if filter_fd is None else (filter_fd,),
            )
        finally:
            if filter_fd is not None:
                os.close(filter_fd)
    try:
        yield process
    finally:
        # bwrap's child and all of its processes die with it
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _filter_file() -> int | None:
    program = build_filter()
    if program is None:
        return None
    read, write = os.pipe()
    os.write(write, program)  # far less than a pipe holds
    os.close(write)
    return read


def _read(process: subprocess.Popen[bytes], limit_s: float) -> tuple[bytes, Ending | None]:
    """What the program wrote until it ended or went over a limit; the clock starts when it is ready."""
    assert process.stdout is not None
    output = b""
    deadline = time.monotonic() + START_LIMIT_S
    is_ready = False
    while True:
        chunk = _wait(process.stdout, deadline - time.monotonic())
        if chunk is None:
            return output, "time" if is_ready else "sandbox"
        if not chunk:
            process.wait()
            return output, None
        output += chunk
        if len(output) > MAX_OUTPUT_BYTES:
            return output, "memory"
        if not is_ready and b"\n" in output:
            is_ready = True
            deadline = time.monotonic() + limit_s


def _wait(stream: IO[bytes], seconds: float) -> bytes | None:
    """The next bytes, empty at the end of the stream, None when none came in time."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    if seconds <= 0 or not poll.poll(seconds * 1000):
        return None
    return os.read(stream.fileno(), 1 << 16)


def _judge(
    lines: Sequence[bytes], ending: Ending | None, process: subprocess.Popen[bytes], wanted: int, timeout_s: float
) -> ProgramResult:
    """Make sense of the lines. A program may have written them itself: any answer is as good as its own."""
    if not lines or lines[0] != b'{"ready": true}':
        detail = "it did not start in time" if ending else f"exit code {process.returncode}"
        return ProgramResult("sandbox", f"the sandbox failed: {detail}")
    calls: dict[int, CallResult] = {}
    for line in lines[1:]:
        try:
            message = json.loads(line)
            if "failed" in message:
                detail = str(message["failed"])
                return ProgramResult("memory" if detail == "MemoryError" else "failed", detail)
            number = int(message["call"])
            if "error" in message:
                calls.setdefault(number, CallResult(error=str(message["error"])))
            else:
                calls.setdefault(number, CallResult(decode(message["value"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            return ProgramResult("died", "it wrote something else than results")
    done = tuple(calls[number] for number in range(wanted) if number in calls and set(range(number)) <= calls.keys())
    if len(done) == wanted:
        return ProgramResult("finished", "", done)
    if ending == "time" or process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return ProgramResult("time", f"took longer than {timeout_s:g} s", done)
    if ending == "memory":
        return ProgramResult("memory", f"wrote more than {MAX_OUTPUT_BYTES} bytes", done)
    return ProgramResult("died", f"ended its process (exit code {process.returncode})", done)


@cache
def _bwrap_command() -> tuple[str, ...]:
    """The command up to the system-call filter and `--`. Nothing inside can be written to."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise BackendUnavailable(
            "model-written code is run in a sandbox, and bubblewrap (bwrap) is not installed",
            fix=f"{_INSTALL}; {_UNSAFE}",
        )
    if build_filter() is None and os.geteuid() == 0:
        raise BackendUnavailable(
            "the sandbox cannot limit the processes of root on this kind of processor",
            fix=f"start it as another user; {_UNSAFE}",
        )
    command = [bwrap, "--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    bound = [*map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")), *_interpreter()]
    for path in bound:
        if path.is_symlink() and path.parent == Path("/"):  # /lib -> usr/lib, as most systems have it
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    for path in _hidden(bound):
        command += ["--tmpfs", str(path), "--remount-ro", str(path)]
    command += ["--ro-bind", str(Path(__file__).with_name("sandbox_program.py").resolve()), "/runner.py"]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", "/"]
    return tuple(command)


def _interpreter() -> list[Path]:
    """The interpreter's program, its standard library, and the shared library that it may be linked to."""
    paths = {Path(os.path.realpath(sys.executable))}
    paths |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    library, folder = sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LIBDIR")
    if library and folder:
        paths.add(Path(folder) / str(library))
    return [path for path in sorted(paths) if not path.is_relative_to("/usr/lib")]


def _hidden(bound: Sequence[Path]) -> list[Path]:
    """Folders inside the bound ones that hold more than the standard library: Tafkir's tests may be there."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    candidates = {stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")}
    candidates.add(Path(__file__).resolve().parents[1])
    found = sorted(path for path in candidates if path.is_dir() and any(path.is_relative_to(b) for b in bound))
    return [path for path in found if not any(path != other and path.is_relative_to(other) for other in found)]


@cache
def _probe() -> None:
    """Run a program once, so that what does not work here is said before training, not in each verdict."""
    result = Sandbox("bwrap", probe=False).run("def f(x):\n    return x", "f", [(1,)])
    if result.ending == "finished" and result.calls[0].value == 1:
        return
    with _process(_bwrap_command(), {}) as process:
        assert process.stderr is not None
        said = process.stderr.read(_MAX_MESSAGE_BYTES).decode("utf-8", "replace").strip().splitlines()
    raise BackendUnavailable(
        f"bubblewrap does not work here: {said[-1] if said else result.detail}",
        fix=f"allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or the container's setting); {_UNSAFE}",
    )
