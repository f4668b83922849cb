"""The run directory: the only thing that stages share.

`runs/<name>/{recipe.resolved.toml, env.json, log.jsonl, stages/<nn>-<kind>/, eval/, report.html, report.md}`
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tafkir
from tafkir.errors import RunDirError
from tafkir.records import STAGES, StageName
from tafkir.runlog.atomic import fsync_dir, guard_disk, read_json, remove_leftovers, write_json
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.trackers import Tracker, TrackerName, open_trackers

__all__ = [
    "RunDir",
    "StageDir",
    "available_cores",
    "cpu_model",
    "describe_environment",
    "has_bfloat16_units",
    "memory_bytes",
    "physical_cores",
]

_LOCK = ".lock"
_LOCK_ATTEMPTS, _LOCK_WAIT_S = 5, 0.1
_held_locks: set[int] = set()


class StageDir:
    """One stage's directory, `stages/<nn>-<kind>`, made on first use.

    `track` names where the stage's numbers go besides its files.
    """

    def __init__(self, path: Path, kind: StageName) -> None:
        self.path, self.kind = path, kind
        self.track: tuple[TrackerName, ...] = ()
        self.metrics_path = path / "metrics.jsonl"
        self.timings_path = path / "timings.jsonl"
        self.checkpoint_dir = path / "checkpoint"
        self.state_dir = path / "state"
        self.rollouts_dir = path / "rollouts"
        self.result_path = path / "result.json"

    def make(self) -> None:
        """Create the directory where it is missing.

        Raises:
            RunDirError: the place is not writable.
        """
        with guard_disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def metrics(self) -> JsonlWriter:
        """The writer of numbers that equal runs share to the last bit."""
        return JsonlWriter(self.metrics_path)

    def timings(self) -> JsonlWriter:
        """The writer of numbers that depend on the clock or the machine."""
        return JsonlWriter(self.timings_path)

    def trackers(self, start: int) -> list[Tracker]:
        """Where else the numbers go, after `start` finished steps; see `open_trackers`."""
        return open_trackers(self.track, self.path, f"{self.path.parent.parent.name}/{self.kind}", start)

    def read_json(self, name: str) -> Any:
        """Read `<stage>/<name>`; `RunDirError` where it is missing or not JSON."""
        return read_json(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write `<stage>/<name>` in one step."""
        write_json(self.path / name, value)

    def read_result(self) -> dict[str, Any] | None:
        """What the finished stage returned, or None while it is not finished."""
        if not self.result_path.exists():
            return None
        result: dict[str, Any] = read_json(self.result_path)
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Record that the stage is finished, and what it returned."""
        write_json(self.result_path, result)

    def set_aside(self) -> Path:
        """Rename the directory to the first free `<nn>-<kind>.old-<i>` and return that path; nothing is deleted."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        with guard_disk(self.path):
            self.path.rename(aside)
            fsync_dir(self.path.parent)
        return aside


class RunDir:
    """A run's directory.

    `RunDir(path)` only names it; `create` and `open` look at the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.resolved.toml"
        self.env_path = self.path / "env.json"
        self.log_path = self.path / "log.jsonl"
        self.stages_dir = self.path / "stages"
        self.eval_dir = self.path / "eval"
        self.report_html = self.path / "report.html"
        self.report_md = self.path / "report.md"

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Make the directory, or take the run that is already there.

        Raises:
            RunDirError: it is not writable, or holds files that are not a run's.
        """
        run = cls(path)
        with guard_disk(path):
            if path.exists() and not path.is_dir():
                raise RunDirError("is a file, not a run directory", where=str(path), fix="choose another --name")
            foreign = path.is_dir() and any(path.iterdir()) and not run._looks_like_a_run()
            if foreign:
                raise RunDirError("holds files that are not a run's", where=str(path), fix="choose another --name")
            run.stages_dir.mkdir(parents=True, exist_ok=True)
            # A directory may exist and still not take a file (permissions, a full or read-only disk): ask it now.
            with open(path / _LOCK, "ab"):
                pass
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Take a run that exists.

        Raises:
            RunDirError: there is no such directory, or it is not a run's.
        """
        run = cls(path)
        if not path.is_dir():
            raise RunDirError("no such run directory", where=str(path), fix="name a directory that `tafkir run` made")
        if not run._looks_like_a_run():
            raise RunDirError("not a run directory", where=str(path), fix="name a directory that `tafkir run` made")
        return run

    def _looks_like_a_run(self) -> bool:
        return self.recipe_path.exists() or self.stages_dir.is_dir()

    def stage(self, kind: StageName) -> StageDir:
        """The directory of one stage, numbered by its place in `STAGES`; not created yet.

        A run that was begun when there were fewer stages keeps the number that the stage had then.
        """
        there = sorted(self.stages_dir.glob(f"[0-9][0-9]-{kind}"))
        return StageDir(there[0] if there else self.stages_dir / f"{STAGES.index(kind) + 1:02d}-{kind}", kind)

    def write_env(self, **more: str | None) -> None:
        """Write `env.json`: what the numbers of this run were measured on, and what else the caller knows of that."""
        write_json(self.env_path, describe_environment() | more)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process; the lock goes with the process, however it ends.

        What killed processes were still writing under temporary names is removed.

        Raises:
            RunDirError: another process holds it; the message names its pid.
        """
        path = self.path / _LOCK
        with guard_disk(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(handle):
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise RunDirError(
                    f"process {holder} is writing this run",
                    where=str(self.path),
                    fix="wait for it, or choose another --name",
                )
            _held_locks.add(handle)
            with guard_disk(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
                remove_leftovers(self.path)
            yield
        finally:
            _held_locks.discard(handle)
            os.close(handle)


def _try_lock(handle: int) -> bool:
    """Take the lock, waiting a moment for a process that is just ending."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_LOCK_WAIT_S if attempt + 1 < _LOCK_ATTEMPTS else 0)
    return False


def _drop_locks_in_child() -> None:
    # A forked worker that outlives its parent must not keep the run locked.
    for handle in _held_locks:
        os.close(handle)
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_locks_in_child)


def describe_environment() -> dict[str, Any]:
    """What a run's numbers depend on, without importing torch."""
    return {
        "tafkir": tafkir.__version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "tokenizers": _version("tokenizers"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores_logical": available_cores(),
        "cores_physical": physical_cores(),
        "memory_bytes": memory_bytes(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> list[dict[str, str]]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    blocks = path.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in blocks
    ]


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    for block in _cpuinfo():
        if "model name" in block:
            return block["model name"]
    return platform.processor() or platform.machine()


def has_bfloat16_units() -> bool:
    """Whether the processor multiplies matrices in bfloat16 (AMX, AVX512-BF16): several times as fast as in float32."""
    flags = {flag for block in _cpuinfo() for flag in block.get("flags", "").split()}
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def available_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores that this process may run on; hyper-threads count once where the system tells them apart."""
    logical = available_cores()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    pairs = {
        (block.get("physical id", "0"), block["core id"])
        for block in _cpuinfo()
        if "core id" in block and (allowed is None or int(block.get("processor", 0)) in allowed)
    }
    return min(len(pairs), logical) or logical


def memory_bytes() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def _git_commit() -> str | None:
    """Commit of the source tree that the package runs from; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    if "site-packages" in here.parts:
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
