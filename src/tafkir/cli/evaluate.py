"""`tafkir eval CHECKPOINT` and `tafkir compare RUN RUN`: scores on held-out problems, and what changed them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["compare", "evaluate"]


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, run directory, or bundled name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set one value of the recipe `eval`, such as eval.samples=8."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.")] = None,
    runs_dir: Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Score a checkpoint on the held-out problems.

    Answers, scores and a report go to a run directory of their own; a killed evaluation goes on from there.
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.cli.pipeline import run_recipe, select_stages
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.resolve import resolve_recipe
    from tafkir.runlog.rundir import RunDir

    folder = checkpoint_of(checkpoint)
    loaded = resolve_recipe(load_recipe(["eval"], [f"base={json.dumps(str(folder))}", *(overrides or [])]))
    run = RunDir(runs_dir / (name or _run_name(folder)))
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["eval"]
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    for source, scores in result["stages"]["base"].items():
        print(f"{source:<8} {_scores_line(scores)}")
    for baseline, by_source in result["baselines"].items():
        print(f"baseline {baseline}: {_percent(by_source['all'])}")
    print(f"Report: {run.report_html}")


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


def _run_name(checkpoint: Path) -> str:
    """`eval-<folder>`, or `eval-<run>-<stage>` for a checkpoint inside a run directory."""
    path = checkpoint.resolve()
    if path.name == "checkpoint" and path.parent.parent.name == "stages":
        return f"eval-{path.parents[2].name}-{path.parent.name.partition('-')[2]}"
    return f"eval-{path.name}"


def _scores_line(scores: dict[str, Any]) -> str:
    """Greedy and sampled accuracy of one source."""
    parts = [f"{metric} {_percent(scores[metric])}" for metric in ("greedy", "average") if metric in scores]
    return f"{'   '.join(parts)}   ({scores['greedy']['num_problems']:,} problems)"


def _percent(estimate: dict[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
