"""`tafkir report RUN`: writes the report of a run anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]

_logger = logging.getLogger(__name__)


def report(run: Annotated[Path, typer.Argument(help="Run directory, such as runs/wordmath-tiny.")]) -> None:
    """Write the report of a run anew, finished or not, by whichever version of Tafkir it was made."""
    from tafkir.report.stage import write_report
    from tafkir.runlog.rundir import RunDir

    directory = RunDir.open(run)
    chains = _sample_chains(directory.recipe_path)
    write_report(directory) if chains is None else write_report(directory, chains)
    print(directory.report_html)


def _sample_chains(path: Path) -> int | None:
    """How many chains the run's recipe wants to see; None where it does not say, or says it in another version."""
    from tafkir.errors import RecipeError
    from tafkir.recipe.load import load_recipe

    if not path.exists():
        return None
    try:
        wanted = load_recipe([path]).recipe.report
    except RecipeError as error:
        place = error.where or path
        _logger.warning("%s: %s; this version shows the recipe as it stands, and cannot run it", place, error.what)
        return None
    return wanted.sample_chains if wanted else None
