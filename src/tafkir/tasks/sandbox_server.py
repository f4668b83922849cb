"""A warm interpreter in a sandbox, seen from outside: programs in, what they wrote out, the clock that ends them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tafkir.tasks.bubblewrap import ENVIRONMENT
from tafkir.tasks.syscalls import build_filter

__all__ = ["MAX_OUTPUT_BYTES", "RUNNER", "Ran", "SandboxServer"]

MAX_OUTPUT_BYTES = 1 << 18
START_LIMIT_S = 30.0
RUNNER = Path(__file__).with_name("sandbox_program.py")
_MAX_COMPLAINT_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one program.

    Attributes:
        output: what its process wrote.
        status: its exit status, negative for a signal; None where nobody could tell.
        cut: it was ended for the clock's sake, or for the length of its output.
        reusable: the interpreter is as it was before.
    """

    output: bytes
    status: int | None
    cut: Literal["", "time", "output"] = ""
    reusable: bool = False

    @property
    def used_up_time(self) -> bool:
        return self.status in (-signal.SIGXCPU, 128 + signal.SIGXCPU)

    def describe(self) -> str:
        """How its process ended, in words."""
        if self.cut == "time":
            return "it did not start in time" if not self.output else "the clock ran out"
        return f"exit code {self.status}"


@cache
def _starter(owner: int) -> ThreadPoolExecutor:
    # The kernel ends a sandbox when the thread that started it ends; this one lives as long as the process.
    return ThreadPoolExecutor(1, thread_name_prefix="sandbox")


class SandboxServer:
    """One interpreter, which runs one program at a time.

    Args:
        command: what goes before the interpreter, up to the system-call filter; empty for none.
        packages: folders to import from, then names of what is imported before the first program.

    Raises:
        OSError: there is no such command, or no process, memory or file left.
    """

    def __init__(self, command: Sequence[str], packages: Sequence[str] = ()) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = _starter(os.getpid()).submit(_start, command, packages, theirs.fileno()).result()
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._said = b""
        self.is_warm = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, request: bytes, limit_s: float, output_bytes: int) -> Ran:
        """Run one program; the clock starts when it is ready. Never raises, never takes much longer than allowed."""
        if not self.is_warm:
            if self._status(time.monotonic() + START_LIMIT_S) is None:
                return Ran(b"", self._exit_status())
            self.is_warm = True
        try:
            self._control.settimeout(START_LIMIT_S)
            self._control.sendall(len(request).to_bytes(8, "big") + request)
        except OSError:
            return Ran(b"", self._exit_status())
        return self._watch(limit_s, output_bytes)

    def _exit_status(self) -> int | None:
        """Of a process that has closed its end, which ends in a moment; None where it does not."""
        try:
            return self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return None

    def _watch(self, limit_s: float, output_bytes: int) -> Ran:
        output = bytearray()
        deadline, is_ready, is_open = time.monotonic() + START_LIMIT_S, False, True
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            events = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not events:
                return Ran(bytes(output), None, "time")
            # the status is asked for first: what was written before it is read after it
            ended = self._control.fileno() in events
            status = self._status(time.monotonic() + 1.0) if ended else None
            while is_open:
                try:
                    piece = os.read(self._output, 1 << 16)
                except BlockingIOError:
                    break
                is_open = bool(piece)
                output += piece
                if len(output) > output_bytes:
                    return Ran(bytes(output), None, "output")
                if not is_ready and b"\n" in output:
                    is_ready, deadline = True, time.monotonic() + limit_s
                if not is_open:  # of a server that dies, its output may close some time before its control
                    poll.unregister(self._output)
            if ended:
                if status is None:  # the server is gone, and whatever ran with it
                    return Ran(bytes(output), self._exit_status())
                return Ran(bytes(output), int(status["status"]), reusable=bool(status["clean"]) and is_open)

    def _status(self, deadline: float) -> dict[str, Any] | None:
        """The server's next line; None where there will be none."""
        while b"\n" not in self._said:
            self._control.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                piece = self._control.recv(1 << 12)
            except OSError:
                return None
            if not piece:
                return None
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return dict(json.loads(line))

    def complaint(self) -> str:
        """The last line that the command wrote to stderr before it failed."""
        with self:
            assert self._process.stderr is not None
            self._control.close()
            said = self._process.stderr.read(_MAX_COMPLAINT_BYTES).decode("utf-8", "replace").strip().splitlines()
        return said[-1] if said else ""

    def stop(self) -> None:
        """End it, with all that runs in it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:  # it is gone already
            self._process.kill()
        self._process.wait()
        self._control.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> SandboxServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _start(command: Sequence[str], packages: Sequence[str], control: int) -> subprocess.Popen[bytes]:
    filter_fd = _filter_file() if command else None
    # -P: the folder of the script is no place to import from
    python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "/runner.py" if command else str(RUNNER)]
    guard = ["--seccomp", str(filter_fd)] if filter_fd is not None else []
    try:
        return subprocess.Popen(
            [*command, *guard, *(["--"] if command else []), *python, "serve", *packages],
            stdin=control,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in ENVIRONMENT.items() if name != "TMPDIR"},
            start_new_session=True,
            pass_fds=() if filter_fd is None else (filter_fd,),
        )
    finally:
        if filter_fd is not None:
            os.close(filter_fd)


def _filter_file() -> int | None:
    program = build_filter(server=True)
    if program is None:
        return None
    read, write = os.pipe()
    os.write(write, program)  # far less than a pipe holds
    os.close(write)
    return read
