"""Runs untrusted Python: three tiers behind one interface, each named in the verdicts that it gives.

"bwrap" is a real sandbox: bubblewrap, a system-call filter and resource limits; no network, no file but the
interpreter's own, 16 MiB to write to and no second process. "rlimit" has the limits alone, and only whoever says so
gets it. "remote" is somebody else's machine, a SandboxFusion server. In all of them the program gets inputs and
returns outputs; what they should be is known outside only.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from typing import Any, Literal, Protocol

from tafkir.errors import BackendUnavailable
from tafkir.tasks.bubblewrap import PACKAGES, TMP_BYTES, UNSAFE, bwrap_command, package_folders
from tafkir.tasks.sandbox_program import decode, encode
from tafkir.tasks.sandbox_server import MAX_OUTPUT_BYTES, Ran, SandboxServer
from tafkir.tasks.syscalls import build_filter

__all__ = ["CallResult", "Limits", "ProgramResult", "ProgramRunner", "Sandbox", "Tier", "build_request", "read_results"]

Tier = Literal["bwrap", "rlimit", "remote"]
Ending = Literal["finished", "failed", "time", "memory", "died", "sandbox"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        timeout_s: computing time with all its calls, rounded up to whole seconds; three times as much may pass on the
            clock, so that a busy machine does not turn right programs into wrong ones.
        call_s: computing time of loading it, and of each call; 0 for no limit of their own.
        memory_bytes: address space of the program, the interpreter's 20 MiB included.
        output_bytes: length of all its answers.
    """

    timeout_s: float = 5.0
    call_s: float = 0.0
    memory_bytes: int = 512 << 20
    output_bytes: int = MAX_OUTPUT_BYTES


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


class ProgramRunner(Protocol):
    """One of the three tiers."""

    @property
    def tier(self) -> Tier: ...

    @property
    def limits(self) -> Limits: ...

    def run(
        self, program: str, entry: str, calls: Sequence[tuple[Any, ...]], limits: Limits | None = None
    ) -> ProgramResult:
        """Load a program and call its function `entry` with each tuple of arguments; never raises, never hangs.

        Args:
            program: Python source; a lone surrogate in it, which is no text, becomes a question mark.
            entry: name of the function, or an expression in the program's names that gives one. Ours, not the model's.
            calls: arguments of plain types.
            limits: instead of the runner's own.
        """
        ...

    def close(self) -> None:
        """Let go of what is kept warm; the runner can still be used."""
        ...


class Sandbox:
    """The two tiers on this machine. Safe to use from any thread: each run is a process of its own.

    Interpreters are kept warm: a run takes one, which forks the program's process, and gives it back when nothing of
    the program is left. One that was killed or written to is thrown away.

    Args:
        tier: "bwrap", or "rlimit" for limits of time, memory and file size alone: no protection from malice.
        limits: of one program.
        packages: installed ones that programs may import, beside the standard library, and what these need. Of a
            module in a package ("numpy.linalg") the package is there, and the module is imported beforehand.
        probe: run a program first, so that what does not work is said at once.

    Raises:
        BackendUnavailable: bubblewrap is missing or may not make namespaces here, this machine has no filter that
            would hold root, or a package is not installed.
    """

    def __init__(
        self,
        tier: Literal["bwrap", "rlimit"] = "bwrap",
        limits: Limits | None = None,
        *,
        packages: Sequence[str] = (),
        probe: bool = True,
    ) -> None:
        self.tier: Tier = tier
        self.limits, self.packages = limits or Limits(), tuple(packages)
        self._command = bwrap_command(self.packages) if tier == "bwrap" else ()
        folders = [PACKAGES] if tier == "bwrap" else sorted({str(p.parent) for p in package_folders(self.packages)})
        self._imports = [*folders, *(name for name in self.packages if "." in name)] if self.packages else []
        self._idle: list[SandboxServer] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        if tier == "bwrap" and probe:
            _probe()

    def run(
        self, program: str, entry: str, calls: Sequence[tuple[Any, ...]], limits: Limits | None = None
    ) -> ProgramResult:
        """See `ProgramRunner`."""
        limits = limits or self.limits
        own = build_filter()
        request = build_request(program, entry, calls, limits)
        request |= {"filter": own.hex() if own else "", "file_bytes": TMP_BYTES if self.tier == "bwrap" else 0}
        try:
            ran, was_warm = self._run(json.dumps(request).encode(), limits)
            if was_warm and not ran.output and not ran.cut:  # it died while it was idle
                ran, _ = self._run(json.dumps(request).encode(), limits)
        except OSError as error:  # bubblewrap is gone, or there is no process, memory or file left
            return ProgramResult("sandbox", f"the sandbox cannot be started: {error}")
        return read_results(ran, len(calls), limits)

    def _run(self, request: bytes, limits: Limits) -> tuple[Ran, bool]:
        server = self._take()
        was_warm = server.is_warm
        ran = server.run(request, 3 * limits.timeout_s, limits.output_bytes)
        if ran.reusable:
            with self._lock:
                self._idle.append(server)
        else:
            server.stop()
        return ran, was_warm

    def close(self) -> None:
        """End the warm interpreters; the next run starts a new one."""
        with self._lock:
            idle, self._idle = self._idle, []
        if self._owner == os.getpid():
            for server in idle:
                server.stop()

    def _take(self) -> SandboxServer:
        with self._lock:
            if self._owner != os.getpid():  # after a fork the processes belong to the parent
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                server = self._idle.pop()
                if server.is_alive():
                    return server
                server.stop()
        return SandboxServer(self._command, self._imports)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts interpreters of its own."""
        return partial(Sandbox, packages=self.packages), (self.tier, self.limits)


def build_request(program: str, entry: str, calls: Sequence[tuple[Any, ...]], limits: Limits) -> dict[str, Any]:
    """What the process of a program is told, but for the system-call filter and the size of files."""
    return {
        "program": program.encode("utf-8", "replace").decode("utf-8"),
        "entry": entry,
        "calls": [encode(tuple(arguments), arrays=True) for arguments in calls],
        "cpu_s": math.ceil(limits.timeout_s),
        "call_s": limits.call_s,
        "memory_bytes": limits.memory_bytes,
        "filter": "",
        "file_bytes": 0,
    }


def read_results(ran: Ran, wanted: int, limits: Limits) -> ProgramResult:
    """Make sense of the lines. A program may have written them itself: any answer is as good as its own."""
    lines = ran.output.splitlines() if ran.output.endswith(b"\n") else ran.output.splitlines()[:-1]
    if not lines or lines[0] != b'{"ready": true}':
        return ProgramResult("sandbox", f"the sandbox failed: {ran.describe()}")
    calls: dict[int, CallResult] = {}
    late = False
    for line in lines[1:]:
        try:
            message = json.loads(line)
            if "failed" in message:
                detail = str(message["failed"])
                return ProgramResult("memory" if detail == "MemoryError" else "failed", detail)
            if "late" in message:
                late = True
                break
            number = int(message["call"])
            if "error" in message:
                calls.setdefault(number, CallResult(error=str(message["error"])))
            else:
                calls.setdefault(number, CallResult(decode(message["value"])))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return ProgramResult("died", "it wrote something else than results")
    done = tuple(map(calls.__getitem__, takewhile(calls.__contains__, range(wanted))))
    if len(done) == wanted:
        return ProgramResult("finished", "", done)
    if late:
        return ProgramResult("time", f"one call took longer than {limits.call_s:g} s", done)
    if ran.cut == "time" or ran.used_up_time:
        return ProgramResult("time", f"took longer than {limits.timeout_s:g} s", done)
    if ran.cut == "output":
        return ProgramResult("memory", f"wrote more than {limits.output_bytes} bytes", done)
    return ProgramResult("died", f"ended its process ({ran.describe()})", done)


@cache
def _probe() -> None:
    """Run a program once, so that what does not work here is said before training, not in each verdict."""
    sandbox = Sandbox("bwrap", probe=False)
    result = sandbox.run("def f(x):\n    return x", "f", [(1,)])
    sandbox.close()
    if result.ending == "finished" and result.calls[0].value == 1:
        return
    said = SandboxServer(bwrap_command()).complaint()
    raise BackendUnavailable(
        f"bubblewrap does not work here: {said or result.detail}",
        fix=f"allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or the container's setting); {UNSAFE}",
    )
