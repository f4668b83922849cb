"""`tafkir run RECIPE`: every stage of a recipe, or what they would cost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tafkir.records import POLICY_STAGES

if TYPE_CHECKING:
    from tafkir.recipe.load import LoadedRecipe
    from tafkir.records import StageName
    from tafkir.runlog.rundir import RunDir

__all__ = ["program_name", "run"]


def run(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or bundled names; later ones win.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set one value; nothing after = goes back to the default."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Do this one stage again.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all later ones again.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and an estimate of time and memory.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run directory instead of the recipe's.")] = None,
    runs_dir: Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,2", help="Run once with each seed, in folders of the run directory, with a report over all."
        ),
    ] = None,
) -> None:
    """Run a recipe; finished stages are skipped.

    A killed run goes on where it stopped when the same command is given again.
    """
    from tafkir.cli.seeds import parse_seeds, run_seeds
    from tafkir.recipe.load import load_recipe
    from tafkir.runlog.logging import is_main_rank
    from tafkir.runlog.rundir import RunDir

    given = overrides or []
    directory = RunDir(runs_dir / (name or load_recipe(recipes, given).recipe.name))
    wanted = parse_seeds(seeds) if seeds is not None else []
    if dry_run:
        if is_main_rank():
            _show_plan(_resolve(recipes, given, directory), directory, as_json)
            if wanted and not as_json:
                print(f"# That is one run; {len(wanted)} seeds take {len(wanted)} times as long.")
        return
    if wanted:

        def run_one(seed: int, place: RunDir) -> None:
            _run(recipes, [*given, f"seed={seed}"], place, only, start)

        run_seeds(wanted, directory.path, run_one, as_json=as_json)
        return
    results = _run(recipes, given, directory, only, start)
    if not is_main_rank():
        return
    if as_json:
        print(json.dumps({"run": str(directory.path), "stages": results}, indent=2))
    else:
        _show_end(directory, results)


def _resolve(recipes: list[str], overrides: list[str], directory: RunDir) -> LoadedRecipe:
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.resolve import resolve_recipe

    return resolve_recipe(load_recipe(recipes, overrides), **_earlier_choices(directory))


def _run(
    recipes: list[str], overrides: list[str], directory: RunDir, only: str | None, start: str | None
) -> dict[StageName, dict[str, Any]]:
    """Run the recipe in one directory."""
    from tafkir.cli.pipeline import run_recipe, select_stages

    loaded = _resolve(recipes, overrides, directory)
    return run_recipe(loaded, directory, select_stages(loaded.recipe, only=only, start=start))


def program_name() -> str:
    """How to call this program again from here: `tafkir`, or the path of it where it is not on the search path."""
    called = Path(sys.argv[0])
    if called.name != "tafkir":
        return f"{os.path.basename(sys.executable)} -m tafkir.cli.main"
    found = shutil.which("tafkir")
    if found and Path(found).resolve() == called.resolve():
        return "tafkir"
    return str(called.relative_to(Path.cwd()) if called.is_relative_to(Path.cwd()) else called)


def _earlier_choices(directory: RunDir) -> dict[str, Any]:
    """Threads, kernels and precision of an earlier part of this run: it goes on bit for bit on another machine."""
    from tafkir.errors import RecipeError
    from tafkir.recipe.load import load_recipe

    if not directory.recipe_path.exists():
        return {}
    try:
        earlier = load_recipe([directory.recipe_path]).recipe
    except RecipeError:
        # Written by another version: its stages are redone anyway.
        return {}
    precision = earlier.trm.precision if earlier.trm else None
    return {"threads": earlier.threads or None, "kernels": earlier.kernels, "precision": precision}


def _show_end(directory: RunDir, results: Mapping[StageName, dict[str, Any]]) -> None:
    if headline := results.get("report", {}).get("headline"):
        print(f"\n{headline}")
    print(f"\nRun directory:  {directory.path}")
    if directory.report_html.exists():
        print(f"Report:         {directory.report_html}")
    if directory.stage("trm").checkpoint_dir.is_dir():
        puzzles = "--arc TASKS.json" if "arc" in results.get("trm", {}) else "PUZZLE.txt"
        print(f"Solve with it:  {program_name()} solve {puzzles} --model {directory.path}")
        print(f"Puzzle page:    {program_name()} trm page {directory.path / 'page'} --model {directory.path}")
    if any(directory.stage(kind).checkpoint_dir.is_dir() for kind in POLICY_STAGES):
        print(f"Chat with it:   {program_name()} chat {directory.path}")
        print(f"Serve it:       {program_name()} serve {directory.path}")


def _show_plan(loaded: LoadedRecipe, directory: RunDir, as_json: bool) -> None:
    from tafkir.plan.estimate import ASSUMPTIONS, estimate_stages
    from tafkir.recipe.show import dump_toml
    from tafkir.runlog.progress import format_duration

    model = loaded.recipe.model
    estimates = estimate_stages(loaded.recipe)
    total_s = sum(estimate.seconds for estimate in estimates)
    if as_json:
        plan: dict[str, Any] = {
            "run": str(directory.path),
            "recipe": loaded.recipe.model_dump(mode="json"),
            "origins": dict(loaded.origins),
            "parameters": model.num_parameters(),
            "active_parameters": model.num_parameters(active=True),
            "stages": {
                e.kind: {"seconds": e.seconds, "flops": e.flops, "tokens": e.tokens, "memory_bytes": e.memory_bytes}
                for e in estimates
            },
            "seconds": total_s,
            "assumptions": ASSUMPTIONS,
        }
        print(json.dumps(plan, indent=2))
        return
    print(dump_toml(loaded.recipe, loaded.origins))
    print(f"# Run directory: {directory.path}")
    if loaded.recipe.trm is None:
        print(f"# Parameters: {model.num_parameters():,}, of which a token uses {model.num_parameters(active=True):,}")
    print(f"# {'stage':<10} {'tokens':>12} {'TFLOP':>8} {'time':>9} {'memory':>9}")
    for e in estimates:
        print(
            f"# {e.kind:<10} {e.tokens:>12,} {e.flops / 1e12:>8.1f} {format_duration(e.seconds):>9} "
            f"{e.memory_bytes / 2**20:>6,.0f} MB"
        )
    print(f"# {'in all':<10} {'':>12} {'':>8} {format_duration(total_s):>9}")
    print(f"# Assumed: {ASSUMPTIONS}.")
