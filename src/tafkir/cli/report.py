"""`tafkir report RUN`: writes the report of a run anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(run: Annotated[Path, typer.Argument(help="Run directory, such as runs/wordmath-tiny.")]) -> None:
    """Write the report of a run anew, finished or not."""
    from tafkir.cli.pipeline import stage_function
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.stage import StageContext
    from tafkir.runlog.rundir import RunDir

    directory = RunDir.open(run)
    recipe = load_recipe([directory.recipe_path]).recipe
    stage_function("report")(StageContext(recipe, directory, directory.stage("report"), None, recipe.seed))
    print(directory.report_html)
