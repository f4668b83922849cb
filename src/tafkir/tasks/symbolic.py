"""Symbolic equality by math-verify, from any thread, within a time limit that holds: workers are processes.

math-verify's own time limit needs `signal.alarm`, which works in the main thread only.
"""

from __future__ import annotations

import atexit
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tafkir.tasks.worker import WorkerFailure, WorkerPool

__all__ = ["SymbolicResult", "SymbolicVerifier", "default_verifier"]


@dataclass(frozen=True, slots=True)
class SymbolicResult:
    """`equal` is None when the comparison failed; `reason` then says why, and `timed_out` whether it took too long."""

    equal: bool | None
    reason: str = ""
    timed_out: bool = False


class SymbolicVerifier(WorkerPool):
    """Compares answers in warm worker processes, started when first needed.

    Args:
        timeout_s: how long one comparison may take; its worker is killed then.
        memory_bytes: how much memory a worker may map.
        max_workers: how many comparisons may run at once.
    """

    def __init__(self, *, timeout_s: float = 3.0, memory_bytes: int = 2 << 30, max_workers: int = 4) -> None:
        # -P keeps the folder of the script, which holds a math.py, off the module path
        command = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py")), str(memory_bytes)]
        super().__init__(command, timeout_s=timeout_s, max_workers=max_workers)

    def compare(self, expected: str, answer: str) -> SymbolicResult:
        """Whether two expressions (plain or LaTeX) are equal; never raises, never takes much longer than the limit."""
        try:
            reply = self.ask({"expected": expected, "answer": answer, "timeout_s": self.timeout_s})
        except WorkerFailure as failure:
            reasons = {
                "start": "math-verify cannot be started" + (f": {failure.detail}" if failure.detail else ""),
                "time": f"the comparison took longer than {self.timeout_s:g} s",
                "died": "the comparison ran out of memory or crashed",
            }
            return SymbolicResult(None, reasons[failure.kind], failure.kind == "time")
        return SymbolicResult(reply.get("equal"), reply.get("error", ""))


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
