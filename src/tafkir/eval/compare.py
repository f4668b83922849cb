"""`tafkir compare`: models on the same questions, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tafkir.errors import DataError, RecipeError, RunDirError
from tafkir.eval.metrics import mean_interval, paired_difference
from tafkir.eval.samples import Sample
from tafkir.eval.scores import (
    codeforces_difference,
    codeforces_rating,
    estimate_of,
    item_scores,
    majority_scores,
    metric_scores,
    pass_scores,
    score_of,
)
from tafkir.eval.sides import Side
from tafkir.eval.statistics import MARGIN, Judgement, holm, judge, macro_average, noise_of, samples_needed
from tafkir.intervals import CONFIDENCE

__all__ = ["Comparison", "compare_sides", "first_divergence", "plan_lines"]

_GROUPS = ("source", "subject", "difficulty")
_MAX_GROUPS = 60
Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How every model stands beside the first, task by task; `pairs` as `compare_sides` gives them."""

    models: Sequence[str]
    margin: float
    pairs: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "margin": self.margin,
            "pairs": list(self.pairs),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The comparison as lines of text for a terminal."""
        lines = []
        for pair in self.pairs:
            lines.append(
                f"{pair['second']} against {pair['first']}, in points with 95 % intervals, on the same questions; "
                f"equivalent means within {100 * self.margin:g}"
            )
            for row in pair["tasks"]:
                lines += _task_lines(row)
            if pair["macro"]:
                macro = pair["macro"]
                lines.append(
                    f"mean of {macro['num_tasks']} tasks: {_points(macro)} (error {100 * macro['standard_error']:.2f})"
                )
        return [*lines, *(f"Note: {note}" for note in self.notes)]


def compare_sides(
    sides: Sequence[Side],
    *,
    margin: float = MARGIN,
    tasks: Sequence[str] | None = None,
    common: bool = False,
    seen: Mapping[str, Mapping[str, str]] | None = None,
    num_flips: int = 12,
    metrics: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare every model with the first, on the tasks that both answered.

    Args:
        margin: the largest difference that counts as none, as a share.
        tasks: compare only these; a run directory's also by their stage alone.
        common: leave out items that one side lacks, instead of refusing.
        seen: task -> items that the models were trained on; scores on the others stand beside all.
        num_flips: answers to show side by side, for each task.
        metrics: task -> the metric on its card; of pass@k with k above 1 that is what is judged, and not the mean.

    Returns:
        For each pair `first`, `second`, `macro` (mean difference over several tasks) and `tasks`, whose rows hold
        `task`, `num_items`, `samples` (fewest of an item), `scores` (both, with intervals), `judgement` (as
        `Judgement`), `lost` and `gained` (items whose mean fell or rose), `churn` (share of equal repeats with another
        answer), `tokens`, `cut_off`, `failed`, `groups`, `clean`, `flips`; `others` (with several samples an item:
        `metric`, `scores` and the paired `difference` of pass@k and maj@k); and `rating` (of Codeforces' rated
        problems: both, and their `difference`).

    Raises:
        RecipeError: fewer than two models.
        RunDirError: no task in common.
        DataError: the sides answered different items (without `common`).
    """
    if len(sides) < 2:
        raise RecipeError(f"{len(sides)} model given", where="compare", expected="two or more", fix="name another")
    first = sides[0]
    notes: list[str] = []
    pairs: list[tuple[Side, list[_Pair]]] = []
    for second in sides[1:]:
        chosen = _common_tasks(first, second, tasks)
        known = metrics or {}
        pairs.append((second, [_Pair(t, first, second, common, notes, known.get(t, "accuracy")) for t in chosen]))
        notes += [
            f"{key} differs: {value} against {second.settings.get(key)}."
            for key, value in first.settings.items()
            if key in second.settings and value != second.settings[key]
        ]
    rows = [[_row(pair, margin, (seen or {}).get(pair.task), num_flips) for pair in own] for _, own in pairs]
    corrected = holm([row["judgement"]["difference"]["p_value"] for own in rows for row in own])
    for row, p_value in zip((row for own in rows for row in own), corrected, strict=True):
        row["judgement"]["p_holm"] = p_value
    return Comparison(
        models=[side.name for side in sides],
        margin=margin,
        pairs=[
            {"first": first.name, "second": second.name, "tasks": table, "macro": _macro(own)}
            for (second, own), table in zip(pairs, rows, strict=True)
        ],
        notes=notes,
    )


def _common_tasks(first: Side, second: Side, wanted: Sequence[str] | None) -> list[str]:
    found = [task for task in first.answers if task in second.answers]
    if wanted is not None:
        found = [task for task in found if {task, task.split(",")[0]} & set(wanted)]
    if not found:
        raise RunDirError(
            f"no evaluated task in common{' named ' + ', '.join(wanted) if wanted else ''}",
            where=f"{first.name} and {second.name}",
            expected=f"one of {'; '.join(first.answers)} in both",
        )
    return found


class _Pair:
    """What two models answered to the items of one task."""

    def __init__(
        self, task: str, first: Side, second: Side, common: bool, notes: list[str], metric: str = "accuracy"
    ) -> None:
        self.task, self.metric = task, metric
        self.samples = first.answers[task], second.answers[task]
        scores = [metric_scores(samples, metric) for samples in self.samples]
        failed = {sample.item for samples in self.samples for sample in samples if sample.failed}
        apart = (scores[0].keys() ^ scores[1].keys()) - failed
        if apart and not common:
            raise DataError(
                f"{len(apart)} items were answered on one side only",
                where=f"{task}, {min(apart)}: {first.name} against {second.name}",
                expected="the same items on both sides",
                fix="evaluate both alike, or add --common",
            )
        self.ids = [item for item in scores[0] if item in scores[1]]
        if not self.ids:
            raise DataError("no item was answered on both sides", where=f"{task}: {first.name} against {second.name}")
        if left := len(scores[0].keys() ^ scores[1].keys()):
            notes.append(f"{task}: {left} items lack an answer on one side and are left out.")
        self.scores = tuple({item: side[item] for item in self.ids} for side in scores)
        self.by_repeat = tuple({(s.item, s.repeat): s for s in samples if not s.failed} for samples in self.samples)

    def take(self, items: set[str]) -> tuple[Scores, Scores]:
        """Both sides' scores of some items."""
        first, second = ({item: side[item] for item in self.ids if item in items} for side in self.scores)
        return first, second


def _row(pair: _Pair, margin: float, seen: Mapping[str, str] | None, num_flips: int) -> dict[str, Any]:
    judged = judge(*pair.scores, margin=margin)
    noise, samples = noise_of(*pair.scores), min(len(s) for side in pair.scores for s in side.values())
    both = [key for key in pair.by_repeat[0] if key in pair.by_repeat[1]]
    first, second = pair.by_repeat
    return {
        "task": pair.task,
        "num_items": len(pair.ids),
        "samples": samples,
        "scores": [estimate_of(side).to_dict() for side in pair.scores],
        "judgement": _plain(judged),
        "lost": judged.difference.losses,
        "gained": judged.difference.wins,
        "churn": fmean(first[key].extracted != second[key].extracted for key in both) if both else None,
        "tokens": _lengths(pair),
        "cut_off": [fmean(s.finish_reason == "length" for s in side.values()) for side in pair.by_repeat],
        "failed": [sum(sample.failed for sample in side) for side in pair.samples],
        "samples_for_margin": samples_needed(noise, margin),
        "groups": _groups(pair),
        "clean": _clean(pair, seen, margin),
        "flips": _flips(pair, num_flips),
        "metric": pair.metric,
        "others": _others(pair),
        "rating": _rating(pair),
    }


def _others(pair: _Pair) -> list[dict[str, Any]]:
    """pass@2, pass@k and maj@k of as many samples as every item has, beside what the judgement is of."""
    own = [[s for s in side if s.item in pair.scores[0]] for side in pair.samples]
    drawn = min(len(scores) for side in own for scores in item_scores(side).values())
    rows: list[tuple[str, list[dict[str, list[float]]]]] = []
    for tries in sorted({2, drawn} if drawn > 1 else ()):
        rows.append((f"pass@{tries}", [pass_scores(side, tries) for side in own]))
    if drawn > 2:  # of two votes the majority is their mean
        rows.append((f"maj@{drawn}", [majority_scores(_first(side, drawn)) for side in own]))
    if pair.metric.startswith("pass@") and drawn > 1:
        rows.append(("mean", [item_scores(side) for side in own]))
    return [
        {
            "metric": metric,
            "scores": [estimate_of(side).to_dict() for side in sides],
            "difference": paired_difference(sides[0], sides[1]).to_dict(),
        }
        for metric, sides in rows
        if metric != pair.metric
    ]


def _first(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first so many answers to each item that did not fail."""
    taken: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.repeat):
        if not sample.failed and len(taken.setdefault(sample.item, [])) < count:
            taken[sample.item].append(sample)
    return [sample for own in taken.values() for sample in own]


def _rating(pair: _Pair) -> dict[str, Any] | None:
    """Codeforces' ratings of both, and how far the second's is above the first's."""
    difference = codeforces_difference(*pair.samples)
    return difference and {"both": [codeforces_rating(side) for side in pair.samples], "difference": difference}


def _plain(judged: Judgement) -> dict[str, Any]:
    """As JSON takes it: an interval without an end has null there."""
    told = judged.to_dict()
    for estimate in (value for value in told.values() if isinstance(value, dict)):
        estimate.update({k: None for k, v in estimate.items() if isinstance(v, float) and not math.isfinite(v)})
    return told


def _lengths(pair: _Pair) -> dict[str, Any]:
    """Tokens of an answer on both sides, and their paired difference."""
    means = []
    for side in pair.by_repeat:
        own: dict[str, list[int]] = {}
        for sample in side.values():
            own.setdefault(sample.item, []).append(sample.tokens)
        means.append([fmean(own[item]) for item in pair.ids])
    before, after = map(fmean, means)
    change = mean_interval([b - a for a, b in zip(*means, strict=True)])
    ends = [end if math.isfinite(end) else None for end in (change.low, change.high)]
    return {
        "before": before,
        "after": after,
        "ratio": after / before if before else None,
        "low": ends[0],
        "high": ends[1],
    }


def _groups(pair: _Pair) -> list[dict[str, Any]]:
    """The difference within each source, subject and difficulty, where there are several."""
    rows = []
    known = {sample.item: sample for sample in pair.samples[0]}
    for kind in _GROUPS:
        members: dict[str, set[str]] = {}
        for item in pair.ids:
            members.setdefault(getattr(known[item], kind), set()).add(item)
        if 1 < len(members) <= _MAX_GROUPS:
            for value in sorted(members, key=_in_order):
                sides = pair.take(members[value])
                means = [fmean(map(fmean, side.values())) for side in sides]
                found = paired_difference(*sides).to_dict()
                rows.append({"kind": kind, "group": value or "none", "before": means[0], "after": means[1], **found})
    return rows


def _in_order(value: str) -> tuple[float, str]:
    """Difficulties such as "10" after "9"; words by the alphabet, after numbers."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _clean(pair: _Pair, seen: Mapping[str, str] | None, margin: float) -> dict[str, Any] | None:
    """Both scores and the judgement on the items that training did not have."""
    if seen is None:
        return None
    found = sorted(item for item in pair.ids if item in seen)
    rest = set(pair.ids).difference(found)
    told: dict[str, Any] = {"num_seen": len(found), "shared": {item: seen[item] for item in found[:5]}}
    if rest:
        sides = pair.take(rest)
        told |= {
            "scores": [estimate_of(side).to_dict() for side in sides],
            "judgement": _plain(judge(*sides, margin=margin)),
        }
    return told


def _macro(pairs: Sequence[_Pair]) -> dict[str, Any] | None:
    differences = [[fmean(p.scores[1][i]) - fmean(p.scores[0][i]) for i in p.ids] for p in pairs if len(p.ids) > 1]
    if len(differences) < 2:
        return None
    found = macro_average(differences)
    return {name: getattr(found, name) for name in ("value", "standard_error", "low", "high", "num_tasks")}


# ---- flips -------------------------------------------------------------------------------------------------------


def first_divergence(first: str, second: str) -> int:
    """Number of leading characters that two texts share, cut back to the start of a word."""
    size = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    if size == len(first) == len(second):
        return size
    return max((i + 1 for i in range(size) if first[i].isspace()), default=0)


def _flips(pair: _Pair, limit: int) -> list[dict[str, Any]]:
    """Items whose mean fell, then those whose rose, the largest changes first; two of three places for the former."""
    changes = {item: fmean(pair.scores[1][item]) - fmean(pair.scores[0][item]) for item in pair.ids}
    ordered = sorted((item for item in changes if abs(changes[item]) > 1e-12), key=lambda item: -abs(changes[item]))
    lost, gained = ([i for i in ordered if changes[i] * sign > 0] for sign in (-1, 1))
    num_lost = max(limit - limit // 3, limit - len(gained))
    chosen = lost[:num_lost]
    chosen += gained[: limit - len(chosen)]
    return [_flip(pair, item, changes[item]) for item in chosen]


def _flip(pair: _Pair, item: str, change: float) -> dict[str, Any]:
    """The best answer of the side that was better beside the worst of the other, of equal repeats where it can be."""
    sides = [[s for s in side.values() if s.item == item] for side in pair.by_repeat]
    sign = 1 if change < 0 else -1
    a = max(sides[0], key=lambda s: sign * score_of(s))
    b = min(sides[1], key=lambda s: (sign * score_of(s), s.repeat != a.repeat))
    texts = [_whole(sample) for sample in (a, b)]
    return {
        "item": item,
        "question": a.question,
        "expected": a.expected,
        "direction": "lost" if change < 0 else "gained",
        "shares": [fmean(side[item]) for side in pair.scores],
        "texts": texts,
        "extracted": [a.extracted, b.extracted],
        "outcomes": [a.outcome, b.outcome],
        "reasons": [a.reason, b.reason],
        "tokens": [a.tokens, b.tokens],
        "diverges_at": first_divergence(*texts),
    }


def _whole(sample: Sample) -> str:
    return f"{sample.reasoning}\n</think>\n{sample.text}" if sample.reasoning else sample.text


# ---- words -------------------------------------------------------------------------------------------------------


def _task_lines(row: Mapping[str, Any]) -> list[str]:
    judged, (before, after) = row["judgement"], row["scores"]
    lines = [
        f"{row['task']:<20}{judged['verdict']:<11}{_points(judged['difference'])}"
        f"  {100 * before['value']:.1f} to {100 * after['value']:.1f}{_kept(judged['retention'])}"
        f"  {row['lost']} down, {row['gained']} up of {row['num_items']} x{row['samples']}"
        f"  p = {judged['p_holm']:.2g}"
    ]
    detectable = f"a difference of {100 * judged['difference']['min_detectable']:.1f} could have been seen"
    needed = row["samples_for_margin"]
    if judged["verdict"] == "undecided":
        more = f"{needed} samples an item" if needed and needed > row["samples"] else "more questions"
        detectable += f"; {100 * judged['margin']:g} takes {more}"
    if judged["verdict"] in ("better", "worse") and judged["p_holm"] > 1 - CONFIDENCE:
        detectable += f"; {judged['verdict']} alone, not after correction for being several"
    elif judged["non_inferior"] and judged["verdict"] != "worse":
        detectable += "; not worse by the margin (one-sided, 5 %)"
    lines[0] += f"  ({row['metric']})" if row["metric"].startswith("pass@") and row["metric"] != "pass@1" else ""
    for other in row["others"]:
        sides = " to ".join(f"{100 * side['value']:.1f}" for side in other["scores"])
        lines.append(f"  {other['metric']:<29}{_points(other['difference'])}  {sides}")
    if row["rating"]:
        both, change = row["rating"]["both"], row["rating"]["difference"]
        sides = " to ".join(f"{side['value']:,.0f} [{side['low']:,.0f}, {side['high']:,.0f}]" for side in both)
        ends = f"({change['low']:+,.0f} to {change['high']:+,.0f})"
        lines.append(f"  {'rating':<29}{change['value']:+6,.0f} {ends}  {sides}")
    tokens, cut, failed = row["tokens"], row["cut_off"], row["failed"]
    lengths = (
        f"{tokens['before']:,.0f} to {tokens['after']:,.0f} tokens, cut off {100 * cut[0]:.1f} to {100 * cut[1]:.1f} %"
    )
    lines.append(f"{'':<20}{detectable}; {lengths}" + (f"; failed {failed[0]} and {failed[1]}" if any(failed) else ""))
    if clean := row["clean"]:
        rest = f": without them {_points(clean['judgement']['difference'])}, {clean['judgement']['verdict']}"
        lines.append(f"{'':<20}{clean['num_seen']} items were seen in training{rest if 'judgement' in clean else ''}")
    return lines


def _kept(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    high = "no end" if share["high"] is None else f"{100 * share['high']:.1f}"
    return f", kept {100 * share['value']:.1f} % ({100 * share['low']:.1f} to {high})"


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:+6.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def plan_lines(sides: Sequence[Side], *, margin: float) -> list[str]:
    """What it takes to see a difference of `margin` with 80 % power, task by task.

    The noise is that of the paired difference of the first two models, or of one model beside an equal.
    """
    other = sides[1] if len(sides) > 1 else None
    beside = f"the difference from {other.name} to {sides[0].name}" if other else f"{sides[0].name} beside an equal"
    lines = [f"To see {100 * margin:g} points four times in five, by the noise of {beside}"]
    for task, samples in sides[0].answers.items():
        scores = [item_scores(samples)]
        if other:
            if task not in other.answers:
                continue
            scores.append(item_scores(other.answers[task]))
            scores = [{item: side[item] for item in scores[0] if item in scores[1]} for side in scores]
        noise, now = noise_of(*scores), min(map(len, scores[0].values()))
        reach = noise.detectable(now)
        needed = samples_needed(noise, margin)
        items = math.ceil(noise.num_problems * (reach / margin) ** 2)
        how = f"{needed} samples of each" if needed else "no number of samples of these"
        lines.append(
            f"{task:<20}{noise.num_problems} items x{now} show {100 * reach:.1f}; "
            f"it takes {how}, or {items:,} items x{now}"
        )
    return lines
