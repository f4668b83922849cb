"""Which processors a process runs on: some of them, or those of a NUMA node."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tafkir.errors import BackendUnavailable, RecipeError

__all__ = ["parse_processors", "run_on"]

_NODES = Path("/sys/devices/system/node")
_EXPECTED = "processors as in 0-15,32-47, or a NUMA node as in node1"


def parse_processors(text: str, nodes: Path = _NODES) -> set[int]:
    """Numbers of processors: `0-3,8` as in taskset and cgroups, or `node1` for all of a NUMA node.

    Raises:
        RecipeError: the text says neither.
        BackendUnavailable: there is no such node.
    """
    node = re.fullmatch(r"node(\d+)", text.strip())
    if node:
        listed = nodes / text.strip() / "cpulist"
        if not listed.is_file():
            found = sorted(path.name for path in nodes.glob("node[0-9]*"))
            raise BackendUnavailable(
                f"no NUMA node {node[1]}", where="--cpus", expected=", ".join(found) or "none here"
            )
        text = listed.read_text()
    processors: set[int] = set()
    for part in text.strip().split(","):
        span = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if first > last:
            raise RecipeError(f"{part.strip()!r} names no processors", where="--cpus", expected=_EXPECTED)
        processors |= set(range(first, last + 1))
    return processors


def run_on(text: str) -> int:
    """Keep this thread, and those that it starts from now on, on the processors that `parse_processors` finds.

    Called before torch is imported, it also settles how many threads torch takes; memory then comes from the node
    whose processors first write to it.

    Returns:
        How many processors they are.

    Raises:
        RecipeError, BackendUnavailable: as `parse_processors`; or this process may not run there.
    """
    asked = parse_processors(text)
    if not hasattr(os, "sched_setaffinity"):
        raise BackendUnavailable("threads cannot be kept on processors", where="--cpus", expected="Linux")
    allowed = os.sched_getaffinity(0)
    if not asked <= allowed:
        missing = ",".join(map(str, sorted(asked - allowed)))
        raise BackendUnavailable(
            f"processors {missing} are not this process's", where="--cpus", expected=f"of {_spans(allowed)}"
        )
    os.sched_setaffinity(0, asked)
    return len(asked)


def _spans(numbers: set[int]) -> str:
    """As `parse_processors` reads them."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
