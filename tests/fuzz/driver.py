"""Broken inputs to everything that reads what others wrote: an error of ours, in time and bounded memory, or nothing.

`python -m tests.fuzz.driver --cases 100000 --out FILE` takes every family of tests/fuzz/families.py in a process of its
own; `tests/fuzz/test_fuzz.py` takes a few cases of each. Case n of a family is a function of family, seed and n.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from tests.fuzz.families import FAMILIES, Case

CASE_CPU_S = 5.0
"""Of one case. Far above what any takes, and far below what a hang does."""
MEMORY_BYTES = 1 << 30
"""How much the process may grow beyond what it has when it begins."""


class Hang(BaseException):
    """A case took longer than it may."""


@dataclass
class Result:
    """What a family came to; `faults` are the first cases of each kind, with their numbers."""

    family: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    cpu_s: float = 0.0
    slowest_ms: float = 0.0
    grown_mb: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)


def fuzz(family: str, cases: int, folder: Path, *, seed: int = 0, first: int = 0) -> Result:
    """Run cases of a family in this process, each with a limit on its time."""
    build, result = FAMILIES[family], Result(family)
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = build(folder)
    signal.signal(signal.SIGVTALRM, _hang)
    for number in range(first, first + cases):
        _one(run, Random(f"{family} {seed} {number}"), number, result)
    result.cases, result.cpu_s = cases, round(time.process_time() - began, 1)
    result.grown_mb = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024, 1)
    return result


def _one(run: Case, random: Random, number: int, result: Result) -> None:
    began = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_CPU_S)
    try:
        refused = run(random)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        result.refused += refused
        result.accepted += not refused
    except (Hang, Exception) as error:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tafkir" in frame.filename]
        last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}"
        result.faults.setdefault(kind, f"case {number}: {str(error)[:300]}")
    result.slowest_ms = max(result.slowest_ms, round(1000 * (time.process_time() - began), 1))


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {CASE_CPU_S:g} s")


def limit_memory() -> None:
    """Let the process grow by `MEMORY_BYTES` and no more: what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of each family")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="this one alone; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, help="write the counts as JSON; families that are there already stay")
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    given = parser.parse_args()
    families = given.family or list(FAMILIES)
    if given.here:
        limit_memory()
        with tempfile.TemporaryDirectory(prefix="tafkir-fuzz-", dir=_memory()) as folder:
            found = fuzz(families[0], given.cases, Path(folder), seed=given.seed, first=given.first)
        print(json.dumps(asdict(found)))
        return
    rows = json.loads(given.out.read_text())["families"] if given.out and given.out.exists() else {}
    for family in families:
        rows[family] = _apart(family, given)
        if given.out:
            given.out.write_text(json.dumps({"seed": given.seed, "families": rows}, indent=2) + "\n")
    sys.exit(any(rows[family]["faults"] for family in families))


def _apart(family: str, given: argparse.Namespace) -> dict[str, object]:
    """A family in a process of its own, with a limit on its memory."""
    words: list[object] = [
        "--here",
        "--family",
        family,
        "--cases",
        given.cases,
        "--seed",
        given.seed,
        "--first",
        given.first,
    ]
    command = [sys.executable, "-m", "tests.fuzz.driver", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"family": family, "faults": {"the process": f"ended with {done.returncode}"}}
    row: dict[str, object] = json.loads(done.stdout)
    print(f"{family:<12} {row['cases']:>9,} cases, {row['refused']:>9,} refused, {row['cpu_s']} CPU-seconds, slowest "
          f"{row['slowest_ms']} ms, {row['grown_mb']} MB, {len(row['faults'])} faults", flush=True)  # type: ignore[arg-type]  # fmt: skip
    for kind, case in row["faults"].items():  # type: ignore[attr-defined]
        print(f"  {kind}: {case}", flush=True)
    return row


def _memory() -> str | None:
    """A folder in memory where there is one: a case may write a file."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
