"""Compares answers with math-verify in a process of its own: JSON lines in, JSON lines out, until stdin closes.

Run as a script. It limits its own memory, and has the kernel end it when one comparison takes too long, so that nothing
stays behind even where the parent is killed in the middle of one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import IO, Any

GRACE_S = 1.0
"""The parent kills first; this is for a parent that is gone."""


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)  # the parent may have less itself
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _alarm(seconds: float) -> None:
    # no handler: the default action ends the process even inside a long computation in C
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _compare(expected: str, answer: str) -> dict[str, Any]:
    try:
        from math_verify import parse, verify

        gold = parse(f"${expected}$", parsing_timeout=None)
        target = parse(f"${answer}$", parsing_timeout=None)
        if not target:
            return {"error": "not a mathematical expression"}
        return {"equal": bool(verify(gold, target, timeout_seconds=None))}
    except Exception as error:  # a grader records every failure
        return {"error": f"math-verify failed ({type(error).__name__})"}


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    _limit_memory(int(sys.argv[1]))
    # imports and caches are paid before the first comparison is timed
    warm = _compare("1", "x=1")
    _reply(replies, warm)
    if "error" in warm:
        return
    for line in sys.stdin:
        request = json.loads(line)
        _alarm(request["timeout_s"] + GRACE_S)
        result = _compare(request["expected"], request["answer"])
        _alarm(0)
        _reply(replies, result)


if __name__ == "__main__":
    main()
