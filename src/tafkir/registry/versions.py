"""What a registry says of a version: its files by content, where it comes from, and the report that speaks for it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FileEntry", "Kept", "Move", "Version", "kept_by"]

_Sha256 = Field(pattern="^[0-9a-f]{64}$")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """One file; `sha256` is over its bytes, and names its blob."""

    sha256: str = _Sha256
    size: int = Field(ge=0)


class Version(_Record):
    """A version of a model.

    Attributes:
        name: of the model.
        version: 1, 2, ...
        created: when it was added, ISO 8601 in UTC.
        files: by their path in the checkpoint folder.
        architecture: of config.json; empty where it does not say.
        quantized: whether its config.json says so: then a promotion asks for a report.
        recipe: what it was made by: the resolved recipe, or what the checkpoint's manifest says of it.
        parent: NAME@VERSION of what it was made from.
        report: blob of the JSON of `tafkir verify --json`.
    """

    format_version: Literal[1] = 1
    name: str
    version: int = Field(ge=1)
    created: str
    files: dict[str, FileEntry]
    architecture: str = ""
    quantized: bool = False
    recipe: dict[str, Any] = Field(default_factory=dict)
    parent: str | None = None
    report: FileEntry | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


class Move(_Record):
    """A promotion or a rollback; the last one says which version a channel serves.

    Attributes:
        channel: such as "production".
        version: the version that is served from then on.
        action: what was asked for.
        at: when, ISO 8601 in UTC.
        kept: for each task of the report the share of the score that is kept.
        min_kept: what was asked of each.
    """

    format_version: Literal[1] = 1
    name: str
    channel: str
    version: int
    action: Literal["promote", "rollback"]
    at: str
    kept: dict[str, float] = Field(default_factory=dict)
    min_kept: float | None = None


class Kept(_Record):
    """What a report says of a task: the share of the score that is kept, and its 95 % interval."""

    value: float
    low: float
    high: float | None


def kept_by(report: Any) -> dict[str, Kept | None]:
    """Of the JSON of `tafkir verify --task ... --json`, what each task keeps; None where the source solves nothing.

    Raises:
        ValueError: it is another JSON, or no task was measured.
    """
    try:
        tasks = report["retention"]["tasks"]
        found = {str(task["task"]): task["retention"][task["metric"]] for task in tasks}
        kept = {
            name: None if one is None else Kept(value=one["value"], low=one["low"], high=one["high"])
            for name, one in found.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("no retention in the report") from error
    if not kept:
        raise ValueError("no task in the report")
    return kept
