"""`tafkir eval CHECKPOINT`: scores on held-out problems, on puzzles, or on what is found in long texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tafkir.cli.serve import CacheNumbers

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, run directory, or bundled name.")],
    task: Annotated[
        str,
        typer.Option(
            help="problems (held-out ones), needle (numbers to be found in long texts), or puzzles, by recursive and "
            "language models alike: sudoku4, sudoku6, maze-small, ..., or a recipe file with [trm.puzzles]."
        ),
    ] = "problems",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set one value of the recipe `eval`, such as eval.samples=8."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.")] = None,
    runs_dir: Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")] = Path(
        "runs"
    ),
    kv_cache: Annotated[
        CacheNumbers, typer.Option("--kv-cache", help="Numbers of the cache; for problems and needle.")
    ] = CacheNumbers.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="Needle: tokens of the texts: 4096,32768.", show_default="up to the context"),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Needle: where the number stands, 0 to 1.", show_default="0,0.25,0.5,0.75,1")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Needle: texts for each length and depth.", show_default="20")
    ] = None,
    needles: Annotated[
        int | None, typer.Option(min=1, help="Needle: named numbers in each text.", show_default="4")
    ] = None,
) -> None:
    """Score a checkpoint on held-out problems, on puzzles, or on what it finds in long texts.

    Answers, scores and a report go to a run directory of their own; a killed evaluation goes on from there.
    """
    of_needle = {"lengths": lengths, "depths": depths, "samples": samples, "num_needles": needles}
    given = {key: value for key, value in of_needle.items() if value is not None}
    if task == "needle":
        _refuse(overrides, "--set", "problems")
        _needle(checkpoint, given, name, runs_dir, as_json, kv_cache)
        return
    _refuse(given, ", ".join(f"--{key.removeprefix('num_')}" for key in given), "needle")
    if task != "problems":
        from tafkir.cli.card import show_card

        _refuse(overrides, "--set", "problems")
        _refuse(kv_cache is not CacheNumbers.AUTO, "--kv-cache", "problems")
        show_card([checkpoint], task, name=name, runs_dir=runs_dir, as_json=as_json)
    else:
        chosen = [] if kv_cache is CacheNumbers.AUTO else [f"eval.kv_cache={json.dumps(kv_cache.value)}"]
        _problems(checkpoint, [*chosen, *(overrides or [])], name, runs_dir, as_json)


def _refuse(given: object, options: str, task: str) -> None:
    """Refuse options of another task than the one asked for."""
    from tafkir.errors import RecipeError

    if given:
        raise RecipeError(f"{options} belongs to --task {task}", where="eval", fix=f"add --task {task}")


def _problems(checkpoint: str, overrides: list[str], name: str | None, runs_dir: Path, as_json: bool) -> None:
    """The recipe `eval`: held-out problems."""
    from tafkir.cli.completer import checkpoint_of
    from tafkir.cli.pipeline import run_recipe, select_stages
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.resolve import resolve_recipe
    from tafkir.runlog.rundir import RunDir

    folder = checkpoint_of(checkpoint)
    loaded = resolve_recipe(load_recipe(["eval"], [f"base={json.dumps(str(folder))}", *overrides]))
    run = RunDir(runs_dir / (name or _run_name("eval", folder)))
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["eval"]
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    for source, scores in result["stages"]["base"].items():
        print(f"{source:<8} {_scores_line(scores)}")
    for baseline, by_source in result["baselines"].items():
        print(f"baseline {baseline}: {_percent(by_source['all'])}")
    print(f"Report: {run.report_html}")


def _needle(
    checkpoint: str, given: dict[str, Any], name: str | None, runs_dir: Path, as_json: bool, kv_cache: CacheNumbers
) -> None:
    """Needles by length and depth; the answers in `eval/needle.jsonl`, the scores in `eval/needle.json`."""
    from tafkir.checkpoint.load import load_config
    from tafkir.cli.completer import checkpoint_of
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.eval.needle import NeedleSettings, evaluate_needles, render_needles
    from tafkir.runlog.atomic import write_json
    from tafkir.runlog.rundir import RunDir
    from tafkir.serve.loading import build_engine

    for key, kind in (("lengths", int), ("depths", float)):
        if key in given:
            given[key] = _numbers(given[key], kind, f"--{key}")
    folder = checkpoint_of(checkpoint)
    run = RunDir.create(runs_dir / (name or _run_name("needle", folder)))
    with run.lock():
        result = evaluate_needles(
            folder,
            NeedleSettings(**given),
            context=load_config(folder).max_position_embeddings,
            build_completer=lambda batch: build_engine(
                folder, Tokenizer.load(folder), None, max_batch=batch, kv_cache=kv_cache.value
            ),
            path=run.eval_dir / "needle.jsonl",
        )
        write_json(run.eval_dir / "needle.json", result)
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    print(render_needles(result))
    print(f"Answers: {run.eval_dir / 'needle.jsonl'}")


def _numbers(text: str, kind: type[int] | type[float], option: str) -> tuple[float, ...]:
    """The numbers of an option, separated by commas."""
    from tafkir.errors import RecipeError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{text!r} is no list of numbers", where=option, expected="numbers with commas") from error


def _run_name(kind: str, checkpoint: Path) -> str:
    """`<kind>-<folder>`, or `<kind>-<run>-<stage>` for a checkpoint inside a run directory."""
    path = checkpoint.resolve()
    if path.name == "checkpoint" and path.parent.parent.name == "stages":
        return f"{kind}-{path.parents[2].name}-{path.parent.name.partition('-')[2]}"
    return f"{kind}-{path.name}"


def _scores_line(scores: dict[str, Any]) -> str:
    """Greedy and sampled accuracy of one source."""
    parts = [f"{metric} {_percent(scores[metric])}" for metric in ("greedy", "average") if metric in scores]
    return f"{'   '.join(parts)}   ({scores['greedy']['num_problems']:,} problems)"


def _percent(estimate: dict[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
