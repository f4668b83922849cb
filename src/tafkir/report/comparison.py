"""A comparison of models as a page: verdicts with intervals, groups, lengths, and changed answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.charts import Bar, interval_plot, percent, signed_points
from tafkir.report.page import frame_page, plain_table

__all__ = ["render_comparison"]

_COLORS = {"better": "c-good", "worse": "c-bad", "equivalent": "c-sft", "undecided": "c-baseline"}
_TONES = {"better": "better", "worse": "worse", "equivalent": "better", "undecided": "same"}
_HEAD = ("Task", "Verdict", "Difference, 95 %", "Scores", "Kept, 95 %", "Down / up", "p (Holm)", "Could have been seen")
_LENGTHS = ("Task", "Tokens of an answer", "Ratio", "Cut off", "Failed", "Answers that differ")
_GROUP = ("Group", "Items", "Before", "After", "Difference, 95 %")
_CLEAN = ("Task", "Seen in training", "All items", "Without them", "Verdict without them")
# Around the place where two texts part; the whole text is in the results file.
_BEFORE, _AFTER = 240, 900

Row = Mapping[str, Any]


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The whole page; it runs no script.

    Args:
        comparison: what `tafkir compare --json` prints.
    """
    pairs: Sequence[Row] = comparison["pairs"]
    title = " · ".join(comparison["models"])
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison["notes"])
    notes = f'<div class="notes"><b>To be known</b><ul>{notes}</ul></div>' if notes else ""
    body = f"{_hero(comparison)}{notes}<main>{''.join(map(_pair, pairs))}{_words(comparison)}</main>"
    return frame_page(f"{title} · Tafkir comparison", body)


def _hero(comparison: Row) -> str:
    pairs = comparison["pairs"]
    sentences = [_sentence(pair) for pair in pairs]
    verdicts = {row["judgement"]["verdict"] for pair in pairs for row in pair["tasks"]}
    tone = _TONES["worse" if "worse" in verdicts else min(verdicts)] if verdicts else "same"
    rest = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences[1:])
    return (
        f'<header class="hero {tone}"><p class="eyebrow">Tafkir comparison · <b>{len(pairs) + 1} models</b></p>'
        f'<h1 dir="auto">{escape(sentences[0])}</h1><div class="beside">{rest}</div></header>'
    )


def _sentence(pair: Row) -> str:
    rows = pair["tasks"]
    counts = [(v, [r["task"] for r in rows if r["judgement"]["verdict"] == v]) for v in _COLORS]
    told = [f"{verdict} on {', '.join(tasks)}" for verdict, tasks in counts if tasks]
    return f"{pair['second']} beside {pair['first']}: {'; '.join(told)}."


def _pair(pair: Row) -> str:
    rows = pair["tasks"]
    bars = [_bar(row["task"], row["judgement"]["difference"], row["judgement"]["verdict"]) for row in rows]
    if pair["macro"]:
        macro = pair["macro"]
        sure = "better" if macro["low"] > 0 else "worse" if macro["high"] < 0 else "undecided"
        bars.append(_bar(f"mean of {macro['num_tasks']} tasks", macro, sure))
    look = (
        "<figcaption><b>Look for</b> whole bars on one side of zero. A bar across zero leaves it open, whatever its "
        "middle says; “equivalent” is a bar so short that it stays within the margin.</figcaption>"
    )
    figure = f'<figure class="card">{interval_plot(bars, title="Differences by task", signed=True)}{look}</figure>'
    lengths = plain_table(_LENGTHS, [_length_cells(row) for row in rows])
    parts = [
        f'<section><h2 dir="auto">{escape(pair["second"])} beside {escape(pair["first"])}</h2>{figure}',
        plain_table(_HEAD, [_cells(row) for row in rows], words=2),
        _others(rows),
        f'<h3 class="group">Length, and answers that were cut off</h3>{lengths}',
        _clean(rows),
        *(_groups(row) for row in rows),
        *(_flips(row, pair) for row in rows),
        "</section>",
    ]
    return "".join(parts)


def _bar(label: str, row: Row, verdict: str) -> Bar:
    return Bar(label, row["value"], row["low"], row["high"], _COLORS[verdict], verdict)


def _cells(row: Row) -> list[str]:
    judged, difference = row["judgement"], row["judgement"]["difference"]
    sides = [percent(score["value"]) for score in row["scores"]]
    share = judged["retention"]
    kept = "–"
    if share:
        high = "no end" if share["high"] is None else percent(share["high"])
        kept = f"{percent(share['value'])}\n{percent(share['low'])} to {high}"
    return [
        f"{row['task']}\n{row['num_items']:,} items × {row['samples']}",
        f"{judged['verdict']}\n{_caveat(judged)}",
        f"{signed_points(difference['value'])}\n{_ends(difference)}",
        f"{sides[0]} → {sides[1]}",
        kept,
        f"{row['lost']:,} / {row['gained']:,}",
        f"{judged['p_holm']:.2g}",
        f"{100 * difference['min_detectable']:.1f}",
    ]


def _caveat(judged: Row) -> str:
    if judged["verdict"] in ("better", "worse"):
        return "" if judged["p_holm"] <= 0.05 else "not after correction"
    return "not worse by the margin" if judged["non_inferior"] else ""


def _ends(row: Row) -> str:
    return f"{signed_points(row['low'])} to {signed_points(row['high'])}"


def _others(rows: Sequence[Row]) -> str:
    """pass@k and maj@k where there are several samples, and Codeforces' ratings."""
    cells = []
    for row in rows:
        for other in row["others"]:
            before, after = (percent(side["value"]) for side in other["scores"])
            change = other["difference"]
            cells.append(
                [row["task"], other["metric"], before, after, f"{signed_points(change['value'])}\n{_ends(change)}"]
            )
        if row["rating"]:
            both, change = row["rating"]["both"], row["rating"]["difference"]
            sides = [f"{side['value']:,.0f}\n{side['low']:,.0f} to {side['high']:,.0f}" for side in both]
            ends = f"{change['low']:+,.0f} to {change['high']:+,.0f}"
            cells.append([row["task"], "Codeforces rating", *sides, f"{change['value']:+,.0f}\n{ends}"])
    if not cells:
        return ""
    table = plain_table(("Task", "Metric", "First", "Second", "Difference, 95 %"), cells, words=2)
    return f'<h3 class="group">Other metrics of the same answers</h3>{table}'


def _length_cells(row: Row) -> list[str]:
    tokens, cut, failed, churn = row["tokens"], row["cut_off"], row["failed"], row["churn"]
    return [
        row["task"],
        f"{tokens['before']:,.0f} → {tokens['after']:,.0f}",
        "–" if tokens["ratio"] is None else f"{tokens['ratio']:.2f}×",
        f"{percent(cut[0])} → {percent(cut[1])}",
        f"{failed[0]:,} / {failed[1]:,}",
        "–" if churn is None else percent(churn),
    ]


def _clean(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        if clean := row["clean"]:
            rest = clean.get("judgement")
            without = f"{signed_points(rest['difference']['value'])}\n{_ends(rest['difference'])}" if rest else "–"
            whole = row["judgement"]["difference"]
            verdict = rest["verdict"] if rest else "nothing is left"
            cells.append(
                [
                    row["task"],
                    f"{clean['num_seen']:,}",
                    f"{signed_points(whole['value'])}\n{_ends(whole)}",
                    without,
                    verdict,
                ]
            )
    if not cells:
        return ""
    return f'<h3 class="group">Without the items that training had seen</h3>{plain_table(_CLEAN, cells)}'


def _groups(row: Row) -> str:
    parts = []
    for kind in dict.fromkeys(group["kind"] for group in row["groups"]):
        own = [group for group in row["groups"] if group["kind"] == kind]
        cells = [
            [
                group["group"],
                f"{group['num_problems']:,}",
                percent(group["before"]),
                percent(group["after"]),
                f"{signed_points(group['value'])}\n{_ends(group)}",
            ]
            for group in own
        ]
        parts.append(
            f"<details><summary>{escape(row['task'])} by {escape(kind)} ({len(own)} groups)</summary>"
            f"{plain_table((kind.capitalize(), *_GROUP[1:]), cells)}</details>"
        )
    return "".join(parts)


# ---- changed answers ---------------------------------------------------------------------------------------------


def _flips(row: Row, pair: Row) -> str:
    if not row["flips"]:
        return ""
    articles = "".join(_flip(flip, (pair["first"], pair["second"])) for flip in row["flips"])
    of = f"{len(row['flips'])} of {row['lost'] + row['gained']:,}"
    return f'<h3 class="group">{escape(row["task"])}: answers that changed ({of})</h3>{articles}'


def _flip(flip: Row, names: tuple[str, str]) -> str:
    changed = " → ".join(percent(share, 0) for share in flip["shares"])
    words = "right to wrong" if flip["direction"] == "lost" else "wrong to right"
    tone = "o-wrong" if flip["direction"] == "lost" else "o-correct"
    sides = "".join(_side(flip, side, names[side]) for side in (0, 1))
    return (
        f'<article class="card chain {tone}"><header><span class="badge">{words}, {changed}</span>'
        f"<small>{escape(flip['item'])} · right is <bdi>{escape(flip['expected'])}</bdi></small></header>"
        f'<p class="question" dir="auto">{escape(flip["question"])}</p><div class="sides">{sides}</div></article>'
    )


def _side(flip: Row, side: int, name: str) -> str:
    text, at = flip["texts"][side], flip["diverges_at"]
    start, end = max(0, at - _BEFORE), at + _AFTER
    shared, other = text[start:at], text[at:end]
    head, tail = other[: _word_end(other)], other[_word_end(other) :]
    marked = f'<mark dir="auto">{escape(head)}</mark>' if head.strip() else '<mark class="end">ends here</mark>'
    answer = flip["extracted"][side]
    given = "no answer" if answer is None else answer
    reason = f" · {escape(flip['reasons'][side])}" if flip["reasons"][side] else ""
    return (
        f'<div class="side"><p class="outcome"><b><bdi>{escape(name)}</bdi></b>: <bdi>{escape(given)}</bdi> · '
        f"{escape(flip['outcomes'][side])}{reason} · {flip['tokens'][side]:,} tokens</p>"
        f'<div class="steps"><p dir="auto">{"… " if start else ""}<span class="shared">{escape(shared)}</span>'
        f"{marked}{escape(tail)}{' …' if end < len(text) else ''}</p></div></div>"
    )


def _word_end(text: str) -> int:
    """End of the first word, with the space before it."""
    size = len(text) - len(text.lstrip())
    return next((i for i in range(size, len(text)) if text[i].isspace()), len(text))


def _words(comparison: Row) -> str:
    margin = f"{100 * comparison['margin']:g}"
    items = {
        "Equivalent": (
            f"Two one-sided tests at 5 % put the difference within {margin} points (TOST). “No significant difference” "
            "is not that: it may only mean too few questions."
        ),
        "Not worse by the margin": "One of the two tests holds: the second model loses less than the margin, at 5 %.",
        "Interval": "95 %, paired; all samples of a question are one observation. Kept: Fieller's interval.",
        "Could have been seen": "The difference that so many questions and samples show four times in five.",
        "p (Holm)": "McNemar's exact test with one sample a question, else a paired t test; corrected for number.",
        "Changed answers": "The mark is the first word at which two texts part; what stands before it is the same.",
    }
    told = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in items.items())
    return f'<section><h2>Words on this page</h2><dl class="words">{told}</dl></section>'
