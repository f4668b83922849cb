"""`tafkir compare RUN RUN`: what a change does to the scores, problem by problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare"]


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories with an evaluation.")],
    stage: Annotated[str | None, typer.Option(help="Compare only this stage.")] = None,
    pool: Annotated[
        bool, typer.Option("--pool", help="Pool the change from sft to rlvr over the runs, such as several seeds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the scores of two runs, problem by problem.

    With --pool, any number of runs of one recipe with different seeds is pooled instead.
    """
    from tafkir.errors import RecipeError
    from tafkir.eval.compare import compare_runs, pool_runs

    if not pool and len(runs) != 2:
        raise RecipeError(f"{len(runs)} runs given", where="compare", expected="two, or any number with --pool")
    compared = pool_runs(runs) if pool else compare_runs(*runs, stage=stage)
    print(json.dumps(compared.to_dict(), indent=2) if as_json else "\n".join(compared.lines()))
