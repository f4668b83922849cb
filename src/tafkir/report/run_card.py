"""The efficiency card of a run's own stages: accuracy beside what an answer takes, from the run directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tafkir.errors import TafkirError
from tafkir.plan.params import decode_flops
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.hf_config import config_from_hf
from tafkir.records import StageName
from tafkir.runlog.atomic import read_json
from tafkir.runlog.rundir import RunDir

__all__ = ["run_card"]


def run_card(run: RunDir, evaluation: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Cards of the scored stages and of the recursive model, in the form that `tafkir card RESULTS --json` prints.

    FLOPs are of an answer's new tokens: a run does not keep the length of its prompts; of a puzzle, those of all
    supervision steps. What is not in the directory, such as a checkpoint that was taken away, is left out.

    Args:
        evaluation: the result of the stage `eval`.
        recipe: as it was resolved; says where the base is.

    Returns:
        None where nothing was scored.
    """
    rows = []
    for name, sources in (evaluation.get("stages") or {}).items():
        scores = sources.get("all") or {}
        accuracy, tokens = scores.get("greedy") or scores.get("average"), scores.get("mean_tokens")
        if accuracy:
            known = _shape(_folder(run, name, recipe), tokens)
            rows.append({"name": name, "accuracy": accuracy, "num_items": accuracy["num_problems"], "tokens": tokens}
                        | {"samples": 1, "tokens_per_s": None, "dollars": None} | known)  # fmt: skip
    cards = [{"task": str(evaluation.get("task")), "rows": rows, "published": []}] if rows else []
    points = [(row["flops"], row["accuracy"]["value"]) for row in rows if row["flops"]]
    for row in rows:
        own = (row["flops"], row["accuracy"]["value"])
        row["best"] = bool(own[0]) and not any(f <= own[0] and a >= own[1] and (f, a) != own for f, a in points)
    solver = _solver(run, recipe)
    cards += [{"task": solver.pop("task"), "rows": [solver], "published": []}] if solver else []
    return {"cards": cards} if cards else None


def _solver(run: RunDir, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recursive model on the puzzles that its stage kept aside."""
    stage, table = run.stage("trm"), recipe.get("trm") or {}
    result = stage.read_result() or {}
    exact = (result.get("test") or {}).get("exact")
    if not exact:
        return None
    puzzles, steps = table.get("puzzles") or {}, (table.get("model") or {}).get("max_supervision_steps")
    side = puzzles.get("box_rows", 0) * puzzles.get("box_columns", 0)
    a_step, parameters = result.get("flops_per_supervision_step"), result.get("parameters")
    return {
        "task": f"{puzzles.get('kind')} {side}x{side}" if side else str(puzzles.get("kind")),
        "name": "trm",
        "accuracy": exact,
        "num_items": exact["num_problems"],
        "samples": 1,
        "tokens": None,
        "tokens_per_s": None,
        "dollars": None,
        "parameters": parameters,
        "active_parameters": parameters,
        "bytes": sum(file.stat().st_size for file in stage.checkpoint_dir.glob("*.safetensors")) or None,
        "flops": a_step * steps if a_step and steps else None,
        "best": True,
    }


def _folder(run: RunDir, name: str, recipe: Mapping[str, Any]) -> Path | None:
    if name == "ptq":
        return run.stage("quantize").path / "ptq"
    if name != "base":
        return run.stage(cast(StageName, name)).checkpoint_dir
    try:
        return find_checkpoint(str(recipe.get("base")))
    except TafkirError:
        return None


def _shape(folder: Path | None, tokens: float | None) -> dict[str, Any]:
    """What a checkpoint tells of itself; None for what is not known."""
    names = ("parameters", "active_parameters", "bytes", "flops")
    if folder is None or not (folder / "config.json").is_file():
        return dict.fromkeys(names)
    try:
        read = read_json(folder / "config.json")
        plain = {key: value for key, value in read.items() if key != "quantization_config"}
        config = config_from_hf(plain, str(folder / "config.json"))
    except TafkirError:
        return dict.fromkeys(names)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    flops = tokens * decode_flops(config, max(1, round(tokens / 2))) if tokens else None
    return dict(
        zip(names, (config.num_parameters(), config.num_parameters(active=True), size or None, flops), strict=True)
    )
