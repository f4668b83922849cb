"""What `tafkir verify --task` measures: both checkpoints' answers to the same problems, in a run directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.eval.retention import RetentionSettings

__all__ = ["measure_tasks", "retention_lines"]

_MAX_BATCH = 256


def measure_tasks(
    tasks: list[str], before: Path, after: Path, settings: RetentionSettings, run_path: Path, *, served: bool
) -> dict[str, Any]:
    """Every task on both checkpoints; answers in the run directory's `eval`, the figures in its `retention.json`.

    Args:
        served: round the inputs of NVFP4 matrices, as engines that compute in four bits do.

    Returns:
        `min_retention`, `activations`, `run`, `tasks` (see `measure_retention`) and the worst of their verdicts.

    Raises:
        RecipeError: a task is not known, or named twice.
        RunDirError: another process writes this directory.
    """
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.errors import RecipeError
    from tafkir.eval.retention import Side, build_problems, measure_retention
    from tafkir.eval.run import checkpoint_fingerprint
    from tafkir.runlog.atomic import write_json
    from tafkir.runlog.rundir import RunDir

    if len(set(tasks)) != len(tasks):
        raise RecipeError("a task is named twice", where="--task")
    for task in tasks:
        build_problems(task, settings)
    run, found, tokenizer = RunDir.create(run_path), [], Tokenizer.load(before)
    mark = " quantized" if served else ""
    first, second = (
        Side(name, checkpoint_fingerprint(folder) + mark, partial(_engine, folder, tokenizer, served))
        for name, folder in (("before", before), ("after", after))
    )
    with run.lock():
        for task in tasks:
            found.append(measure_retention(task, (first, second), tokenizer, settings, run.eval_dir))
        verdicts = [task["verdict"] for task in found]
        result = {
            "min_retention": settings.min_retention,
            "activations": "quantized" if served else "exact",
            "run": str(run.path),
            "verdict": next((v for v in ("below", "not shown") if v in verdicts), "kept"),
            "tasks": found,
        }
        write_json(run.path / "retention.json", result)
    return result


def _engine(folder: Path, tokenizer: Tokenizer, served: bool) -> Engine:
    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.engine.engine import Engine
    from tafkir.quant.served import load_served

    return Engine(
        load_served(folder) if served else load_checkpoint(folder).decoder,
        eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
        max_batch=_MAX_BATCH,
        tokenizer=tokenizer,
    )


def retention_lines(result: dict[str, Any]) -> list[str]:
    """The measurement as lines of text for a terminal."""
    limit, lines = 100 * result["min_retention"], []
    for task in result["tasks"]:
        score = {side: task[side]["all"][task["metric"]]["value"] for side in ("before", "after")}
        kept, lengths = task["retention"][task["metric"]], task["lengths"]
        change = next(row for row in task["differences"] if (row["source"], row["metric"]) == ("all", task["metric"]))
        points = f"{100 * change['value']:+.1f} points ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
        if kept is None:
            share = "nothing to keep: the source solves none"
        else:
            high = "no end" if kept["high"] is None else f"{100 * kept['high']:.1f}"
            share = f"{100 * kept['value']:.1f} % kept ({100 * kept['low']:.1f} to {high})"
        said = {
            "kept": f"at least {limit:g} %",
            "not shown": f"{limit:g} % is not shown",
            "below": f"below {limit:g} %",
        }
        lines.append(
            f"{task['task']}: {100 * score['before']:.1f} to {100 * score['after']:.1f} % of {task['num_problems']:,} "
            f"problems, {points}; {share}: {said[task['verdict']]}"
        )
        lines.append(
            f"{'':{len(task['task'])}}  {lengths['before']:.1f} to {lengths['after']:.1f} tokens an answer, "
            f"{100 * lengths['cut_off_before']:.1f} to {100 * lengths['cut_off_after']:.1f} % cut off"
        )
    return lines
