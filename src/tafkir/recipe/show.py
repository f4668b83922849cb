"""Writes a recipe as TOML, with a comment beside each value, and compares two of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tafkir.recipe.load import flatten
from tafkir.recipe.schema import Recipe

__all__ = ["Difference", "diff_recipes", "dump_toml"]

_MAX_ALIGNED = 48


@dataclass(frozen=True, slots=True)
class Difference:
    """One value in which two recipes differ, as TOML; None where a recipe does not have it."""

    path: str
    left: str | None
    right: str | None


def dump_toml(recipe: Recipe, comments: Mapping[str, str] | None = None) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal recipe.

    Args:
        recipe: what to write; keys without a value are left out.
        comments: a remark by dotted path, such as the value's origin or its meaning.
    """
    return "\n".join(_table_lines(recipe.model_dump(), "", comments or {})).strip() + "\n"


def diff_recipes(left: Recipe, right: Recipe) -> list[Difference]:
    """The values in which two recipes differ, in the order of the schema."""
    a, b = flatten(left), flatten(right)
    paths = [*a, *(path for path in b if path not in a)]
    return [Difference(path, _maybe(a.get(path)), _maybe(b.get(path))) for path in paths if a.get(path) != b.get(path)]


def _maybe(value: Any) -> str | None:
    return None if value is None else _value(value)


def _table_lines(tree: Mapping[str, Any], prefix: str, comments: Mapping[str, str]) -> list[str]:
    plain = {key: value for key, value in tree.items() if value is not None and not isinstance(value, Mapping)}
    pairs = {key: f"{key} = {_value(value)}" for key, value in plain.items()}
    width = max((len(text) for text in pairs.values() if len(text) <= _MAX_ALIGNED), default=0)
    lines = ["", f"[{prefix.rstrip('.')}]"] if prefix else []
    for key, text in pairs.items():
        comment = comments.get(prefix + key)
        lines.append(f"{text:<{width}}  # {comment}" if comment else text)
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += _table_lines(value, f"{prefix}{key}.", comments)
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_value(item)}' for key, item in value.items() if item is not None)} }}"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)
