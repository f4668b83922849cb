"""What quantizing has cost, as a page: tasks before and after, predictions, every weight, and the bytes saved.

Takes what `tafkir verify` measured, of checkpoints that anyone made; parts that were not measured are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.bars import Share, SizeBar, histogram, share_plot, size_bars
from tafkir.report.charts import Line, line_chart, number, percent, signed_points
from tafkir.report.page import frame_page, plain_table

__all__ = ["render_verification"]

_COLORS: Mapping[str, str] = {
    "experts": "c-rlvr",
    "attention": "c-sft",
    "mlp": "c-pretrain",
    "shared_experts": "c-third",
    "attention_out": "c-second",
}
_VERDICT_COLORS: Mapping[str, str] = {"kept": "c-rlvr", "not shown": "c-pretrain", "below": "c-second"}
_VERDICT_TONES: Mapping[str, str] = {"kept": "better", "not shown": "same", "below": "worse"}
_TASK_HEAD = ("Task", "Before", "After", "Points, 95 %", "Kept, 95 %", "Tokens", "Cut off", "Problems")
_PART_HEAD = ("Part", "Stored as", "Weights", "Times smaller", "Rel. error", "Worst", "Cosine", "Saturated", "Zeroed")
_WORST_HEAD = ("Weight", "Stored as", "Rel. error", "Cosine", "Worst block of 16")
_NUM_WORST = 12

Data = Mapping[str, Any]


def render_verification(data: Data) -> str:
    """The whole page.

    Args:
        data: `source` and `quantized` (names), the figures of `summarize_audit`, `tensors` (every audit as a dict),
            and where they were measured `logits` and `retention`.
    """
    tone, sentence = _sentence(data)
    sections = [part for part in (_retention(data), _weights(data), _sizes(data)) if part]
    name = str(data["quantized"])
    body = (
        f'<header class="hero {tone}"><p class="eyebrow">Tafkir verify · <b><bdi>{escape(name)}</bdi></b> made of '
        f"<bdi>{escape(str(data['source']))}</bdi></p><h1>{escape(sentence)}</h1>"
        f'<div class="beside">{_beside(data)}</div>{_facts(data)}</header><main>{"".join(sections)}</main>'
        f"<footer>{_footer(data)}</footer>"
    )
    return frame_page(f"{name} · Tafkir verify", body)


# ---- the head ----------------------------------------------------------------------------------------------------


def _sentence(data: Data) -> tuple[str, str]:
    """The tone of the page, and the finding in one sentence."""
    smaller = f"{data['ratio']:.2f} times smaller"
    retention = data.get("retention")
    if not retention:
        if "logits" in data:
            return "", f"{smaller}; predictions move by {number(data['logits']['kl_mean'])} nats on average."
        worst = max((part["relative_mse"] for part in data["parts"]), default=0.0)
        return "", f"{smaller}; a part of the weights loses at most {percent(worst, 2)} of its energy."
    limit = percent(retention["min_retention"], 0)
    tasks = [(task, task["retention"][task["metric"]]) for task in retention["tasks"]]
    known = [(task, kept) for task, kept in tasks if kept is not None]
    if not known:
        return "same", f"{smaller}; the source solves none of these problems, so nothing can be kept or lost."
    task, kept = min(known, key=lambda pair: pair[1]["value"])
    ends = {
        "kept": f"at least {limit} is shown.",
        "not shown": f"{limit} is not shown with so many problems.",
        "below": f"that is below {limit}.",
    }
    told = f"{percent(kept['value'])} of {task['task']} is kept{', the least' if len(known) > 1 else ''}"
    return _VERDICT_TONES[
        retention["verdict"]
    ], f"{smaller}; {told} ({_kept_range(kept)}): {ends[retention['verdict']]}"


def _kept_range(kept: Data) -> str:
    high = "no upper end" if kept["high"] is None else percent(kept["high"])
    return f"95 % interval {percent(kept['low'])} to {high}"


def _beside(data: Data) -> str:
    retention = data.get("retention")
    if not retention:
        return "<p>No task was asked: <code>--task wordmath</code> adds scores before and after.</p>"
    inputs = (
        "Inputs of matrices in NVFP4 were rounded as engines round them."
        if retention["activations"] == "quantized"
        else "Activations were not quantized."
    )
    return (
        "<p>Both checkpoints answered the same problems with the same seeds, and are compared problem by problem. "
        f"{escape(inputs)}</p>"
    )


def _facts(data: Data) -> str:
    facts = [("Size", size_words(data["output_bytes"]), f"before {size_words(data['source_bytes'])}")]
    if "logits" in data:
        logits = data["logits"]
        before, after = logits["perplexity_source"], logits["perplexity_quantized"]
        facts.append(("Mean KL", number(logits["kl_mean"]), f"nats a token, over {logits['tokens']:,} tokens"))
        facts.append(("Perplexity", f"{after:.3f}", f"before {before:.3f}, {signed_points(after / before - 1, 2)} %"))
        facts.append(("Same next token", percent(logits["top1_agreement"]), "of the likeliest ones"))
    changed = [tensor for tensor in data["tensors"] if tensor["relative_mse"] > 0]
    facts.append(("Weights changed", f"{len(changed):,}", f"of {len(data['tensors']):,} tensors"))
    cells = "".join(
        f"<div class=fact><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def size_words(num_bytes: float) -> str:
    """`5.75 MB`, in powers of a thousand."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f}\u202f{unit}"
    return f"{num_bytes:.0f}\u202fB"


# ---- tasks -------------------------------------------------------------------------------------------------------


def _retention(data: Data) -> str:
    retention = data.get("retention")
    if not retention:
        return ""
    limit = retention["min_retention"]
    rows = [row for task in retention["tasks"] for row in _shares(task)]
    look = (
        f"<b>Look for</b> bars that lie wholly to the right of the dashed line at {percent(limit, 0)}. A bar across it "
        "says that so many problems do not decide; more problems or more samples make it shorter."
    )
    figure = (
        f'<figure class="card">{share_plot(rows, limit, title="Share of each score that is kept")}'
        f"<figcaption>{look}</figcaption></figure>"
    )
    table = plain_table(_TASK_HEAD, [_task_row(task) for task in retention["tasks"]])
    lost = [dict(one, task=task["task"]) for task in retention["tasks"] for one in task["changed"]]
    return f"<section><h2>What is kept</h2>{figure}{table}{_lost(lost)}</section>"


def _shares(task: Data) -> Iterator[Share]:
    for metric, kept in task["retention"].items():
        note = "greedy answers" if metric == "greedy" else f"{task['samples']} samples a problem"
        color = _VERDICT_COLORS[task["verdict"]] if metric == task["metric"] else "c-baseline"
        if kept is None:
            yield Share(task["task"], f"{note}; none were right before", None, 0.0, None, color)
        else:
            yield Share(task["task"], note, kept["value"], kept["low"], kept["high"], color)


def _task_row(task: Data) -> list[str]:
    metric, lengths, kept = task["metric"], task["lengths"], task["retention"][task["metric"]]
    change = next(row for row in task["differences"] if (row["source"], row["metric"]) == ("all", metric))
    before, after = (percent(task[side]["all"][metric]["value"]) for side in ("before", "after"))
    grown = lengths["difference"]
    span = f"{number(grown['low'], 2)} to {number(grown['high'], 2)}"
    return [
        f"{task['task']}\n{'greedy' if metric == 'greedy' else 'avg@' + str(task['samples'])}",
        before,
        after,
        f"{signed_points(change['value'])}\n{signed_points(change['low'])} to {signed_points(change['high'])}",
        "–\nnothing to keep" if kept is None else f"{percent(kept['value'])}\n{_ends(kept)}",
        f"{lengths['before']:.1f} → {lengths['after']:.1f}\nchange {span}",
        f"{percent(lengths['cut_off_before'])} → {percent(lengths['cut_off_after'])}",
        f"{task['num_problems']:,}\n{change['losses']} worse, {change['wins']} better",
    ]


def _ends(kept: Data) -> str:
    return f"{percent(kept['low'])} to {'no end' if kept['high'] is None else percent(kept['high'])}"


def _lost(lost: Sequence[Data]) -> str:
    if not lost:
        return ""
    cards = "".join(
        f'<article class="card chain o-wrong"><header><span class="badge">wrong now</span>'
        f"<small><bdi>{escape(one['id'])}</bdi></small></header>"
        f'<p class="question" dir="auto">{escape(one["question"])}</p>'
        f'<div class="split"><h3>Before</h3><div class="steps">{_paragraphs(one["before"])}</div>'
        f'<h3>After</h3><div class="steps">{_paragraphs(one["after"])}</div></div>'
        f'<p class="outcome">Expected <b><bdi>{escape(one["expected"])}</bdi></b>. '
        f'<span dir="auto">{escape(one["reason"])}</span></p></article>'
        for one in lost
    )
    return (
        f"<details><summary>Right before and wrong now: {len(lost)} of the answers</summary>"
        f'<div class="chains">{cards}</div></details>'
    )


def _paragraphs(text: str) -> str:
    return (
        "".join(f'<p dir="auto">{escape(line)}</p>' for line in text.splitlines() if line.strip()) or "<p>(empty)</p>"
    )


# ---- predictions and weights -------------------------------------------------------------------------------------


def _predictions(data: Data) -> str:
    """The figure of KL by token; empty where nothing was measured."""
    logits = data.get("logits")
    if not logits or "kl_histogram" not in logits:
        return ""
    quantiles = logits["kl_quantiles"]
    guides = [(quantiles[q], word) for q, word in (("0.5", "median"), ("0.99", "99 %")) if quantiles[q] > 0]
    chart = histogram(logits["kl_histogram"], title="Divergence by token", x_label="nats (log)", guides=guides)
    look = (
        f"<b>Look for</b> a hill far to the left. On average {number(logits['kl_mean'])} nats, at most "
        f"{number(logits['kl_max'])}; nine in ten tokens stay below {number(quantiles['0.9'])}."
    )
    return (
        '<figure class="card"><h3>KL by token</h3><p class="unit">of the next token\'s distribution before, from that '
        f"after</p>{chart}<figcaption>{look}</figcaption></figure>"
    )


def _weights(data: Data) -> str:
    lines = _error_lines(data["tensors"])
    values = [value for line in lines for _, value in line.points if value]
    wide = bool(values) and max(values) > 8 * min(values)
    chart = line_chart(
        lines,
        title="Relative squared error by layer",
        x_label="layer",
        log=wide,
        y_min=None if wide else 0.0,
        y_format=lambda value: percent(value, 2) if value >= 1e-4 or not value else number(value),
        value_format=lambda value: percent(value, 3),
    )
    keys = "".join(
        f'<span class="{line.color} key-dot"><i style="color:var(--c)"></i>{escape(line.name)}</span>' for line in lines
    )
    look = (
        "<b>Look for</b> lines without spikes. Four bits lose about 0.9 % of normally distributed weights, eight bits "
        "about 0.07 %; a layer far above its neighbours has outliers."
    )
    figure = (
        f'<figure class="card"><h3>Error by layer</h3><p class="unit">squared error over squared weights'
        f'{", log scale" if wide else ""}</p>{chart}<div class="legend">{keys}</div>'
        f"<figcaption>{look}</figcaption></figure>"
        if chart
        else "<p>No weight has changed.</p>"
    )
    worst = sorted((t for t in data["tensors"] if t["relative_mse"] > 0), key=lambda t: -t["relative_mse"])[:_NUM_WORST]
    table = plain_table(_WORST_HEAD, [_worst_row(tensor) for tensor in worst], words=2) if worst else ""
    lost = f"<h3 class=group>The weights that lose most</h3>{table}" if table else ""
    return f'<section><h2>What is lost</h2><div class="cards">{_predictions(data)}{figure}</div>{lost}</section>'


def _error_lines(tensors: Sequence[Data]) -> list[Line]:
    """Mean error of each component by layer, weighted by the number of weights."""
    sums: dict[str, dict[int, list[float]]] = {}
    for tensor in tensors:
        if tensor["layer"] is not None and tensor["relative_mse"] > 0:
            found = sums.setdefault(tensor["component"], {}).setdefault(tensor["layer"], [0.0, 0.0])
            found[0] += tensor["relative_mse"] * tensor["parameters"]
            found[1] += tensor["parameters"]
    order = sorted(sums, key=lambda part: list(_COLORS).index(part) if part in _COLORS else len(_COLORS))
    return [
        Line(
            part.replace("_", " "),
            [(float(layer), total / count) for layer, (total, count) in sorted(sums[part].items())],
            _COLORS.get(part, "c-baseline"),
            dots=True,
        )
        for part in order
    ]


def _worst_row(tensor: Data) -> list[str]:
    place, error = tensor["worst_blocks"][0] if tensor["worst_blocks"] else (None, None)
    block = "–" if place is None else f"{percent(error)}\nfrom weight {place:,}"
    return [
        f"{tensor['name']}\n{tensor['component'].replace('_', ' ')}, {tensor['parameters']:,} weights",
        tensor["format"],
        percent(tensor["relative_mse"], 3),
        f"{tensor['cosine']:.5f}",
        block,
    ]


def _sizes(data: Data) -> str:
    bars = [
        SizeBar(row["component"].replace("_", " "), row["format"], row["source_bytes"], row["output_bytes"])
        for row in sorted(data["parts"], key=lambda row: -row["source_bytes"])
    ]
    chart = size_bars(bars, size_words, title="Bytes by component, before and after")
    look = "<b>Look for</b> long faint bars with short full ones: bytes before, and bytes now, scales included."
    rows = [
        [
            row["component"].replace("_", " "),
            row["format"],
            f"{row['parameters']:,}",
            f"{row['ratio']:.2f}",
            percent(row["relative_mse"], 3) if row["relative_mse"] else "none",
            percent(row["worst_relative_mse"], 3) if row["worst_relative_mse"] else "none",
            f"{row['cosine']:.5f}",
            percent(row["saturated"], 3),
            percent(row["underflowed"], 2),
        ]
        for row in data["parts"]
    ]
    return (
        f'<section><h2>Bytes</h2><figure class="card">{chart}<figcaption>{look}</figcaption></figure>'
        f"{plain_table(_PART_HEAD, rows, words=2)}</section>"
    )


def _footer(data: Data) -> str:
    said = (
        "Relative error: squared error over squared weights. Saturated: weights larger than the largest value that "
        "their block can hold. Zeroed: weights that were not zero and are now. KL in nats, of the source's "
        "distribution from the quantized one's."
    )
    retention = data.get("retention")
    kept = (
        " Kept: the score after, divided by the score before; its interval is Fieller's, with problems as clusters."
        if retention
        else ""
    )
    return f"<p>{escape(said + kept)}</p>"
