"""What the stages that learn from preferences measured: rows and sentences for the page. A missing number is a dash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tafkir.report.charts import Line, line_chart, number, percent
from tafkir.report.collect import RunRecord
from tafkir.report.lab import LabFigure

__all__ = [
    "QUALITY_HEAD",
    "RELIABILITY_HEAD",
    "calibration_figure",
    "guard_sentences",
    "quality_rows",
    "reliability_rows",
]

QUALITY_HEAD: Sequence[str] = ("On held-out pairs", "Reward model", "Judge")
RELIABILITY_HEAD: Sequence[str] = ("Confidence", "Mean confidence", "Right", "Pairs")

_NOTHING = "–"
# A bin of fewer pairs says nothing of calibration.
_MIN_PAIRS = 5


def quality_rows(record: RunRecord) -> list[list[str]]:
    """Accuracy, calibration and length bias of the reward model, and of the guard's judge where there is one."""
    result = record.result("reward")
    models = [result, _table(result, "judge")]
    if not _table(result, "heldout"):
        return []
    return [[label, *(build(_table(model, "heldout")) for model in models)] for label, build in _QUALITY]


def reliability_rows(record: RunRecord) -> list[list[str]]:
    """The reliability table of the reward model."""
    rows = _table(record.result("reward"), "heldout").get("reliability")
    return [
        [
            f"{_percent(row.get('low'))} to {_percent(row.get('high'))}",
            _percent(row.get("confidence")),
            _share(_table(row, "accuracy")),
            str(row.get("num_pairs", _NOTHING)),
        ]
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, Mapping)
    ]


def calibration_figure(record: RunRecord) -> LabFigure | None:
    """Confidence against the share of right orders, for the reward model and the judge; None without measurements."""
    result = record.result("reward")
    models = (("reward model", result, "c-sft"), ("judge", _table(result, "judge"), "c-second"))
    lines = [Line(name, _reliability_points(model), color, dots=True) for name, model, color in models]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    ideal = Line("calibrated", [(50.0, 0.5), (100.0, 1.0)], "c-baseline")
    words = ("Calibration", "share of pairs ordered rightly, by the confidence in that order (%)")
    look = "dots on the grey line. Below it the model is surer than it may be; bins of a few pairs scatter."
    chart = line_chart(
        [ideal, *lines], title="Right orders by confidence", x_label="%", y_min=0.0, y_max=1.0, y_format=_short_percent
    )
    return LabFigure("calibration", *words, look, [*lines, ideal], chart)


def _reliability_points(model: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    """(mean confidence in percent, share of right orders) of every bin of at least five pairs."""
    rows = _table(model, "heldout").get("reliability")
    points: list[tuple[float, float | None]] = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and isinstance(row.get("num_pairs"), int) and row["num_pairs"] >= _MIN_PAIRS:
            right, confidence = _table(row, "accuracy").get("value"), row.get("confidence")
            if isinstance(right, int | float) and isinstance(confidence, int | float):
                points.append((100 * float(confidence), float(right)))
    return points


def _short_percent(value: float) -> str:
    return percent(value, 0)


def guard_sentences(record: RunRecord) -> list[str]:
    """What the guard against reward hacking saw."""
    guard = _table(record.result("rlhf"), "guard")
    found = guard.get("trips")
    trips = [trip for trip in (found if isinstance(found, list) else []) if isinstance(trip, Mapping)]
    if not guard:
        return []
    if not trips:
        return ["The guard against reward hacking saw nothing that it had to stop."]
    said = [f"Step {trip.get('step')}: {trip.get('reason')}." for trip in trips]
    ends = "The guard ended the stage there." if guard.get("stopped") else f"{len(said)} times the rate was lowered."
    return [*said, ends]


def _table(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _percent(value: Any) -> str:
    return percent(value) if isinstance(value, int | float) else _NOTHING


def _share(estimate: Mapping[str, Any]) -> str:
    if not estimate:
        return _NOTHING
    interval = f"{_percent(estimate.get('low'))} to {_percent(estimate.get('high'))}"
    return f"{_percent(estimate.get('value'))}\n{interval}"


def _figure(heldout: Mapping[str, Any], key: str) -> str:
    value = _table(heldout, "length_bias").get(key)
    return number(value, 2) if isinstance(value, int | float) else _NOTHING


def _accuracy_where(heldout: Mapping[str, Any], kind: str) -> str:
    return _share(_table(_table(_table(heldout, "length_bias"), "accuracy"), kind))


_QUALITY: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("Accuracy", lambda h: _share(_table(h, "accuracy"))),
    ("Calibration error", lambda h: _share(_table(h, "calibration_error"))),
    ("Correlation of reward and length", lambda h: _figure(h, "reward_length_correlation")),
    ("Correlation of both differences", lambda h: _figure(h, "margin_length_correlation")),
    ("Accuracy of “the longer is better”", lambda h: _share(_table(_table(h, "length_bias"), "longer_is_better"))),
    ("Accuracy, chosen side longer", lambda h: _accuracy_where(h, "chosen_longer")),
    ("Accuracy, chosen side shorter", lambda h: _accuracy_where(h, "chosen_shorter")),
    ("Accuracy, lengths matched", lambda h: _accuracy_where(h, "matched")),
)
