"""The rollouts of a stage on disk: `rollouts/step-<n>.jsonl.gz`, one row per completion, the oldest steps removed.

A step's file appears whole or not at all, and holds nothing that depends on the clock: equal runs have equal files,
and a step that is done again after a kill writes the same file again.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.errors import RunDirError
from tafkir.runlog.atomic import guard_disk, write_bytes

__all__ = ["Keep", "RolloutLog"]

_KEEP = re.compile(r"^(all|none|[0-9]{1,9} (steps|KB|MB|GB))$")

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_NAME = re.compile(r"step-(\d{8})\.jsonl\.gz")


@dataclass(frozen=True, slots=True)
class Keep:
    """How many of the newest steps stay, and how many bytes they may take together; None is no limit."""

    steps: int | None = None
    num_bytes: int | None = None

    @staticmethod
    def parse(text: str) -> Keep:
        """Read `all`, `none`, `50 steps` or `256 MB` (decimal, as disks count).

        Raises:
            ValueError: it is none of these.
        """
        if not _KEEP.fullmatch(text):
            raise ValueError(f"{text!r} is neither 'all' nor 'none', '50 steps' or '256 MB'")
        if text in ("all", "none"):
            return Keep(None if text == "all" else 0)
        number, unit = text.split()
        return Keep(int(number)) if unit == "steps" else Keep(None, int(number) * _UNITS[unit])


class RolloutLog:
    """Writes and reads the rollouts of one stage.

    Args:
        folder: `<stage>/rollouts`, made with the first step.
        keep: what stays. The newest step always does, unless nothing is kept at all.
    """

    def __init__(self, folder: Path, keep: Keep | None = None) -> None:
        self.folder, self.keep = folder, keep or Keep()

    @property
    def is_on(self) -> bool:
        """Whether anything is kept: where nothing is, rows need not be made."""
        return self.keep.steps != 0 and self.keep.num_bytes != 0

    def write(self, step: int, rows: Iterable[str]) -> None:
        """Replace the file of one step by these rows (JSON objects without line ends), then remove what is too old.

        Files of later steps, as a killed run leaves them, are left for those steps to replace and count for nothing.

        Raises:
            RunDirError: the disk is full or the place is not writable.
        """
        if not self.is_on:
            return
        text = "".join(f"{row}\n" for row in rows)
        # Level 1: a third of the bytes for a tenth of the time that the default takes.
        write_bytes(self._path(step), gzip.compress(text.encode("utf-8"), compresslevel=1, mtime=0))
        self._remove_older(step)

    def steps(self) -> list[int]:
        """The steps that are kept, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def read(self, step: int) -> Iterator[dict[str, Any]]:
        """The rows of one step, in the order in which they were written.

        Raises:
            RunDirError: the step is not kept, or its file is damaged.
        """
        path = self._path(step)
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)
        except FileNotFoundError as error:
            raise RunDirError(f"no rollouts of step {step}", where=str(self.folder)) from error
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise RunDirError("not a rollout file", where=str(path), fix="remove it") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.jsonl.gz"

    def _remove_older(self, newest: int) -> None:
        total = 0
        with guard_disk(self.folder):
            for step in reversed([step for step in self.steps() if step <= newest]):
                path = self._path(step)
                total += path.stat().st_size
                old = self.keep.steps is not None and step <= newest - self.keep.steps
                large = self.keep.num_bytes is not None and total > self.keep.num_bytes
                if step < newest and (old or large):
                    path.unlink()
