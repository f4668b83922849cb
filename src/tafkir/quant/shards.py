"""The files that a quantized checkpoint is written to, and the journal of those that are finished. Without torch."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.checkpoint.files import read_json
from tafkir.checkpoint.header import StoredTensor, layout, read_header
from tafkir.errors import CheckpointError
from tafkir.quant.formats import Piece
from tafkir.quant.plan import QuantizePlan
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.runlog.atomic import write_json

__all__ = ["JOURNAL", "Journal", "Shard", "ShardTensor", "fingerprint_of", "written_by"]

JOURNAL = ".progress.json"
_CHUNK_BYTES = 4 << 20
_EARLY_BYTES = 1 << 20
"""From here on a part of a tensor is on its way to the disk: else all of it has to be waited for at the end."""


def fingerprint_of(plan: QuantizePlan, config: QuantizeConfig, source: Mapping[str, Any]) -> str:
    """Of all that decides the bytes: what is written, how, and `source`, what is known of the files that are read."""
    shards = {file: [[p.name, p.dtype, list(p.shape)] for p in pieces] for file, pieces in plan.shards.items()}
    said = json.dumps([shards, config.model_dump(mode="json"), source], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def written_by(folder: Path) -> tuple[str | None, dict[str, dict[str, str]]]:
    """The fingerprint of the work that a folder's journal is of, and its finished files; None and none without one."""
    try:
        content = read_json(folder / JOURNAL)
    except CheckpointError:
        return None, {}
    return content.get("fingerprint"), content.get("finished", {})


class Journal:
    """Which files are finished, with the hash of every tensor in them; on disk after each."""

    def __init__(self, staging: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = staging / JOURNAL, fingerprint
        self.finished: dict[str, dict[str, str]] = {}
        self._guard = threading.Lock()
        theirs, finished = written_by(staging)
        if theirs == fingerprint:
            self.finished = finished
        else:
            for file in staging.glob("*.safetensors"):
                file.unlink()

    def verify(self, staging: Path, plan: QuantizePlan) -> None:
        """Forget the files whose bytes are not those that were written."""
        for file in list(self.finished):
            if not _is_whole(staging / file, plan.shards[file], self.finished[file]):
                del self.finished[file]

    def finish(self, file: str, hashes: dict[str, str]) -> None:
        """A file is on the disk."""
        with self._guard:
            self.finished[file] = hashes
            write_json(self.path, {"fingerprint": self.fingerprint, "finished": self.finished})


def _is_whole(file: Path, pieces: Sequence[Piece], hashes: Mapping[str, str]) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        stored = read_header(file, descriptor)
        if stored.keys() != {piece.name for piece in pieces}:
            return False
        return all(_hash_of(descriptor, tensor) == hashes.get(name) for name, tensor in stored.items())
    except CheckpointError:
        return False
    finally:
        os.close(descriptor)


def _hash_of(descriptor: int, stored: StoredTensor) -> str:
    digest = hashlib.sha256()
    for start in range(0, stored.num_bytes, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, stored.num_bytes - start)
        digest.update(os.pread(descriptor, size, stored.offset + start))
    return digest.hexdigest()


class Shard:
    """A file that is being written: where its tensors go, and how many are still to come."""

    def __init__(self, file: Path, pieces: Sequence[Piece]) -> None:
        header, self.placed = layout(file, ((p.name, p.dtype, p.shape) for p in pieces))
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(self.descriptor, len(header) + sum(p.num_bytes for p in pieces))
            _write_at(self.descriptor, memoryview(header), 0)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.hashes: dict[str, str] = {}
        self.missing = len(pieces)

    def write(self, name: str, content: memoryview) -> str:
        """Write a whole tensor; returns its hash."""
        tensor = self.tensor(name)
        tensor.append(content)
        return tensor.hash()

    def tensor(self, name: str) -> ShardTensor:
        """A tensor to be written from its beginning to its end."""
        return ShardTensor(self.descriptor, self.placed[name])


class ShardTensor:
    """A tensor that is being written, and its hash so far."""

    def __init__(self, descriptor: int, stored: StoredTensor) -> None:
        self._descriptor, self._offset, self._digest = descriptor, stored.offset, hashlib.sha256()
        self._begun = stored.offset

    def append(self, content: memoryview) -> None:
        """Write what comes next."""
        _write_at(self._descriptor, content, self._offset)
        self._offset += len(content)
        if self._offset - self._begun >= _EARLY_BYTES:
            self._begun = _to_disk(self._descriptor, self._begun, self._offset)
        self._digest.update(content)

    def hash(self) -> str:
        """SHA-256 of all that was written."""
        return self._digest.hexdigest()


def _to_disk(descriptor: int, start: int, stop: int) -> int:
    """Let the system begin to write these bytes to the disk, where it can be told to; returns the end of them."""
    stop -= stop % mmap.PAGESIZE
    if hasattr(os, "posix_fadvise"):
        # Said of pages that are not on the disk yet, this starts writing them and drops none.
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
    return stop


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)
