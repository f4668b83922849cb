"""A folder that is complete or not there: filled under a temporary name, then renamed. Without torch."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tafkir.errors import CheckpointError

__all__ = ["MAX_SHARD_BYTES", "publish_folder", "refuse_present", "write_error", "write_folder"]

MAX_SHARD_BYTES = 5 * 10**9
"""A larger checkpoint is written in shards of this size."""


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; it gets its name, in place of an older one, when the block ends well.

    Raises:
        CheckpointError: the place is not writable, or the disk is full; an older folder stays as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.parent / f".{path.name}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            publish_folder(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise write_error(path, error) from error


def refuse_present(path: Path) -> None:
    """Let nobody write where something is.

    Raises:
        CheckpointError: it says what is there, and what to do to have it made anew.
    """
    if not path.exists():
        return
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    what = "a finished checkpoint" if (path / "config.json").exists() else "something else"
    raise CheckpointError(
        f"{what} ({num_bytes / 1e6:,.1f} MB) is there already",
        where=str(path),
        fix=f"use it, choose another folder, or have it made anew: rm -r {shlex.quote(str(path))}",
    )


def publish_folder(staging: Path, path: Path) -> None:
    """Give a finished folder its name, in place of an older one; what was written is on the disk by then."""
    _sync(staging)
    _replace(staging, path)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(staging: Path, path: Path) -> None:
    """Rename the new folder into place. A folder cannot replace a full one, so an old one steps aside first."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(staging, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_error(path: Path, error: Exception) -> CheckpointError:
    """What a user is told when a folder cannot be written."""
    code = getattr(error, "errno", None)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        fix = "free some space, then run the same command again"
        return CheckpointError("the disk is full", where=str(path), fix=fix)
    if code == errno.EFBIG:
        fix = "raise the limit (ulimit -f), or write smaller files; then run the command again"
        what = "cannot write the checkpoint (a file would be larger than the system allows)"
        return CheckpointError(what, where=str(path), fix=fix)
    reason = os.strerror(code) if code else str(error)
    return CheckpointError(
        f"cannot write the checkpoint ({reason})", where=str(path), fix="choose a folder that you may write to"
    )
