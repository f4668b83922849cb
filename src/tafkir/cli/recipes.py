"""`tafkir recipe ls | show | check | diff | copy`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="List, show, check, compare and copy recipes.", no_args_is_help=True, rich_markup_mode=None)

Recipes = Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or bundled names.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value of the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List the recipes that ship with Tafkir, and the fragments to lay under or over one."""
    import tomllib

    from tafkir.recipe.bundled import bundled_fragments, bundled_recipes
    from tafkir.recipe.load import load_recipe

    recipes = {name: load_recipe([path]).recipe for name, path in bundled_recipes().items()}
    if as_json:
        print(json.dumps({name: recipe.description for name, recipe in recipes.items()}, indent=2))
        return
    width = max(map(len, recipes), default=0)
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.description}")
    for name, path in bundled_fragments().items():
        text = tomllib.loads(path.read_text(encoding="utf-8"))["description"]
        print(f"{name:<{width}}  {text} (a fragment: give it together with a recipe)")


@app.command("show")
def show(
    recipes: Recipes,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each key means instead of its origin.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the resolved recipe as TOML, with the origin of every value."""
    from tafkir.recipe.load import describe_keys, load_recipe
    from tafkir.recipe.resolve import resolve_recipe
    from tafkir.recipe.show import dump_toml

    loaded = resolve_recipe(load_recipe(recipes, overrides or []))
    if as_json:
        print(json.dumps({"recipe": loaded.recipe.model_dump(mode="json"), "origins": dict(loaded.origins)}, indent=2))
        return
    print(dump_toml(loaded.recipe, describe_keys() if explain else loaded.origins), end="")


@app.command("check")
def check(recipes: Recipes, overrides: Overrides = None) -> None:
    """Check a recipe and say what it would run, and what it might be better without."""
    from tafkir.recipe.advice import advise
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.recipe.load import load_recipe
    from tafkir.records import STAGES

    recipe = load_recipe(recipes, overrides or []).recipe
    if recipe.base:
        find_checkpoint(recipe.base)
    stages = [kind for kind in STAGES if getattr(recipe, kind) is not None]
    start = f"{recipe.base} → " if recipe.base else ""
    # A recursive model's size depends on its puzzles, which a check does not read.
    size = "" if recipe.trm is not None else f"; {recipe.model.num_parameters():,} parameters"
    print(f"{recipe.name}: valid; {start}{' → '.join(stages)}{size}")
    for line in advise(recipe):
        print(f"warning: {line}", file=sys.stderr)


@app.command("diff")
def diff(
    left: Annotated[str, typer.Argument(help="Recipe file or bundled name.")],
    right: Annotated[str, typer.Argument(help="Recipe file or bundled name.")],
    as_json: AsJson = False,
) -> None:
    """Show the values in which two recipes differ."""
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.show import diff_recipes

    differences = diff_recipes(load_recipe([left]).recipe, load_recipe([right]).recipe)
    if as_json:
        print(json.dumps([{"path": d.path, "left": d.left, "right": d.right} for d in differences], indent=2))
        return
    for difference in differences:
        print(f"{difference.path}: {difference.left or '(not set)'} → {difference.right or '(not set)'}")


@app.command("copy")
def copy(
    recipe: Annotated[str, typer.Argument(help="Name of a bundled recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File or folder to copy to; here if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a bundled recipe, to change it."""
    from tafkir.errors import RecipeError
    from tafkir.recipe.bundled import find_recipe
    from tafkir.runlog.atomic import write_bytes

    source = find_recipe(recipe)
    target = target or Path()
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise RecipeError("there is a file already", where=str(target), fix="give another name, or --force")
    write_bytes(target, source.read_bytes())
    print(target)
