"""The registry's operations: add, list, show, promote, roll back, verify, and get a version out again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tafkir.errors import RegistryError
from tafkir.registry.admission import admit, admitted_files
from tafkir.registry.signing import PrivateKey, PublicKey
from tafkir.registry.store import CHUNK_BYTES, Store
from tafkir.registry.versions import FileEntry, Move, Version, kept_by

__all__ = ["MIN_KEPT", "PRODUCTION", "Registry"]

MIN_KEPT = 0.98
PRODUCTION = "production"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.IGNORECASE)
Step = Callable[[str, int], None]


class Registry:
    """A registry of models.

    Args:
        url: a folder, or what fsspec opens.
        key: signs what is written; None leaves it unsigned.
        trusted: whose signature everything that is read must carry; None asks for none.
    """

    def __init__(self, url: str, *, key: PrivateKey | None = None, trusted: PublicKey | None = None) -> None:
        self._store, self._key, self._trusted = Store(url), key, trusted

    # ---- adding -----------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        folder: Path,
        *,
        parent: str | None = None,
        recipe: Path | None = None,
        report: Path | None = None,
        step: Step = lambda file, size: None,
    ) -> Version:
        """Take a checkpoint folder in as the next version.

        Files that are there already, of whatever version, are not copied again. The version is there when all of its
        files are: a kill leaves nothing of it to be seen.

        Args:
            name: of the model; letters, digits, `.`, `_`, `-`.
            folder: safetensors, config, tokenizer.
            parent: NAME or NAME@VERSION of what it was made from.
            recipe: TOML or JSON that it was made by; else what the checkpoint's own manifest says.
            report: JSON of `tafkir verify --json`.
            step: told of every file and its size before it is copied.

        Raises:
            RegistryError: a file is not let in (pickles are not), or the parent is not there.
        """
        _check_name(name)
        files = admitted_files(folder)
        if parent is not None:
            above = self.version(parent)
            parent = f"{above.name}@{above.version}"
        said = _read_object(folder / "config.json")
        facts: dict[str, Any] = {
            "architecture": str((said.get("architectures") or [""])[0]),
            "quantized": "quantization_config" in said,
            "recipe": _recipe_of(folder, recipe),
            "parent": parent,
            "report": self._put_report(report) if report else None,
        }
        self._store.sweep()
        entries = {}
        for file in files:
            size = (folder / file).stat().st_size
            step(str(file), size)
            entries[file.as_posix()] = entry = FileEntry(sha256=_hash_of(folder / file), size=size)
            if not self._store.has_blob(entry.sha256, size):
                self._store.put_blob(folder / file, entry.sha256)
        number = max(self._numbers(name), default=0) + 1
        while True:
            version = Version(name=name, version=number, created=_now(), files=entries, **facts)
            if self._store.create(_version_key(name, number), self._signed(version)):
                return version
            number += 1  # somebody else was faster

    def _put_report(self, report: Path) -> FileEntry:
        admit(report)
        content = report.read_bytes()
        try:
            kept_by(json.loads(content))
        except ValueError as error:
            raise RegistryError(
                str(error), where=str(report), expected="what `tafkir verify SRC DST --task ... --json` prints"
            ) from error
        return FileEntry(sha256=self._store.put_bytes(content), size=len(content))

    # ---- reading ----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The models, in order."""
        return self._store.names("models")

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first."""
        return [self._read_version(name, number) for number in self._numbers(name)]

    def version(self, wanted: str) -> Version:
        """NAME@VERSION, NAME@CHANNEL, or NAME for the newest.

        Raises:
            RegistryError: it is not there, or its signature is not the trusted one.
        """
        name, _, which = wanted.partition("@")
        _check_name(name)
        numbers = self._numbers(name)
        if not numbers:
            known = ", ".join(self.names()) or "none"
            raise RegistryError(f"no model {name!r}", where=self._store.url, expected=f"one of {known}")
        if not which:
            number = numbers[-1]
        elif which.isdecimal():
            number = int(which)
        else:
            served = self.served(name, which)
            if served is None:
                raise RegistryError(f"nothing is promoted to {which!r}", where=name, fix="tafkir registry promote")
            number = served
        if number not in numbers:
            raise RegistryError(f"no version {number}", where=name, expected=f"1 to {numbers[-1]}")
        return self._read_version(name, number)

    def channels(self, name: str) -> dict[str, int]:
        """Which version each channel of a model serves."""
        served = {channel: self.served(name, channel) for channel in self._store.names(f"models/{name}/channels")}
        return {channel: number for channel, number in served.items() if number is not None}

    def served(self, name: str, channel: str) -> int | None:
        """The version that a channel serves; None where none was promoted."""
        moves = self.moves(name, channel)
        return moves[-1].version if moves else None

    def moves(self, name: str, channel: str) -> list[Move]:
        """The channel's history, oldest first."""
        folder = f"models/{name}/channels/{channel}"
        return [self._opened(f"{folder}/{file}", Move) for file in self._store.names(folder)]

    def report(self, version: Version) -> Any:
        """The report that was added with a version; None where none was."""
        if version.report is None:
            return None
        with self._store.open_blob(version.report.sha256) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != version.report.sha256:
            raise RegistryError("the report was changed", where=_label(version), fix="add the version again")
        return json.loads(content)

    # ---- promoting --------------------------------------------------------------------------------------------------

    def promote(self, wanted: str, *, channel: str = PRODUCTION, min_kept: float = MIN_KEPT) -> Move:
        """Let a channel serve a version, if its report shows that it keeps enough.

        Args:
            wanted: as in `version`.
            channel: such as "production".
            min_kept: the least share of the score before that every task of the report must keep. A version that is not
                quantized needs no report.

        Raises:
            RegistryError: there is no report, or a task keeps less; the message gives the figure.
        """
        version = self.version(wanted)
        _check_name(channel)
        kept = self._gate(version, min_kept)
        return self._move(version, channel, "promote", kept, min_kept)

    def _gate(self, version: Version, min_kept: float) -> dict[str, float]:
        report = self.report(version)
        if report is None:
            if not version.quantized:
                return {}
            raise RegistryError(
                "a quantized model needs a retention report to be promoted",
                where=_label(version),
                fix="tafkir verify SRC DST --task ... --json > report.json, then add the version with --report",
            )
        found = kept_by(report)
        for task, kept in sorted(found.items()):
            if kept is None:
                raise RegistryError(f"the source solves nothing of {task}, so nothing is shown", where=_label(version))
            if kept.value < min_kept:
                high = "any" if kept.high is None else f"{kept.high:.2%}"
                raise RegistryError(
                    f"{task} keeps {kept.value:.2%} ({kept.low:.2%} to {high})",
                    where=_label(version),
                    expected=f"at least {min_kept:.2%}",
                    fix="quantize less of it or train it quantized; what is served stays as it was",
                )
        return {task: kept.value for task, kept in found.items() if kept is not None}

    def rollback(self, name: str, *, channel: str = PRODUCTION) -> Move:
        """Let a channel serve what it served before its last promotion.

        Raises:
            RegistryError: it served nothing before.
        """
        standing: list[int] = []
        for move in self.moves(name, channel):
            if move.action == "promote":
                standing.append(move.version)
            else:
                standing.pop()
        if len(standing) < 2:
            raise RegistryError(f"{channel!r} served nothing before", where=name, fix="promote another version")
        return self._move(self._read_version(name, standing[-2]), channel, "rollback", {}, None)

    def _move(
        self, version: Version, channel: str, action: Any, kept: Mapping[str, float], min_kept: float | None
    ) -> Move:
        folder = f"models/{version.name}/channels/{channel}"
        move = Move(
            name=version.name, channel=channel, version=version.version, action=action, at=_now(), kept=dict(kept),
            min_kept=min_kept if kept else None,
        )  # fmt: skip
        number = len(self._store.names(folder)) + 1
        if not self._store.create(f"{folder}/{number:06d}.json", self._signed(move)):
            raise RegistryError("somebody else moved the channel at the same time", where=f"{version.name}: {channel}")
        return move

    # ---- checking and getting out -----------------------------------------------------------------------------------

    def verify(self, version: Version, step: Step = lambda file, size: None) -> None:
        """Read every byte of a version, and compare it with what was added; its signature was checked by `version`.

        Raises:
            RegistryError: a blob is missing or was changed; the message names the file.
        """
        files = dict(version.files)
        if version.report is not None:
            files["the report"] = version.report
        for name, entry in files.items():
            step(name, entry.size)
            found = self._store.hash_blob(entry.sha256)
            if found != entry.sha256:
                what = "its bytes are missing" if found is None else "its bytes were changed"
                raise RegistryError(what, where=f"{_label(version)}: {name}", fix="add the checkpoint again")

    def get(self, version: Version, folder: Path) -> None:
        """Write a version's files to a new folder, each checked against its hash.

        Raises:
            RegistryError: the folder is there already, or a blob is missing or was changed; nothing is left then.
        """
        if folder.exists():
            raise RegistryError("is there already", where=str(folder), fix="choose another folder")
        staging = folder.parent / f".{folder.name}.getting"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            for name, entry in version.files.items():
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with self._store.open_blob(entry.sha256) as source, target.open("wb") as out:
                    while chunk := source.read(CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                if digest.hexdigest() != entry.sha256:
                    raise RegistryError("its bytes were changed", where=f"{_label(version)}: {name}")
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def blob(self, entry: FileEntry) -> Path | None:
        """Where a file of a version lies on this machine; None in an object store."""
        return self._store.local_path(entry.sha256)

    # ---- records ----------------------------------------------------------------------------------------------------

    def _numbers(self, name: str) -> list[int]:
        files = self._store.names(f"models/{name}/versions")
        return [int(file.removesuffix(".json")) for file in files if file.removesuffix(".json").isdecimal()]

    def _read_version(self, name: str, number: int) -> Version:
        version: Version = self._opened(_version_key(name, number), Version)
        return version

    def _signed(self, record: Version | Move) -> dict[str, Any]:
        content = record.model_dump(mode="json")
        return {"record": content, "signature": self._key.sign(content) if self._key else None}

    def _opened(self, key: str, kind: Any) -> Any:
        where = f"{self._store.url}/{key}"
        envelope = self._store.read(key)
        try:
            content, signature = envelope["record"], envelope.get("signature")
            record = kind.model_validate(content)
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise RegistryError("the record is damaged", where=where, fix="restore it from a copy") from error
        if self._trusted is not None:
            self._trusted.check(content, signature, where)
        return record


def _version_key(name: str, number: int) -> str:
    return f"models/{name}/versions/{number:06d}.json"


def _label(version: Version) -> str:
    return f"{version.name}@{version.version}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r} is no name", expected="letters, digits, '.', '_', '-', a letter or digit first")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _hash_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for chunk in _chunks(content):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(content: Any) -> Iterator[bytes]:
    while chunk := content.read(CHUNK_BYTES):
        yield chunk


def _read_object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _recipe_of(folder: Path, recipe: Path | None) -> dict[str, Any]:
    if recipe is None:
        return dict(_read_object(folder / "tafkir.json").get("lineage") or {})
    import tomllib

    try:
        content = recipe.read_text(encoding="utf-8")
        found = json.loads(content) if recipe.suffix == ".json" else tomllib.loads(content)
    except (OSError, ValueError) as error:
        raise RegistryError(f"cannot read the recipe ({error})", where=str(recipe), expected="TOML or JSON") from error
    if not isinstance(found, dict):
        raise RegistryError("not a table", where=str(recipe), expected="a recipe")
    plain: dict[str, Any] = _plain(found)
    return plain


def _plain(value: Any) -> Any:
    """TOML's dates as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
