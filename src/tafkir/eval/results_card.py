"""The efficiency card of results files: what accuracy costs each model, beside what others have published."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from tafkir.errors import DataError, RecipeError
from tafkir.eval.samples import Sample
from tafkir.eval.scores import estimate_of, item_scores
from tafkir.plan.params import decode_flops
from tafkir.plan.references import find_shape
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.model import ModelConfig
from tafkir.runlog.atomic import read_json

__all__ = ["Shape", "load_published", "render_results_table", "results_card", "shape_of_model"]

_TABLE = Path(__file__).parent / "tables" / "published.toml"


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a model besides its answers.

    Attributes:
        parameters, active_parameters: all, and those that one token goes through.
        bytes: of the checkpoint; None where there is none here.
        config: of a checkpoint folder, by which FLOPs are counted exactly.
    """

    parameters: float
    active_parameters: float
    bytes: float | None = None
    config: ModelConfig | None = None

    def flops(self, tokens: float, prompt_tokens: float = 0.0) -> float:
        """FLOPs of reading a prompt and writing so many tokens; without a config two a parameter and token."""
        if self.config is None:
            return 2 * self.active_parameters * (prompt_tokens + tokens)
        read = prompt_tokens * decode_flops(self.config, max(1, round(prompt_tokens / 2)))
        return read + tokens * decode_flops(self.config, max(1, round(prompt_tokens + tokens / 2)))


def shape_of_model(given: str) -> Shape:
    """From a checkpoint folder, or the name of a published shape as `tafkir plan` takes it.

    Raises:
        RecipeError: it is neither.
        CheckpointError: the folder's architecture is not supported.
    """
    folder = Path(given)
    if (folder / "config.json").is_file():
        config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return Shape(config.num_parameters(), config.num_parameters(active=True), size or None, config)
    shape = find_shape(given)
    return Shape(shape.total, shape.active)


@cache
def load_published() -> tuple[Mapping[str, Any], ...]:
    """The shipped table of published figures: `name`, `source`, `read`, and what is known of `date`, `parameters`,
    `active_parameters`, `bytes`, `tokens_per_s`, `scores` (task -> percent) and `note`."""
    return tuple(tomllib.loads(_TABLE.read_text(encoding="utf-8"))["model"])


def results_card(
    samples: Sequence[Sample],
    *,
    shapes: Mapping[str, Shape] | None = None,
    prices: Mapping[str, tuple[float, float]] | None = None,
    published: bool = False,
) -> dict[str, Any]:
    """One card a task.

    Args:
        shapes: model -> what is known of it.
        prices: model -> dollars for a million prompt tokens, and for a million new ones.
        published: set the shipped figures of the same task beside the models.

    Returns:
        `tasks`: rows of `name`, `accuracy` (with interval), `num_items`, `samples`, `parameters`,
        `active_parameters`, `bytes`, `tokens` and `prompt_tokens` (means of an answer; the latter None in older files,
        and `flops` and `dollars` are without it then), `flops` (of an answer), `tokens_per_s` (of one answer, waiting
        included), `dollars` (of 1,000 answers), `failed`, and `best` (no other row is at once
        cheaper, in FLOPs or else in tokens, and more accurate); `published`: rows of the shipped table with the task.

    Raises:
        RecipeError: a shape or price is of a model that has no answers.
        DataError: every answer of a model failed.
    """
    models = list(dict.fromkeys(sample.model for sample in samples))
    for name in [*(shapes or {}), *(prices or {})]:
        if name not in models:
            raise RecipeError(f"{name!r} has no answers here", where="card", expected=f"one of {', '.join(models)}")
    cards = []
    for task in dict.fromkeys(sample.task for sample in samples):
        own = [sample for sample in samples if sample.task == task]
        rows = [
            _row(name, [s for s in own if s.model == name], (shapes or {}).get(name), (prices or {}).get(name))
            for name in models
            if any(s.model == name for s in own)
        ]
        _mark_best(rows)
        cards.append({"task": task, "rows": rows, "published": _published(task) if published else []})
    return {"cards": cards}


def _row(
    name: str, samples: Sequence[Sample], shape: Shape | None, price: tuple[float, float] | None
) -> dict[str, Any]:
    scores = item_scores(samples)
    if not scores:
        raise DataError("every answer failed", where=name, fix="evaluate again")
    answered = [sample for sample in samples if not sample.failed]
    tokens = fmean(sample.tokens for sample in answered) or None
    prompt = fmean(sample.prompt_tokens for sample in answered)
    seconds = fmean(sample.latency_s for sample in answered)
    return {
        "name": name,
        "accuracy": estimate_of(scores).to_dict(),
        "num_items": len(scores),
        "samples": min(map(len, scores.values())),
        "parameters": shape.parameters if shape else None,
        "active_parameters": shape.active_parameters if shape else None,
        "bytes": shape.bytes if shape else None,
        "tokens": tokens,
        "prompt_tokens": prompt or None,
        "flops": shape.flops(tokens, prompt) if shape and tokens else None,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "dollars": (price[0] * prompt + price[1] * tokens) / 1e3 if price and tokens else None,
        "failed": len(samples) - len(answered),
    }


def _mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Pareto's front over accuracy and FLOPs, or tokens where the FLOPs of a row are not known."""
    cost = "flops" if all(row["flops"] for row in rows) else "tokens"
    known = [(row[cost], row["accuracy"]["value"]) for row in rows if row[cost]]
    for row in rows:
        own = (row[cost], row["accuracy"]["value"])
        beaten = any(less <= own[0] and more >= own[1] and (less, more) != own for less, more in known if row[cost])
        row["best"] = bool(row[cost]) and not beaten


def _published(task: str) -> list[dict[str, Any]]:
    """Rows of the table that have this task, under the name that the table gives it."""
    plain = "".join(letter for letter in task.lower() if letter.isalnum())
    found = []
    for model in load_published():
        for name, score in model.get("scores", {}).items():
            if name.replace("_", "") == plain:
                rest = {key: model.get(key) for key in ("parameters", "active_parameters", "bytes", "note", "date")}
                found.append({"score": score / 100, **{key: model[key] for key in ("name", "source", "read")}, **rest})
    return found


# ---- as a table --------------------------------------------------------------------------------------------------

_HEAD = ("model", "right", "95 % interval", "parameters", "active", "on disk", "tokens", "FLOP", "tokens/s", "$/1,000")


def render_results_table(card: Mapping[str, Any]) -> str:
    """The cards as lines for a terminal; a star marks Pareto's front."""
    blocks = []
    for each in card["cards"]:
        lines = [_HEAD, *(_cells(row) for row in each["rows"])]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        text = ["  ".join(f"{c:{'<' if i == 0 else '>'}{widths[i]}}" for i, c in enumerate(line)) for line in lines]
        theirs = [
            f"  {row['name']}: {100 * row['score']:.1f} % ({row['source']}, read {row['read']})"
            for row in each["published"]
        ]
        blocks.append(
            "\n".join([each["task"], *text, *(["published, by other harnesses:"] if theirs else []), *theirs])
        )
    return "\n\n".join(blocks)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = row["accuracy"]
    return (
        row["name"] + (" *" if row["best"] else ""),
        f"{100 * share['value']:.1f} %",
        f"{100 * share['low']:.1f} to {100 * share['high']:.1f}",
        *(_short(row[key]) for key in ("parameters", "active_parameters", "bytes", "tokens", "flops", "tokens_per_s")),
        "-" if row["dollars"] is None else f"{row['dollars']:.3g}",
    )


def _short(value: float | None) -> str:
    """`1.2e9` -> `1.2G`."""
    if value is None:
        return "-"
    size, sign = next(((s, w) for s, w in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{value / size:.3g}{sign}"
