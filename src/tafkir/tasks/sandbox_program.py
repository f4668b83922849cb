"""Runs somebody's program inside a sandbox: one JSON request on stdin, one JSON line a call on stdout.

Run as a script that imports nothing of Tafkir. It knows no expected value, and judges nothing: whatever the program
does to this process, all that it can change is what it answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 50
MAX_ERROR_LENGTH = 200

_TAGS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}


def encode(value: Any, depth: int = 0) -> Any:
    """A value of plain types as JSON; exact types only, so that no method of the program's own classes counts.

    Raises:
        TypeError: another type, or nested too deeply.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if depth == MAX_DEPTH:
        raise TypeError("nested too deeply")
    if kind in _TAGS:
        return [_TAGS[kind], [encode(item, depth + 1) for item in value]]
    if kind is dict:
        return ["dict", [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]]
    raise TypeError(f"a value of type {kind.__name__}")


def decode(value: Any) -> Any:
    """The value that `encode` wrote. Raises ValueError, TypeError or RecursionError for anything else."""
    if not isinstance(value, list):
        return value
    tag, items = value
    if tag == "dict":
        return {decode(k): decode(v) for k, v in items}
    kinds: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if tag not in kinds:
        raise ValueError(f"unknown tag {tag!r}")
    return kinds[tag]([decode(item) for item in items])


def _limit(request: dict[str, Any]) -> None:
    import resource

    # The soft limit's signal tells what happened; a program that ignores it is killed a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"] + 1))
    limits = [
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ]
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError"
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_LENGTH]


def main() -> None:
    request = json.loads(sys.stdin.read())
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]

    _limit(request)
    reply({"ready": True})
    scope: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), scope)
        entry = scope.get(request["entry"])
    except BaseException as error:
        reply({"failed": _explain(error)})
        return
    if not callable(entry):
        reply({"failed": f"there is no function {request['entry']}"})
        return
    for number, arguments in enumerate(request["calls"]):
        try:
            reply({"call": number, "value": encode(entry(*decode(arguments)))})
        except BaseException as error:
            reply({"call": number, "error": _explain(error)})


if __name__ == "__main__":
    main()
