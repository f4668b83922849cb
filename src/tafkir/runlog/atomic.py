"""Files that are whole or absent: written to a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tafkir.errors import RunDirError

__all__ = ["fsync_dir", "guard_disk", "read_json", "remove_leftovers", "write_bytes", "write_json", "write_text"]

_FREE_SPACE = "free some space, then run the same command again: it resumes"
_ELSEWHERE = "choose another place with --runs-dir"
_KNOWN = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EACCES: ("not writable", f"change its permissions, or {_ELSEWHERE}"),
    errno.EPERM: ("not writable", f"change its permissions, or {_ELSEWHERE}"),
    errno.EROFS: ("on a read-only file system", _ELSEWHERE),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", _ELSEWHERE),
    errno.EEXIST: ("a part of the path is a file, not a directory", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter name with --name"),
}


@contextmanager
def guard_disk(where: Path | str) -> Iterator[None]:
    """Turn the operating system's errors into a one-line `RunDirError` about `where`."""
    try:
        yield
    except OSError as error:
        what, fix = _KNOWN.get(error.errno or 0, (f"cannot be written ({error.strerror})", _ELSEWHERE))
        raise RunDirError(what, where=str(where), fix=fix) from error


def fsync_dir(path: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader, or a kill, sees the old file or the new one.

    Raises:
        RunDirError: the disk is full or the place is not writable; the old file is untouched.
    """
    with guard_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private; a run directory's files follow the user's umask.
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes never renamed to what it was to become; only for who alone writes in the folder."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Like `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Like `write_text`, as indented JSON with the keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunDirError: it is missing or not JSON; the message names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirError("no such file", where=str(path)) from error
    except RecursionError as error:
        raise RunDirError("not valid JSON: nested too deeply", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise RunDirError(
            "not valid JSON", where=f"{path}:{line}", fix="remove the file and run the same command again"
        ) from error


def _umask() -> int:
    # POSIX has no way to read the umask without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
