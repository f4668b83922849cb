"""Manifests as YAML: maps, lists, numbers and words, scripts as literal blocks; any YAML parser reads them back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render_documents", "render_yaml"]

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
# Words that some parser takes for a truth value or nothing.
_RESERVED = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


def render_documents(documents: Sequence[Mapping[str, Any]]) -> str:
    """Several documents, one after the other."""
    return "---\n".join(map(render_yaml, documents))


def render_yaml(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """One document of maps (with plain words for keys), lists, strings, numbers and truth values."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _entry(f"{_scalar(key)}:", item)
        return lines
    for item in value:
        inner = _lines(item) if _nested(item) else _entry("", item)
        lines += [f"- {inner[0].strip() if not _nested(item) else inner[0]}", *(f"  {line}" for line in inner[1:])]
    return lines


def _entry(head: str, item: Any) -> list[str]:
    if _nested(item):
        deeper = _lines(item)
        return [head, *(f"  {line}" for line in deeper)]
    if isinstance(item, str) and "\n" in item:
        mark = "|" if item.endswith("\n") else "|-"
        return [f"{head} {mark}", *(f"  {line}" if line else "" for line in item.removesuffix("\n").split("\n"))]
    return [f"{head} {_scalar(item)}"]


def _nested(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple) and len(item) > 0


def _scalar(item: Any) -> str:
    plain = isinstance(item, str) and _PLAIN.fullmatch(item) and item.lower() not in _RESERVED
    return str(item) if plain else json.dumps(item)
