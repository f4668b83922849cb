"""Symbolic equality by math-verify, from any thread, within a time limit that holds: workers are processes.

math-verify's own time limit needs `signal.alarm`, which works in the main thread only.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

__all__ = ["SymbolicResult", "SymbolicVerifier", "default_verifier"]

START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class SymbolicResult:
    """`equal` is None when the comparison failed; `reason` then says why."""

    equal: bool | None
    reason: str = ""


def _pump(stream: IO[str], lines: SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


class _Worker:
    """A warm process with math-verify loaded."""

    def __init__(self, memory_bytes: int) -> None:
        # -P keeps the folder of the script, which holds a math.py, off the module path
        command = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py")), str(memory_bytes)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.lines: SimpleQueue[str | None] = SimpleQueue()
        self.pump = threading.Thread(target=_pump, args=(self.stdout, self.lines), daemon=True)
        self.pump.start()

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply, or None when the worker died. Raises queue.Empty after `timeout_s`."""
        line = self.lines.get(timeout=timeout_s)
        return None if line is None else dict(json.loads(line))

    def send(self, request: dict[str, Any]) -> bool:
        try:
            self.stdin.write(json.dumps(request) + "\n")
            self.stdin.flush()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pump.join()
        self.stdout.close()
        try:
            self.stdin.close()
        except OSError:  # what was still to be written has nobody to read it
            return


class SymbolicVerifier:
    """Compares answers in warm worker processes, started when first needed.

    Safe to call from any thread; more threads than workers take turns, and waiting does not count as comparing.

    Args:
        timeout_s: how long one comparison may take; its worker is killed then.
        memory_bytes: how much memory a worker may map.
        max_workers: how many comparisons may run at once.
    """

    def __init__(self, *, timeout_s: float = 3.0, memory_bytes: int = 2 << 30, max_workers: int = 4) -> None:
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes
        self._slots = threading.BoundedSemaphore(max_workers)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def compare(self, expected: str, answer: str) -> SymbolicResult:
        """Whether two expressions (plain or LaTeX) are equal; never raises, never takes much longer than the limit."""
        with self._slots:
            worker = self._take()
            if isinstance(worker, str):
                return SymbolicResult(None, worker)
            request = {"expected": expected, "answer": answer, "timeout_s": self.timeout_s}
            try:
                reply = worker.receive(self.timeout_s) if worker.send(request) else None
            except Empty:
                worker.stop()
                return SymbolicResult(None, f"the comparison took longer than {self.timeout_s:g} s")
            if reply is None:
                worker.stop()
                return SymbolicResult(None, "the comparison ran out of memory or crashed")
            with self._lock:
                self._idle.append(worker)
            return SymbolicResult(reply.get("equal"), reply.get("error", ""))

    def _take(self) -> _Worker | str:
        """An idle worker or a new one; or why there is none."""
        with self._lock:
            if self._owner != os.getpid():
                # after a fork the pipes belong to the parent
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.stop()
        worker = _Worker(self.memory_bytes)
        try:
            ready = worker.receive(START_LIMIT_S)
        except Empty:
            ready = None
        if ready is None or "error" in ready:
            worker.stop()
            return "math-verify cannot be started" + (f": {ready['error']}" if ready else "")
        return worker

    def close(self) -> None:
        """End the idle workers; the next comparison starts a new one."""
        with self._lock:
            workers, self._idle = self._idle, []
        if self._owner == os.getpid():
            for worker in workers:
                worker.stop()


_default: SymbolicVerifier | None = None
_default_lock = threading.Lock()


def default_verifier() -> SymbolicVerifier:
    """The verifier that tasks share; its workers end with the program."""
    global _default
    with _default_lock:
        if _default is None:
            _default = SymbolicVerifier()
            atexit.register(_default.close)
        return _default
