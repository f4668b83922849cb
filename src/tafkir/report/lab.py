"""What the residual laboratory measured: figures like those of arXiv 2512.24880, a table and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tafkir.report.charts import Line, Point, line_chart, number
from tafkir.report.collect import VariantRecord, series

__all__ = ["KIND_TITLES", "LAB_HEAD", "LabFigure", "lab_beside", "lab_figures", "lab_rows", "lab_sentence"]

KIND_TITLES: Mapping[str, str] = {"plain": "plain", "hc": "HC", "mhc": "mHC"}
LAB_HEAD: Sequence[str] = (
    "Residual",
    "Held-out loss",
    "Gap to plain",
    "Largest gradient norm",
    "Single gain",
    "Composed gain",
    "Column sum, max ln",
    "CPU time",
)

_COLORS: Mapping[str, str] = {"plain": "c-baseline", "hc": "c-second", "mhc": "c-third"}
_BACKWARD_COLORS: Mapping[str, str] = {"hc": "c-pretrain", "mhc": "c-rlvr"}
_PUBLISHED = (1.6, "mHC at 27B: 1.6")
Variants = Sequence[VariantRecord]


@dataclass(frozen=True, slots=True)
class LabFigure:
    """One chart: its name in file names, title, unit, what to look for, its lines, and the SVG that draws them."""

    name: str
    title: str
    unit: str
    look: str
    lines: Sequence[Line]
    chart: str


# ---- numbers -----------------------------------------------------------------------------------------------------


def _depths(variants: Variants) -> list[int]:
    return sorted({variant.depth for variant in variants})


def _kinds(variants: Variants) -> list[str]:
    return [kind for kind in KIND_TITLES if any(variant.kind == kind for variant in variants)]


def _of(variants: Variants, kind: str, depth: int) -> list[VariantRecord]:
    return [variant for variant in variants if (variant.kind, variant.depth) == (kind, depth)]


def _mean_lines(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over repeats at every step that all of them have."""
    tables = [{step: value for step, value in line if value is not None} for line in lines]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [(step, fmean(table[step] for table in tables)) for step in shared]


def _over_steps(variants: Variants, kind: str, depth: int, metric: str) -> list[Point]:
    return _mean_lines([series(variant.metrics, metric) for variant in _of(variants, kind, depth)])


def _gaps(variants: Variants, kind: str, depth: int, metric: str) -> list[list[Point]]:
    """For each repeat, how much more than its plain twin a variant loses at every step."""
    plain = {variant.seed: dict(series(variant.metrics, metric)) for variant in _of(variants, "plain", depth)}
    gaps: list[list[Point]] = []
    for variant in _of(variants, kind, depth):
        twin = plain.get(variant.seed, {})
        pairs = [(step, value, twin.get(step)) for step, value in series(variant.metrics, metric)]
        gaps.append([(step, mine - other) for step, mine, other in pairs if mine is not None and other is not None])
    return [gap for gap in gaps if gap]


def _last(variants: Variants, kind: str, depth: int, metric: str) -> list[float]:
    """The last value of a metric in each repeat."""
    lines = (series(variant.metrics, metric) for variant in _of(variants, kind, depth))
    found = [[value for _, value in line if value is not None] for line in lines]
    return [values[-1] for values in found if values]


def _peaks(variants: Variants, kind: str, depth: int, metric: str) -> list[float]:
    """The largest value of a metric in each repeat."""
    lines = (series(variant.metrics, metric) for variant in _of(variants, kind, depth))
    found = [[value for _, value in line if value is not None] for line in lines]
    return [max(values) for values in found if values]


def _profile(variants: Variants, kind: str, depth: int, metric: str) -> list[Point]:
    """The last row of a metric that has one number per sublayer, averaged over repeats."""
    rows: list[Sequence[Any]] = []
    for variant in _of(variants, kind, depth):
        own = [row[metric] for row in variant.metrics if isinstance(row.get(metric), list)]
        rows += own[-1:]
    # Rounded, so that what is one up to float32 does not open another decade of a logarithmic axis.
    return _mean_lines([[(float(i + 1), round(value, 5)) for i, value in enumerate(row) if value] for row in rows])


# ---- figures -----------------------------------------------------------------------------------------------------


def lab_figures(variants: Variants) -> list[LabFigure]:
    """Every figure that there are numbers for: by depth, then over the steps of each depth, then by sublayer."""
    figures = [*_by_depth(variants)]
    for depth in _depths(variants):
        figures += _of_one_depth(variants, depth)
    if variants:
        figures += _by_sublayer(variants, _depths(variants)[-1])
    return [figure for figure in figures if figure.chart]


def _figure(
    name: str, words: tuple[str, str, str], lines: Sequence[Line], x_label: str = "step", **options: Any
) -> LabFigure:
    title, unit, look = words
    kept = [line for line in lines if line.points]
    chart = line_chart(kept, title=f"{title}, by {x_label}", x_label=x_label, **options)
    return LabFigure(name, title, unit, look, kept, chart)


def _line(kind: str, points: Sequence[Point], *, dots: bool = False) -> Line:
    return Line(KIND_TITLES[kind], points, _COLORS[kind], dots=dots)


def _by_depth(variants: Variants) -> list[LabFigure]:
    others = [kind for kind in _kinds(variants) if kind != "plain"]
    depths = _depths(variants)
    if len(depths) < 2:
        return []

    def lines(value: Callable[[str, int], Sequence[float]]) -> list[Line]:
        drawn = []
        for kind in others:
            found = [(float(depth), value(kind, depth)) for depth in depths]
            drawn.append(_line(kind, [(depth, fmean(values)) for depth, values in found if values], dots=True))
        return drawn

    def final_gap(kind: str, depth: int) -> list[float]:
        return [gap[-1][1] or 0.0 for gap in _gaps(variants, kind, depth, "validation/loss")]

    return [
        _figure(
            "gain-by-depth",
            (
                "Composed gain by depth",
                "largest absolute row or column sum during training, log scale",
                "HC far above 1 and growing with depth; mHC near 1.",
            ),
            lines(lambda kind, depth: _peaks(variants, kind, depth, "gain/composed")),
            "layers",
            log=True,
            guide=_PUBLISHED,
        ),
        _figure(
            "column-by-depth",
            (
                "Gradients that grow or vanish",
                "largest |ln| of a composed column sum after training",
                "values near 0. The gain above only sees what grows; this also sees what fades.",
            ),
            lines(lambda kind, depth: _last(variants, kind, depth, "gain/log_column")),
            "layers",
            y_min=0.0,
        ),
        _figure(
            "gap-by-depth",
            (
                "Held-out loss gap to plain",
                "nats a byte after training, below 0 is better than plain",
                "dots below 0 by more than the repeats differ; with one repeat a small gap proves nothing.",
            ),
            lines(final_gap),
            "layers",
            guide=(0.0, "plain"),
        ),
    ]


def _of_one_depth(variants: Variants, depth: int) -> list[LabFigure]:
    others = [kind for kind in _kinds(variants) if kind != "plain"]
    gaps = {kind: _mean_lines(_gaps(variants, kind, depth, "train/loss")) for kind in others}
    return [
        _figure(
            f"gap-{depth}",
            (
                f"Loss gap to plain, {depth} layers",
                "nats a byte on the same training batches",
                "lines that settle below 0: the residual learns more from the same text.",
            ),
            [_line(kind, points) for kind, points in gaps.items()],
            guide=(0.0, "plain"),
        ),
        _figure(
            f"grad-norm-{depth}",
            (
                f"Gradient norm, {depth} layers",
                "log scale",
                "lines that stay together. Spikes of one kind alone are its residual's doing.",
            ),
            [_line(kind, _over_steps(variants, kind, depth, "train/grad_norm")) for kind in _kinds(variants)],
            log=True,
        ),
        _figure(
            f"gain-{depth}",
            (
                f"Composed gain, {depth} layers",
                "largest absolute row or column sum over all sublayers, log scale",
                "HC drifts away from 1 as it learns; mHC cannot.",
            ),
            [_line(kind, _over_steps(variants, kind, depth, "gain/composed"), dots=True) for kind in others],
            log=True,
            guide=_PUBLISHED,
        ),
    ]


def _by_sublayer(variants: Variants, depth: int) -> list[LabFigure]:
    others = [kind for kind in _kinds(variants) if kind != "plain"]
    figures = []
    for name, title, unit, look in (
        (
            "single",
            "Single mappings",
            "by sublayer: max |row sum| (forward), |column sum| (backward)",
            "values near 1: what one sublayer adds looks harmless in either kind.",
        ),
        (
            "composed",
            "Composed mappings",
            "by sublayer: the same of the product from it to the end",
            "how HC's small gains multiply towards the first sublayers, and mHC's do not.",
        ),
    ):
        lines = []
        for kind in others:
            forward = _profile(variants, kind, depth, f"gain/{name}_forward")
            backward = _profile(variants, kind, depth, f"gain/{name}_backward")
            lines.append(Line(f"{KIND_TITLES[kind]} forward", forward, _COLORS[kind]))
            lines.append(Line(f"{KIND_TITLES[kind]} backward", backward, _BACKWARD_COLORS[kind]))
        words = (f"{title}, {depth} layers", unit, look)
        figures.append(_figure(f"{name}-by-sublayer", words, lines, "no.", log=True))
    return figures


# ---- words -------------------------------------------------------------------------------------------------------


def lab_rows(variants: Variants) -> list[list[str]]:
    """Table rows, see `LAB_HEAD`: one per depth and kind, means over repeats, their standard deviation below."""
    rows = []
    for depth in _depths(variants):
        for kind in _kinds(variants):
            own = _of(variants, kind, depth)
            if not own:
                continue
            gaps = [gap[-1][1] or 0.0 for gap in _gaps(variants, kind, depth, "validation/loss")]
            norms = [value for v in own for _, value in series(v.metrics, "train/grad_norm") if value is not None]
            seconds = [float(v.result["cpu_s"]) for v in own if isinstance(v.result.get("cpu_s"), int | float)]
            rows.append(
                [
                    f"{KIND_TITLES[kind]}, {depth} layers\n{_state(own)}",
                    _with_spread(_last(variants, kind, depth, "validation/loss"), "{:.3f}"),
                    "" if kind == "plain" else _with_spread(gaps, "{:+.3f}"),
                    number(max(norms, default=None)),
                    *(_gain(variants, kind, depth, name) for name in ("gain/single", "gain/composed")),
                    _gain(variants, kind, depth, "gain/log_column"),
                    f"{fmean(seconds):.0f} s" if seconds else "–",
                ]
            )
    return rows


def _state(own: Variants) -> str:
    """What the small print says of a row's repeats."""
    lost = [variant.result["steps"] for variant in own if variant.result.get("diverged")]
    if lost:
        return f"{len(lost)} of {len(own)} diverged, after step {', '.join(map(str, lost))}"
    going = sum(not variant.result for variant in own)
    return f"{going} of {len(own)} not finished" if going else ""


def _with_spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    words = form.format(fmean(values))
    words += f"\n± {stdev(values):.3f}" if len(values) > 1 else ""
    return words.replace("-", "−")


def _gain(variants: Variants, kind: str, depth: int, metric: str) -> str:
    """The value after training, and the peak below it where that was clearly higher."""
    values = _last(variants, kind, depth, metric)
    if not values:
        return "–"
    last, peak = fmean(values), fmean(_peaks(variants, kind, depth, metric))
    return _gain_words(last) + (f"\npeak {_gain_words(peak)}" if peak > 1.05 * last else "")


def _gain_words(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 100 else number(value)


def lab_sentence(variants: Variants) -> str:
    """The finding in one sentence, from the deepest twins; empty where nothing was measured."""
    if not variants:
        return ""
    depth = _depths(variants)[-1]
    gains = {kind: _peaks(variants, kind, depth, "gain/composed") for kind in ("hc", "mhc")}
    words = [
        f"{name} up to {_gain_words(fmean(gains[kind]))} times"
        for kind, name in (("hc", "hyper-connections"), ("mhc", "mHC"))
        if gains[kind]
    ]
    if not words:
        return ""
    return f"Across {depth} layers the residual mappings amplify: {', '.join(words)}."


def lab_beside(variants: Variants) -> list[str]:
    """What belongs beside the finding: the loss gaps, and how far they can be trusted."""
    if not variants:
        return []
    depth = _depths(variants)[-1]
    gaps = {kind: _gaps(variants, kind, depth, "validation/loss") for kind in ("hc", "mhc")}
    told = [
        f"{KIND_TITLES[kind]} {_with_spread([gap[-1][1] or 0.0 for gap in found], '{:+.3f}').replace(chr(10), ' ')}"
        for kind, found in gaps.items()
        if found
    ]
    if not told:
        return []
    words = f"Held-out loss against the plain twin, in nats a byte: {', '.join(told)}."
    repeats = len({variant.seed for variant in variants})
    if repeats == 1:
        words += " There is one repeat of each variant, so small gaps prove nothing."
    return [words]
