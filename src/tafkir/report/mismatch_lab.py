"""What the mismatch laboratory measured: figures like those of arXiv 2510.18855, a table and a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from tafkir.report.charts import Line, Point, line_chart, number, percent
from tafkir.report.collect import MismatchRecord, series
from tafkir.report.lab import LabFigure

__all__ = [
    "LOSS_TITLES",
    "MISMATCH_HEAD",
    "ROLLOUT_TITLES",
    "mismatch_beside",
    "mismatch_figures",
    "mismatch_groups",
    "mismatch_matrix",
    "mismatch_rows",
    "mismatch_sentence",
    "shares_of_exact",
]

ROLLOUT_TITLES: Mapping[str, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "fp8": "FP8",
    "nvfp4": "NVFP4 weights",
    "nvfp4_w4a4": "NVFP4 weights and inputs",
    "noise": "noisy weights",
}
LOSS_TITLES: Mapping[str, str] = {
    "grpo": "GRPO",
    "tis": "TIS",
    "icepop": "IcePop [0.5, 5]",
    "icepop_narrow": "IcePop [0.5, 2]",
    "kpop": "KPop",
}
MISMATCH_HEAD: Sequence[str] = (
    "Rollouts and loss",
    "Steps survived",
    "Held-out reward",
    "Of float32 rollouts",
    "Largest gradient norm",
    "Mean difference",
    "Largest difference",
    "Masked tokens",
    "Experts in common",
)

_COLORS: Mapping[str, str] = {
    "grpo": "c-baseline",
    "tis": "c-second",
    "icepop": "c-rlvr",
    "icepop_narrow": "c-pretrain",
    "kpop": "c-third",
}
_EXACT = "float32"
# The furthest from training first: what the sentence is about.
_HARDEST = ("nvfp4_w4a4", "nvfp4", "noise", "fp8", "bfloat16")
_STOP_LINE = 0.05
Variants = Sequence[MismatchRecord]

# Name, title, unit, what to look for, metric, logarithmic.
_PANELS: Sequence[tuple[str, str, str, str, str, bool]] = (
    (
        "reward",
        "reward",
        "mean of a step's completions",
        "lines that rise and stay; one that falls has collapsed.",
        "rollout/reward_mean",
        False,
    ),
    (
        "grad-norm",
        "gradient norm",
        "log scale",
        "lines that stay together. A growing norm comes before a collapse.",
        "train/grad_norm",
        True,
    ),
    (
        "max-difference",
        "largest |Δ log p|",
        "nats, log scale",
        "lines that do not grow: the engines disagree no more than at first.",
        "mismatch/abs_logprob_diff_max",
        True,
    ),
    (
        "masked",
        "masked tokens",
        "share of a step's tokens",
        "one or two in a thousand, as IcePop's authors saw; GRPO and TIS mask nothing.",
        "mismatch/masked_fraction",
        False,
    ),
)


def _groups(variants: Variants) -> Iterator[tuple[str, bool]]:
    """Kinds of rollouts and whether experts were replayed, as far as there are variants."""
    for rollout in ROLLOUT_TITLES:
        for replay in (False, True):
            if any((variant.rollout, variant.replay) == (rollout, replay) for variant in variants):
                yield rollout, replay


def _of(variants: Variants, rollout: str, loss: str, replay: bool) -> list[MismatchRecord]:
    return [v for v in variants if (v.rollout, v.loss, v.replay) == (rollout, loss, replay)]


def _group_title(rollout: str, replay: bool) -> str:
    return ROLLOUT_TITLES[rollout] + (", experts replayed" if replay else "")


def _values(variant: MismatchRecord, metric: str) -> list[float]:
    return [value for _, value in series(variant.metrics, metric) if value is not None]


def _mean_line(variants: Variants, metric: str) -> list[Point]:
    """The mean, at every step, over the repeats that have learned something in it."""
    found: dict[float, list[float]] = {}
    for variant in variants:
        for step, value in series(variant.metrics, metric):
            if value is not None:
                found.setdefault(step, []).append(value)
    return [(step, fmean(found[step])) for step in sorted(found)]


def mismatch_groups(variants: Variants) -> list[tuple[str, list[LabFigure]]]:
    """Each kind of rollouts with its four charts, a line for each loss: reward, gradient norm, difference, mask."""
    found = []
    for rollout, replay in _groups(variants):
        title = _group_title(rollout, replay)
        figures = [_panel(variants, (rollout, replay), panel) for panel in _PANELS]
        found.append((title, [figure for figure in figures if figure.chart]))
    return found


def _panel(variants: Variants, group: tuple[str, bool], panel: tuple[str, str, str, str, str, bool]) -> LabFigure:
    name, words, unit, look, metric, log = panel
    rollout, replay = group
    lines = [
        Line(LOSS_TITLES[loss], _mean_line(own, metric), _COLORS[loss])
        for loss in LOSS_TITLES
        if (own := _of(variants, rollout, loss, replay))
    ]
    if log:
        lines = [Line(line.name, [(x, y or None) for x, y in line.points], line.color) for line in lines]
    lines = [line for line in lines if line.points]
    title = f"{_group_title(rollout, replay)}: {words}, by step"
    # Without a mask the axis still shows a scale on which one would be seen.
    reach = 0.005 if name == "masked" else None
    chart = line_chart(lines, title=title, log=log, y_min=None if log else 0.0, y_max=reach)
    key = f"{name}-{rollout}-{'replay' if replay else 'own'}"
    return LabFigure(key, words[0].upper() + words[1:], unit, look, lines, chart)


def mismatch_figures(variants: Variants) -> list[LabFigure]:
    """The charts of all kinds of rollouts one after the other, each with its rollouts in the title."""
    return [
        replace(figure, title=f"{title}: {figure.title[0].lower()}{figure.title[1:]}")
        for title, figures in mismatch_groups(variants)
        for figure in figures
    ]


def mismatch_matrix(variants: Variants) -> tuple[list[str], list[list[str]]]:
    """The outcome at a glance: a row for each kind of rollouts, a column for each loss; head and rows.

    A cell is the held-out reward as a share of that after float32 rollouts from the same seed, and below it what did
    not survive.
    """
    losses = [loss for loss in LOSS_TITLES if any(variant.loss == loss for variant in variants)]
    rows = []
    for rollout, replay in _groups(variants):
        cells = [_matrix_cell(variants, _of(variants, rollout, loss, replay)) for loss in losses]
        title, _, beside = _group_title(rollout, replay).partition(", ")
        rows.append([f"{title}\n{beside}" if beside else title, *cells])
    return ["Rollouts", *(LOSS_TITLES[loss] for loss in losses)], rows


def _matrix_cell(variants: Variants, own: Variants) -> str:
    if not own:
        return ""
    share, done = _share_of_exact(variants, own), [v for v in own if "survived" in v.result]
    if not done:
        return "–\nnot finished"
    lost = sum(_is_lost(variant) for variant in done)
    return percent(share) + (f"\n{lost} of {len(done)} collapsed" if lost else "")


def _is_lost(variant: MismatchRecord) -> bool:
    return int(variant.result["survived"]) < int(variant.result["steps"]) or bool(variant.result.get("diverged"))


def _rewards(variants: Variants) -> list[float]:
    """Reward on held-out problems at the end, with the weights as they are, by repeat."""
    return [float(variant.result["heldout_reward"]) for variant in variants if "heldout_reward" in variant.result]


def shares_of_exact(variants: Variants, own: Variants) -> list[float]:
    """Held-out reward against that after float32 rollouts from the same seed, for each repeat that has both.

    Repeats start from models that differ by more than any loss changes, so means over different seeds must not meet.
    """
    exact: dict[int, list[float]] = {}
    for variant in variants:
        if variant.rollout == _EXACT:
            exact.setdefault(variant.seed, []).extend(_rewards([variant]))
    base = {seed: fmean(rewards) for seed, rewards in exact.items() if rewards}
    return [reward / base[v.seed] for v in own for reward in _rewards([v]) if base.get(v.seed)]


def _share_of_exact(variants: Variants, own: Variants) -> float | None:
    shares = shares_of_exact(variants, own)
    return fmean(shares) if shares else None


def _survived(own: Variants) -> list[int]:
    return [int(variant.result["survived"]) for variant in own if "survived" in variant.result]


def mismatch_rows(variants: Variants) -> list[list[str]]:
    """Table rows, see `MISMATCH_HEAD`: one per kind of rollouts, replay and loss, over all repeats."""
    rows = []
    for rollout, replay in _groups(variants):
        for loss in LOSS_TITLES:
            own = _of(variants, rollout, loss, replay)
            if not own:
                continue
            share = _share_of_exact(variants, own)
            means = [value for v in own for value in _values(v, "mismatch/abs_logprob_diff_mean")]
            masked = [value for v in own for value in _values(v, "mismatch/masked_fraction")]
            experts = [value for v in own for value in _values(v, "mismatch/expert_agreement")]
            rows.append(
                [
                    f"{_group_title(rollout, replay)}\n{LOSS_TITLES[loss]}",
                    _survival_words(own),
                    _with_spread(_rewards(own)),
                    percent(share),
                    number(max((x for v in own for x in _values(v, "train/grad_norm")), default=None)),
                    f"{fmean(means):.4f}" if means else "–",
                    number(max((x for v in own for x in _values(v, "mismatch/abs_logprob_diff_max")), default=None)),
                    f"{1000 * fmean(masked):.2f} ‰" if masked else "–",
                    percent(fmean(experts)) if experts else "–",
                ]
            )
    return rows


def _survival_words(own: Variants) -> str:
    survived = _survived(own)
    if not survived:
        return "not finished"
    steps = max(int(variant.result["steps"]) for variant in own if variant.result)
    whole = sum(count >= steps for count in survived)
    words = f"{whole} of {len(own)} to the end" if whole == len(survived) else ", ".join(map(str, sorted(survived)))
    lost = sum(bool(variant.result.get("diverged")) for variant in own)
    return words + (f"\n{lost} diverged" if lost else "")


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{fmean(values):.3f}" + (f"\n± {stdev(values):.3f}" if len(values) > 1 else "")


def mismatch_sentence(variants: Variants) -> str:
    """The finding in one sentence, from the rollouts that are furthest from training; empty without measurements."""
    for rollout in _HARDEST:
        shares = {
            loss: share
            for loss in ("icepop", "grpo")
            if (own := _of(variants, rollout, loss, False)) and (share := _share_of_exact(variants, own)) is not None
        }
        if shares:
            told = " and ".join(f"{percent(share)} with {LOSS_TITLES[loss]}" for loss, share in shares.items())
            what = f"Trained on rollouts with {ROLLOUT_TITLES[rollout]}, a model reaches {told}"
            return f"{what} of the reward after float32 rollouts."
    return ""


def mismatch_beside(variants: Variants) -> list[str]:
    """What belongs beside the finding: what collapsed, where the stop line was crossed, and how far to trust it."""
    finished = [variant for variant in variants if "survived" in variant.result]
    if not finished:
        return []
    by_loss = []
    for loss, title in LOSS_TITLES.items():
        own = [v for v in finished if v.loss == loss and v.rollout != _EXACT]
        if own:
            by_loss.append(f"{title} {sum(map(_is_lost, own))} of {len(own)}")
    told = [f"Collapsed or diverged on inexact rollouts: {', '.join(by_loss)}."] if by_loss else []
    crossed = sorted(
        {
            ROLLOUT_TITLES[v.rollout]
            for v in finished
            if (means := _values(v, "mismatch/abs_logprob_diff_mean")) and fmean(means) > _STOP_LINE
        }
    )
    if crossed:
        told.append(f"Above the stop line of {_STOP_LINE} in mean |Δ log p|: {', '.join(crossed)}.")
    if len({variant.seed for variant in variants}) == 1:
        told.append("There is one repeat of each variant, so small differences prove nothing.")
    return told
