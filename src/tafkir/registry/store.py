"""Files of a registry in a folder or any object store that fsspec opens: whole or absent, blobs by their content.

blobs/ab/abcdef...      content, under its SHA-256
models/NAME/...         records, each created once and never changed
incoming/...            what is on its way; a kill leaves it there, and nobody looks at it
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tafkir.errors import BackendUnavailable, RegistryError

__all__ = ["Store"]

CHUNK_BYTES = 4 << 20
_STALE_S = 24 * 3600


class Store:
    """A place for blobs and records.

    Args:
        url: a folder, or what fsspec opens: `s3://bucket/registry`, `gs://...`, `memory://registry`.

    Raises:
        BackendUnavailable: no library for this kind of place is installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BackendUnavailable(
                f"cannot open this kind of place ({error})", where=url, fix="install its fsspec library, such as s3fs"
            ) from error
        self._root = str(root).rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    # ---- blobs ------------------------------------------------------------------------------------------------------

    @staticmethod
    def blob_key(sha256: str) -> str:
        return f"blobs/{sha256[:2]}/{sha256}"

    def has_blob(self, sha256: str, size: int) -> bool:
        """Whether the whole blob is there."""
        path = self._path(self.blob_key(sha256))
        return bool(self._fs.exists(path)) and self._fs.size(path) == size

    def put_blob(self, file: Path, sha256: str) -> None:
        """Copy a file in; it appears under its hash when all of it is there.

        Raises:
            RegistryError: the file is no longer what was hashed.
        """
        incoming = self._path(f"incoming/{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        self._make_parent(incoming)
        try:
            with file.open("rb") as source, self._fs.open(incoming, "wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != sha256:
                raise RegistryError("the file changed while it was copied", where=str(file), fix="add it again")
            self._rename(incoming, self._path(self.blob_key(sha256)))
        finally:
            if self._fs.exists(incoming):
                self._fs.rm_file(incoming)

    def put_bytes(self, content: bytes) -> str:
        """A small blob; returns its hash."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has_blob(sha256, len(content)):
            incoming = self._path(f"incoming/{uuid.uuid4().hex}")
            self._make_parent(incoming)
            self._fs.pipe_file(incoming, content)
            self._rename(incoming, self._path(self.blob_key(sha256)))
        return sha256

    def open_blob(self, sha256: str) -> BinaryIO:
        """A blob's content.

        Raises:
            RegistryError: it is not there.
        """
        path = self._path(self.blob_key(sha256))
        try:
            file: BinaryIO = self._fs.open(path, "rb")
        except FileNotFoundError as error:
            raise RegistryError("the blob is missing", where=path, fix="add the version again") from error
        return file

    def hash_blob(self, sha256: str) -> str | None:
        """The hash of what lies under a hash; None where nothing does."""
        if not self._fs.exists(self._path(self.blob_key(sha256))):
            return None
        digest = hashlib.sha256()
        with self.open_blob(sha256) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def local_path(self, sha256: str) -> Path | None:
        """Where a blob lies on this machine; None in an object store."""
        return Path(self._path(self.blob_key(sha256))) if self._local else None

    def sweep(self) -> None:
        """Remove what a killed process left on its way a day ago or earlier."""
        folder = self._path("incoming")
        if not self._fs.exists(folder):
            return
        for entry in self._fs.ls(folder, detail=True):
            changed = entry.get("mtime") or entry.get("LastModified") or entry.get("created")
            seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
            if isinstance(seconds, int | float) and seconds < time.time() - _STALE_S:
                self._fs.rm_file(entry["name"])

    # ---- records ----------------------------------------------------------------------------------------------------

    def create(self, key: str, record: Any) -> bool:
        """Write a JSON record; False where one of that name is there. Never half a record, and never over another."""
        path, content = self._path(key), _canonical(record)
        self._make_parent(path)
        if not self._local:
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        incoming = Path(self._path(f"incoming/{uuid.uuid4().hex}"))
        incoming.parent.mkdir(parents=True, exist_ok=True)
        try:
            with incoming.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(incoming, path)  # fails where the name is taken, unlike a rename
        except FileExistsError:
            return False
        finally:
            incoming.unlink(missing_ok=True)
        return True

    def read(self, key: str) -> Any:
        """A JSON record.

        Raises:
            RegistryError: it is missing or damaged.
        """
        path = self._path(key)
        try:
            return json.loads(self._fs.cat_file(path))
        except FileNotFoundError as error:
            raise RegistryError("no such record", where=path) from error
        except ValueError as error:
            raise RegistryError("the record is damaged", where=path, fix="restore it from a copy") from error

    def names(self, key: str) -> list[str]:
        """What lies in a folder, in order; nothing where there is none."""
        path = self._path(key)
        self._fs.invalidate_cache(path)
        if not self._fs.exists(path):
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in self._fs.ls(path, detail=False))

    def blobs(self) -> Iterator[str]:
        """Every blob's hash."""
        for folder in self.names("blobs"):
            yield from self.names(f"blobs/{folder}")

    def _make_parent(self, path: str) -> None:
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

    def _rename(self, source: str, target: str) -> None:
        self._make_parent(target)
        if self._local:
            descriptor = os.open(source, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(source, target)
        else:
            self._fs.mv(source, target)


def _canonical(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
