"""`tafkir eval MODEL... --tasks a,b`: published tasks and one's own, by checkpoints and endpoints alike."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tafkir.errors import RecipeError, TafkirError

if TYPE_CHECKING:
    from tafkir.eval.answers import Answerer
    from tafkir.eval.endpoint import EndpointOptions
    from tafkir.eval.harness import Budget, EvalSettings, Evaluation
    from tafkir.tasks.catalog import EvalTask

__all__ = ["Ending", "Models", "evaluate_tasks", "load_tasks", "show_tasks"]

_MAX_BATCH = 256


@dataclass(frozen=True, slots=True)
class Models:
    """How models are reached."""

    endpoint: EndpointOptions
    api_key_env: str
    kv_cache: Literal["auto", "fp8", "nvfp4"]
    stops_early: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """What happens when the answers are there."""

    curve: Sequence[int]
    fail_on_error: bool
    as_json: bool


def show_tasks(as_json: bool) -> None:
    """Print the cards of all tasks."""
    from dataclasses import asdict

    from tafkir.tasks.catalog import list_tasks

    cards = list_tasks()
    if as_json:
        print(json.dumps([asdict(card) for card in cards], indent=2, ensure_ascii=False))
        return
    width = max(len(card.name) for card in cards)
    for card in cards:
        size = f"{card.num_items:,}" if card.num_items else "?"
        own = card.sampling
        data = "shipped" if card.shipped else "--data"
        sampled = f"{own.samples} x t={own.temperature:g}" if own.temperature else "greedy"
        print(
            f"{card.name:<{width}}  {size:>6}  {card.language:<5} {card.metric:<10} {sampled:<12} "
            f"{own.max_tokens:>6,} tokens  {data:<8} {card.title}"
        )
    missing = [card for card in cards if not card.shipped]
    if missing:
        print("\nNot in the package:")
        for card in missing:
            print(f"  {card.name}: {card.how_to_get}")


def load_tasks(names: str, data: Sequence[str], *, question_only: bool = False) -> list[EvalTask]:
    """The tasks of a list with commas.

    Args:
        data: `NAME=PATH`, or a PATH for every task whose data is not in the package, and for the only task.
        question_only: without the published instructions.

    Raises:
        RecipeError: no task is named, or data is given for one that is not.
        DataError: see `load_task`.
    """
    from tafkir.tasks.catalog import QuestionOnly, list_tasks, load_task

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise RecipeError("no task is named", where="--tasks", fix="see `tafkir eval --list`")
    paths: dict[str, Path] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if equals and not Path(given).exists():
            if name not in wanted:
                raise RecipeError(f"data for {name!r}", where="--data", expected=f"one of {', '.join(wanted)}")
            paths[name] = Path(path)
        else:
            shipped = {card.name for card in list_tasks() if card.shipped} if len(wanted) > 1 else ()
            own = [name for name in wanted if name not in shipped]
            paths = {name: Path(given) for name in own} | paths
    tasks = [load_task(name, paths.get(name)) for name in wanted]
    return [QuestionOnly(task) for task in tasks] if question_only else tasks


def evaluate_tasks(
    models: Sequence[str],
    tasks: Sequence[EvalTask],
    settings: EvalSettings,
    budget: Budget,
    reach: Models,
    ending: Ending,
    out: Path,
) -> None:
    """Evaluate, write `samples.jsonl` and `summary.json` below `out`, and print the table.

    Raises:
        RecipeError: there is no model, or `ending.fail_on_error` and an answer failed.
    """
    from tafkir.eval.harness import evaluate_models
    from tafkir.eval.samples import samples_file
    from tafkir.eval.table import budget_curve, render_scores, score_samples
    from tafkir.runlog.atomic import write_json, write_text
    from tafkir.runlog.rundir import RunDir

    if not models:
        raise RecipeError("no model is named", where="eval", expected="a checkpoint, a run, or http://host/v1#model")
    run = RunDir.create(out)
    with run.lock():
        answerers = [_open(model, reach) for model in models]
        done = evaluate_models(answerers, tasks, settings, samples_file(run.path), budget=budget)
        rows = score_samples(done.samples, {task.name: task.card.metric for task in tasks})
        summary = _summary(done, rows, budget)
        if ending.curve:
            from tafkir.report.budgets import render_budget_curve

            summary["curve"] = budget_curve(done.samples, {task.name: task for task in tasks}, ending.curve)
            write_text(run.path / "curve.html", render_budget_curve(summary["curve"]))
        write_json(run.path / "summary.json", summary)
    if ending.as_json:
        print(json.dumps({"out": str(run.path), **summary}, indent=2, ensure_ascii=False))
    else:
        print(render_scores(rows))
        _print_rest(summary, samples_file(run.path))
    failed = sum(sample.failed for sample in done.samples)
    if ending.fail_on_error and failed:
        raise TafkirError(
            f"{failed:,} of {len(done.samples):,} answers failed",
            where=str(samples_file(run.path)),
            fix="run the same command again: it asks for those alone",
        )


def _summary(done: Evaluation, rows: list[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    for row in rows:
        row["settled_after"] = done.settled.get((row["model"], row["task"]))
    return {
        "scores": rows,
        "wanted": done.wanted,
        "answered": len(done.samples),
        "asked_now": done.asked,
        "retries": done.retries,
        "resent": done.resent,
        "stopped": done.stopped,
        "seconds": round(done.seconds, 2),
        "prompt_tokens_now": budget.prompt_tokens,
        "tokens_now": budget.tokens,
        "cost_now": budget.cost if any(budget.prices) else None,
        "sandbox": sorted({sample.sandbox for sample in done.samples} - {""}),
    }


def _print_rest(summary: dict[str, Any], path: Path) -> None:
    for row in summary["scores"]:
        if row["settled_after"]:
            print(f"{row['model']} on {row['task']} is settled after {row['settled_after']} answers an item")
    if summary["stopped"]:
        print(f"Stopped: {summary['stopped']}. {summary['answered']:,} of {summary['wanted']:,} answers are there.")
    cost = f", cost {summary['cost_now']:.4g}" if summary["cost_now"] is not None else ""
    print(
        f"{summary['asked_now']:,} answers in {summary['seconds']:.1f} s, {summary['tokens_now']:,} tokens"
        f"{cost}, {summary['retries']:,} retries"
    )
    if summary["resent"]:
        print(f"{summary['resent']:,} requests were on their way when an earlier run was killed, and were sent again")
    for row in summary.get("curve", ()):
        found = row["accuracy"]
        score = f"{100 * found['value']:5.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" if found else "-"
        print(f"{row['model']} on {row['task']} at {row['budget']:,} tokens: {score}, {row['cut']:.1%} cut")
    if summary["sandbox"]:
        print(f"Programs ran in the tier {' and '.join(summary['sandbox'])}")
    print(f"Answers: {path}")


def _open(given: str, reach: Models) -> Answerer:
    """A model from `[NAME=]MODEL`."""
    label, equals, place = given.partition("=")
    if not equals or "/" in label or Path(given).exists():
        label, place = "", given
    if place.startswith(("http://", "https://")):
        from tafkir.eval.endpoint import EndpointAnswers

        key = os.environ.get(reach.api_key_env)
        return EndpointAnswers(place, name=label or None, api_key=key, options=reach.endpoint)
    return _open_checkpoint(label, place, reach)


def _open_checkpoint(label: str, place: str, reach: Models) -> Answerer:
    from tafkir.cli.completer import build_completer, checkpoint_of
    from tafkir.eval.checkpoint_answers import CheckpointAnswers
    from tafkir.recipe.hf_config import config_from_hf
    from tafkir.runlog.atomic import read_json

    folder = checkpoint_of(place)
    config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    return CheckpointAnswers(
        label or _name_of(folder),
        folder,
        context=config.max_position_embeddings,
        build_completer=lambda: build_completer(folder, kv_cache=reach.kv_cache),
        settings=reach.kv_cache,
        chunk=_MAX_BATCH if reach.stops_early else 8192,
    )


def _name_of(folder: Path) -> str:
    """`<folder>`, or `<run>-<stage>` for a checkpoint inside a run directory."""
    path = folder.resolve()
    if path.name == "checkpoint" and path.parent.parent.name == "stages":
        return f"{path.parents[2].name}-{path.parent.name.partition('-')[2]}"
    return path.name
