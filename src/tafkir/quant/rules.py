"""Patterns for sets of tensors: the few shell patterns that match these names of a checkpoint, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from tafkir.recipe.quantize import FormatName

__all__ = ["exact_rules"]


def exact_rules(formats: Mapping[tuple[str, ...], FormatName], names: Sequence[str]) -> list[tuple[str, FormatName]]:
    """Rules that give each set of tensors its format, whatever their order.

    Args:
        formats: by set of names.
        names: all of the checkpoint.
    """
    return [(pattern, format) for members, format in formats.items() for pattern in _patterns(members, names)]


def _patterns(members: Sequence[str], names: Sequence[str]) -> list[str]:
    """One pattern where one matches exactly the members; else every name by itself."""
    wanted = set(members)
    start = _shared(members)
    end = _shared([name[len(start) :][::-1] for name in members])[::-1]
    middles = sorted({name[len(start) : len(name) - len(end)] for name in members})
    options = [f"{_plain(start)}*{_plain(end)}"] if len(members) > 1 else [_plain(members[0])]
    if len(middles) > 1 and all(len(middle) == 1 and middle.isalnum() for middle in middles):
        options.insert(0, f"{_plain(start)}[{''.join(middles)}]{_plain(end)}")
    for pattern in options:
        if {name for name in names if name.startswith(start) and fnmatchcase(name, pattern)} == wanted:
            return [pattern]
    return [_plain(name) for name in members]


def _shared(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _plain(text: str) -> str:
    """A name in which no character is special."""
    return text.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
