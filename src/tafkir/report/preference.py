"""What the stages that learn from preferences measured: rows and sentences for the page. A missing number is a dash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tafkir.report.charts import number, percent
from tafkir.report.collect import RunRecord

__all__ = ["QUALITY_HEAD", "RELIABILITY_HEAD", "guard_sentences", "quality_rows", "reliability_rows"]

QUALITY_HEAD: Sequence[str] = ("On held-out pairs", "Reward model", "Judge")
RELIABILITY_HEAD: Sequence[str] = ("Confidence", "Mean confidence", "Right", "Pairs")

_NOTHING = "–"


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
