"""`tafkir report RUN`: writes the report of a run, or of an evaluation, anew."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tafkir.runlog.rundir import RunDir

__all__ = ["report"]

_logger = logging.getLogger(__name__)


class Language(StrEnum):
    """Of an evaluation's report."""

    EN = "en"
    AR = "ar"


def report(
    run: Annotated[
        Path, typer.Argument(help="Run directory, such as runs/wordmath-tiny, or results of `tafkir eval --tasks`.")
    ],
    language: Annotated[Language, typer.Option(help="ar: of a run, what it scored, kept and costs.")] = Language.EN,
) -> None:
    """Write the report of a run anew, finished or not, by whichever version of Tafkir it was made.

    That of an evaluation has the scores, what each model keeps of the first one's, and what answers cost; so has the
    Arabic page of a run (report.ar.html), of its stages.
    """
    from tafkir.report.stage import write_report
    from tafkir.runlog.rundir import RunDir

    directory = RunDir.open(run)
    if (directory.path / "samples.jsonl").is_file():
        _write_evaluation(directory, language.value)
        print(directory.report_html)
        return
    if language is Language.AR:
        print(_write_stages(directory, language.value))
        return
    chains = _sample_chains(directory.recipe_path)
    write_report(directory) if chains is None else write_report(directory, chains)
    print(directory.report_html)


def _write_evaluation(run: RunDir, language: str) -> None:
    """Scores, comparison with the first model, and card, from the results file alone."""
    from tafkir.eval.compare import compare_sides
    from tafkir.eval.results_card import results_card
    from tafkir.eval.samples import load_samples
    from tafkir.eval.sides import load_sides
    from tafkir.eval.table import score_samples
    from tafkir.report.evaluation import render_evaluation
    from tafkir.runlog.atomic import write_text
    from tafkir.tasks.catalog import list_tasks

    samples, sides = load_samples(run.path), load_sides([run.path])
    metrics = {card.name: card.metric for card in list_tasks()}
    compared = compare_sides(sides, common=True, num_flips=0, metrics=metrics) if len(sides) > 1 else None
    data = {
        "name": run.path.resolve().name,
        "scores": score_samples(samples, metrics),
        "comparison": compared.to_dict() if compared else None,
        "card": results_card(samples),
    }
    write_text(run.report_html, render_evaluation(data, language))


def _write_stages(run: RunDir, language: str) -> Path:
    """What a run's stages scored, keep of the first one's score, and cost, each stage as a model."""
    from tafkir.eval.compare import compare_sides
    from tafkir.eval.sides import load_stages
    from tafkir.eval.table import score_samples
    from tafkir.report.collect import collect
    from tafkir.report.evaluation import render_evaluation
    from tafkir.report.run_card import run_card
    from tafkir.runlog.atomic import write_text

    sides, result = load_stages(run.path)
    compared = compare_sides(sides, num_flips=0) if len(sides) > 1 else None
    data = {
        "name": run.path.resolve().name,
        "scores": score_samples(sample for side in sides for own in side.answers.values() for sample in own),
        "comparison": compared.to_dict() if compared else None,
        "card": run_card(run, result, collect(run, num_chains=0).recipe),
    }
    page = run.report_html.with_suffix(f".{language}.html")
    write_text(page, render_evaluation(data, language))
    return page


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
