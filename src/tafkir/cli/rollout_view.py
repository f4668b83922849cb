"""`tafkir rollouts RUN`: what was sampled in a step, coloured by how far the two engines disagree about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tafkir.errors import RunDirError

if TYPE_CHECKING:
    from rich.console import Console

    from tafkir.records import StageName
    from tafkir.runlog.rollouts import RolloutLog
    from tafkir.runlog.rundir import RunDir

__all__ = ["By", "rollouts"]

# The last one first: its rollouts are the newest.
_STAGES: tuple[StageName, ...] = ("rlhf", "rlvr")
_DEFAULT_COUNT = 5
_NUM_FURTHEST = 5
_PLAIN_RATIO = 1e-3

Row = dict[str, Any]


class By(StrEnum):
    """What makes a rollout worse than another: a low reward, a large mismatch, or a great length."""

    REWARD = "reward"
    MISMATCH = "mismatch"
    LENGTH = "length"


def rollouts(
    run: Annotated[Path, typer.Argument(help="Run directory, such as runs/wordmath-tiny.")],
    step: Annotated[int | None, typer.Option(help="Which step; the newest that is kept by default.")] = None,
    worst: Annotated[int | None, typer.Option(min=1, help="Show this many of the worst; 5 by default.")] = None,
    best: Annotated[int | None, typer.Option(min=1, help="Show this many of the best instead.")] = None,
    by: Annotated[By, typer.Option(help="Worst is what has the least reward, or most of the others.")] = By.REWARD,
    problem: Annotated[str | None, typer.Option(metavar="ID", help="Only the completions of this problem.")] = None,
    stage: Annotated[str | None, typer.Option(help="rlvr or rlhf; the last one that there is by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Show the rollouts of one step, coloured by probability ratio."""
    from tafkir.runlog.rundir import RunDir

    if worst is not None and best is not None:
        raise RunDirError("--worst and --best exclude each other", fix="give one of them")
    directory = RunDir.open(run)
    kind, log = _find_log(directory, stage)
    step = _find_step(log, step)
    rows = list(log.read(step))
    if problem is not None:
        rows = _of_problem(rows, problem, step)
    for row in rows:
        row |= _measure(row)
    count = best or worst or (_DEFAULT_COUNT if problem is None else len(rows))
    chosen = sorted(rows, key=_BADNESS[by], reverse=best is None)[:count]
    if as_json:
        print(json.dumps(chosen, ensure_ascii=False, indent=2))
    else:
        _show(directory, kind, step, chosen, len(rows))


def _find_log(run: RunDir, stage: str | None) -> tuple[StageName, RolloutLog]:
    from tafkir.runlog.rollouts import RolloutLog

    if stage is not None and stage not in _STAGES:
        raise RunDirError(f"stage {stage!r} samples nothing", where="--stage", expected=" or ".join(_STAGES))
    for kind in _STAGES:
        log = RolloutLog(run.stage(kind).rollouts_dir)
        if stage in (None, kind) and log.steps():
            return kind, log
    raise RunDirError(
        f"no rollouts of stage {stage} are kept" if stage else "no rollouts are kept",
        where=str(run.path),
        fix="let rlvr.keep_rollouts be other than none, and the stage make a step",
    )


def _find_step(log: RolloutLog, step: int | None) -> int:
    steps = log.steps()
    if step is None:
        return steps[-1]
    if step not in steps:
        nearest = min(steps, key=lambda each: abs(each - step))
        raise RunDirError(
            f"no rollouts of step {step} are kept",
            where=str(log.folder),
            expected=f"a step from {steps[0]} to {steps[-1]} ({len(steps)} kept)",
            fix=f"--step {nearest}; the recipe's keep_rollouts says how many stay",
        )
    return step


def _of_problem(rows: Sequence[Row], problem: str, step: int) -> list[Row]:
    found = [row for row in rows if row["id"] == problem]
    if found:
        return found
    from difflib import get_close_matches

    known = list(dict.fromkeys(row["id"] for row in rows))
    raise RunDirError(
        f"step {step} has no problem {problem!r}",
        where="--problem",
        expected=f"one of its {len(known)} problems",
        fix=f"did you mean {', '.join(get_close_matches(problem, known, 3, 0.0))}?",
    )


def _measure(row: Row) -> Row:
    """How far the engines disagree about a completion, in nats per token; None where it was not learned from."""
    from tafkir.cli.ratios import log_ratios

    known = [abs(x) for x in log_ratios(row["train_logprobs"], row["logprobs"]) if x is not None]
    return {
        "abs_logprob_diff_mean": sum(known) / len(known) if known else None,
        "abs_logprob_diff_max": max(known) if known else None,
    }


def _mismatch(row: Row) -> float:
    return row["abs_logprob_diff_mean"] or 0.0


_BADNESS: dict[By, Callable[[Row], tuple[float, float]]] = {
    By.REWARD: lambda row: (-row["reward"], _mismatch(row)),
    By.MISMATCH: lambda row: (_mismatch(row), -row["reward"]),
    By.LENGTH: lambda row: (len(row["token_ids"]), -row["reward"]),
}


def _show(run: RunDir, kind: StageName, step: int, rows: Sequence[Row], total: int) -> None:
    from rich.console import Console

    from tafkir.cli.ratios import colour_text, legend, log_ratios, whole_pieces
    from tafkir.data.tokenizer import Tokenizer

    token_bytes = Tokenizer.load(_tokenizer_folder(run, kind)).token_bytes
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{run.path.name} · {kind} · step {step} · {len(rows)} of {total} completions", markup=False)
    console.print(legend())
    for row in rows:
        console.print()
        _show_heading(console, row)
        ratios = log_ratios(row["train_logprobs"], row["logprobs"])
        console.print(colour_text(whole_pieces(row["token_ids"], ratios, row["masked"], token_bytes)))
        if furthest := _furthest(row, ratios, token_bytes):
            console.print(f"furthest from k = 1: {furthest}", markup=False, style="dim")


def _show_heading(console: Console, row: Row) -> None:
    facts = [f"reward {row['reward']:g}", f"advantage {row['advantage']:+.3g}", row["outcome"]]
    facts += [f"{len(row['token_ids'])} tokens", row["finish_reason"]]
    facts.append("weights of step " + ", ".join(f"{version} ({count} tokens)" for version, count in row["versions"]))
    if row["abs_logprob_diff_mean"] is None:
        facts.append("not learned from")
    else:
        facts.append(f"|Δ log p| mean {row['abs_logprob_diff_mean']:.2g}, max {row['abs_logprob_diff_max']:.2g}")
        facts.append(f"{len(row['masked'])} dropped")
    console.print(f"{row['id']} #{row['completion']}", style="bold", markup=False)
    console.print(" · ".join(facts), markup=False, style="dim")
    if row["reason"]:
        console.print(f"why: {row['reason']}", markup=False, style="dim")
    console.print(row["question"].strip(), markup=False, style="italic")


def _furthest(row: Row, ratios: Sequence[float | None], token_bytes: Callable[[int], bytes]) -> str:
    """The tokens with the largest |log k|: for terminals without colours, too."""
    known = [(abs(ratio), place, ratio) for place, ratio in enumerate(ratios) if ratio is not None]
    told = []
    for size, place, ratio in sorted(known, reverse=True)[:_NUM_FURTHEST]:
        if size >= _PLAIN_RATIO:
            text = token_bytes(row["token_ids"][place]).decode("utf-8", "replace")
            dropped = ", dropped" if place in row["masked"] else ""
            told.append(f"{text!r} (token {place}, k = {math.exp(ratio):.3g}{dropped})")
    return " ".join(told)


def _tokenizer_folder(run: RunDir, kind: StageName) -> Path:
    """Where the stage's tokenizer lies: in its checkpoint, or, while it runs, in the one that it started from."""
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.recipe.load import load_recipe
    from tafkir.records import STAGES

    for name in reversed(STAGES[: STAGES.index(kind) + 1]):
        folder = run.stage(name).checkpoint_dir
        if (folder / "tokenizer.json").exists():
            return folder
    base = load_recipe([run.recipe_path]).recipe.base
    if base is None:
        raise RunDirError("no checkpoint has a tokenizer", where=str(run.path), fix="use --json, which needs none")
    return find_checkpoint(base)
