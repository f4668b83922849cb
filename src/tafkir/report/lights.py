"""What the mismatch monitor saw: its lights over the steps, and the tokens that the two engines disagreed about."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tafkir.report.charts import number, percent
from tafkir.report.collect import StageRecord, series

__all__ = ["LIGHT_NAMES", "TOKEN_HEAD", "light_cells", "light_sentences", "token_rows"]

LIGHT_NAMES: Sequence[str] = ("green", "yellow", "red")
TOKEN_HEAD: Sequence[str] = ("Token", "Step", "Problem", "p, training", "p, sampling", "Ratio", "Masked")

_MAX_CELLS = 120
_MAX_TOKENS = 12


def _lights(stage: StageRecord) -> list[tuple[int, int]]:
    """(step, light) of the logged steps, and of others that were not green."""
    lights = {int(step): int(value) for step, value in series(stage.metrics, "mismatch/light") if value is not None}
    for row in stage.mismatch:
        if isinstance(row.get("step"), int) and row.get("light") in LIGHT_NAMES:
            lights[row["step"]] = LIGHT_NAMES.index(row["light"])
    return [(step, min(max(light, 0), 2)) for step, light in sorted(lights.items())]


def light_cells(stage: StageRecord) -> list[tuple[int, int, int]]:
    """At most 120 stretches of steps: the first and the last step of each, and its worst light."""
    lights = _lights(stage)
    size = max(1, -(-len(lights) // _MAX_CELLS))
    parts = [lights[i : i + size] for i in range(0, len(lights), size)]
    return [(part[0][0], part[-1][0], max(light for _, light in part)) for part in parts]


def light_sentences(stage: StageRecord) -> list[str]:
    """How many steps were green, yellow and red, what was wrong first, and from when on protection was."""
    lights = [light for _, light in _lights(stage)]
    if not lights:
        return []
    if max(lights) == 0:
        sentences = [f"The light was green at all {len(lights):,} logged steps: the two engines agree."]
    else:
        counts = ", ".join(f"{lights.count(i):,} {name}" for i, name in enumerate(LIGHT_NAMES) if i in lights)
        sentences = [f"Of {len(lights):,} steps: {counts}."]
    for name in ("yellow", "red"):
        first = next((row for row in stage.mismatch if row.get("light") == name), None)
        if first is not None:
            reasons = "; ".join(str(reason) for reason in first.get("reasons") or ())
            sentences.append(f"First {name} at step {first.get('step')}: {reasons}.")
    protected = [step for step, value in series(stage.metrics, "mismatch/protected") if value]
    if protected:
        sentences.append(f"Protection was on from step {protected[0]:.0f} at the latest.")
    return sentences


def token_rows(stage: StageRecord) -> list[list[str]]:
    """The tokens that the engines were furthest apart on, worst first: rows for `TOKEN_HEAD`."""
    found = [
        (row.get("step"), token)
        for row in stage.mismatch
        for token in row.get("tokens") or ()
        if isinstance(token, Mapping)
    ]
    found.sort(key=lambda item: -_distance(item[1]))
    return [_token_row(step, token) for step, token in found[:_MAX_TOKENS]]


def _logprobs(token: Mapping[str, Any]) -> tuple[float, float] | None:
    training, sampling = token.get("logprob_training"), token.get("logprob_sampling")
    if not isinstance(training, int | float) or not isinstance(sampling, int | float):
        return None
    return float(training), float(sampling)


def _distance(token: Mapping[str, Any]) -> float:
    pair = _logprobs(token)
    return math.inf if pair is None else abs(pair[0] - pair[1])


def _token_row(step: Any, token: Mapping[str, Any]) -> list[str]:
    pair = _logprobs(token)
    shown = ["–", "–", "not finite"]
    if pair is not None:
        ratio = math.exp(min(700.0, pair[0] - pair[1]))
        shown = [percent(math.exp(min(0.0, pair[0])), 2), percent(math.exp(min(0.0, pair[1])), 2), number(ratio)]
    before = token.get("before")
    # A line break in a cell begins its small print.
    text, before = (json.dumps(str(part or ""), ensure_ascii=False)[1:-1] for part in (token.get("text"), before))
    text = _quoted(text) + (f"\nafter {_quoted(before)}" if before else "")
    masked = "yes" if token.get("masked") else "no"
    return [text, str(step), str(token.get("example")), *shown, masked]


def _quoted(text: str) -> str:
    """Text in quotes, isolated: the direction of its script must not turn what stands around it."""
    return f"“\u2068{text}\u2069”"
