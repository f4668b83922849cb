"""Which files a registry takes in: safetensors, JSON and text; nothing that runs code when it is read."""

from __future__ import annotations

import json
import os
import pickletools
import zipfile
from pathlib import Path

from tafkir.checkpoint.header import read_header
from tafkir.errors import CheckpointError, RegistryError

__all__ = ["admit", "admitted_files"]

_PICKLED = frozenset(
    (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".mar", ".pdparams")
)
_SAFETENSORS = ".safetensors"
# What a pickle needs to name a function and call it.
_CALLS = frozenset(("GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2"))
_LARGEST_TEXT = 64 << 20


def admitted_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint folder, relative to it, in order; each is checked by `admit`.

    Raises:
        RegistryError: one is not let in, or there are no weights.
    """
    if not folder.is_dir():
        raise RegistryError("no such folder", where=str(folder), expected="a checkpoint folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    for file in files:
        admit(file)
    if not any(file.suffix == _SAFETENSORS for file in files):
        raise RegistryError("no weights", where=str(folder), expected="safetensors files")
    return [file.relative_to(folder) for file in files]


def admit(file: Path) -> None:
    """Let a file in, or say why not.

    Raises:
        RegistryError: a pickle by its name or by its content, a damaged safetensors or JSON file, a link.
    """
    if file.is_symlink():
        raise RegistryError("a symbolic link", where=str(file), expected="a file", fix="copy what it points to")
    if file.suffix.lower() in _PICKLED:
        raise RegistryError(f"{file.suffix} files may hold pickles, which run code", where=str(file), fix=_CONVERT)
    if file.suffix == _SAFETENSORS:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            read_header(file, descriptor)
        except CheckpointError as error:
            raise RegistryError(error.what, where=str(file), fix=error.fix) from error
        finally:
            os.close(descriptor)
        return
    if _is_pickle(file):
        raise RegistryError("the file is a pickle, which runs code, whatever its name", where=str(file), fix=_CONVERT)
    if file.suffix == ".json":
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise RegistryError("not valid JSON", where=str(file), fix="take the file anew") from error


_CONVERT = "save the weights as safetensors"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_pickle(file: Path) -> bool:
    """By content: a protocol of 2 or more at its beginning, an archive with pickles (torch.save), or a program of
    pickle's that names or calls something (protocols 0 and 1)."""
    with file.open("rb") as content:
        start = content.read(4)
    if start[:1] == b"\x80" and len(start) > 1 and 2 <= start[1] <= 5:
        return True
    if start == b"PK\x03\x04":
        return zipfile.is_zipfile(file) and any(n.endswith(".pkl") for n in zipfile.ZipFile(file).namelist())
    if file.stat().st_size > _LARGEST_TEXT:
        return False
    seen = set()
    try:
        with file.open("rb") as content:
            for opcode, _, _ in pickletools.genops(content):
                seen.add(opcode.name)
    except (ValueError, IndexError, OverflowError, EOFError):
        return False
    return bool(seen & _CALLS)
