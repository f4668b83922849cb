"""Calls a user's reward function in a process of its own: JSON lines in, JSON lines out, until stdin closes.

Run as a module, with the user's file as its argument. The kernel ends it when one call takes too long, so that nothing
stays behind even where the parent is killed in the middle of one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tafkir.records import Example

GRACE_S = 1.0
"""The parent kills first; this is for a parent that is gone."""


def _load(path: Path) -> Callable[[Example, str], Any]:
    """The file's function `reward`; raises ValueError with the reason where there is none."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("reward", path)
    if spec is None or spec.loader is None:
        raise ValueError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise ValueError(f"it cannot be imported: {_explain(error, path)}") from None
    function = getattr(module, "reward", None)
    if not callable(function):
        raise ValueError("it has no function reward(example, text)")
    return function  # type: ignore[no-any-return]


def _explain(error: BaseException, path: Path) -> str:
    """The error with the line of the user's file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" ({path.name}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}"[:200] + place


def _call(reward: Callable[[Example, str], Any], request: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        value = reward(Example(**request["example"]), request["text"])
    except BaseException as error:  # whatever a user's function raises is recorded
        return {"failure": "raised", "detail": f"raised {_explain(error, path)}"}
    if not isinstance(value, (int, float)):
        return {"failure": "wrong_type", "detail": f"returned {type(value).__name__}, not a number"}
    if not math.isfinite(value):
        return {"failure": "not_finite", "detail": f"returned {float(value)}"}
    return {"reward": float(value)}


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def main() -> None:
    path = Path(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the user's code prints is no reply
    try:
        reward = _load(path)
    except ValueError as error:
        _reply(replies, {"error": str(error)})
        return
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + GRACE_S)
        result = _call(reward, request, path)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, result)


if __name__ == "__main__":
    main()
