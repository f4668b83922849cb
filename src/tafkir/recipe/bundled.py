"""Finds what ships with the package: recipes, base checkpoints and solvers of puzzles, by name or by path."""

from __future__ import annotations

import difflib
from pathlib import Path

import tafkir
from tafkir.errors import CheckpointError, RecipeError

__all__ = [
    "bundled_checkpoints",
    "bundled_fragments",
    "bundled_recipes",
    "bundled_solvers",
    "find_checkpoint",
    "find_recipe",
]

_PACKAGE = Path(tafkir.__file__).resolve().parent


def _recipes_dir() -> Path:
    # A wheel carries recipes/ inside the package; a source tree keeps it at the top, where people look for it.
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parents[1] / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(_recipes_dir().glob("*.toml"))}


def bundled_fragments() -> dict[str, Path]:
    """Parts of recipes that ship with the package, by name: tables to lay under or over a recipe with a model."""
    return {path.stem: path for path in sorted((_recipes_dir() / "fragments").glob("*.toml"))}


def bundled_checkpoints() -> dict[str, Path]:
    """Checkpoints of language models that ship with the package, by name."""
    return _folders("checkpoints")


def bundled_solvers() -> dict[str, Path]:
    """Checkpoints of recursive models that ship with the package, by name."""
    return _folders("solvers")


def _folders(place: str) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted((_PACKAGE / place).glob("*/config.json"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe that is given as a path or as the name of a bundled one, or of a bundled fragment.

    Raises:
        RecipeError: there is none; the message names the nearest bundled recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipes = bundled_recipes() | bundled_fragments()
    if path.name == str(name) and str(name) in recipes:
        return recipes[str(name)]
    if path.is_dir():
        raise RecipeError("is a directory, not a recipe file", where=str(name), fix="name a .toml file")
    raise RecipeError("no such recipe", where=str(name), fix=_suggest(path.stem, list(recipes), "tafkir recipe ls"))


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint, of either kind, that is given as a path or as the name of a bundled one.

    Raises:
        CheckpointError: there is none; the message names the nearest bundled checkpoint.
    """
    path = Path(name)
    if path.is_dir():
        return path
    checkpoints = bundled_checkpoints() | bundled_solvers()
    if str(name) in checkpoints:
        return checkpoints[str(name)]
    if path.exists():
        raise CheckpointError("is a file, not a checkpoint folder", where=str(name))
    raise CheckpointError("no such checkpoint", where=str(name), fix=_suggest(path.name, list(checkpoints), None))


def _suggest(name: str, known: list[str], listing: str | None) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean the bundled {near[0]!r}?"
    if listing:
        return f"`{listing}` lists the bundled ones"
    return f"the bundled ones are {', '.join(known)}" if known else "give the path of a checkpoint folder"
