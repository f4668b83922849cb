"""Which curves the page shows for each training stage, and what to look for in each: data, not code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tafkir.report.charts import Line, line_chart, number, percent
from tafkir.report.collect import RunRecord, StageRecord, series
from tafkir.report.findings import STAGE_TITLES

__all__ = ["CURVES", "SPEED_CURVES", "Curve", "curve_lines", "draw_lines", "final_loads", "speed_lines", "value_words"]

Guide = Callable[[Mapping[str, Any]], tuple[float, str] | None]


@dataclass(frozen=True, slots=True)
class Curve:
    """One chart: the metrics it draws (name in the file -> name in the legend) and one sentence on what to look for."""

    title: str
    look: str
    metrics: Mapping[str, str]
    source: Literal["metrics", "timings"] = "metrics"
    unit: str = ""
    log: bool = False
    share: bool = False
    y_min: float | None = None
    y_max: float | None = None
    guide: Guide | None = None


def _clip_limit(table: Mapping[str, Any]) -> tuple[float, str] | None:
    limit = table.get("max_grad_norm")
    return (float(limit), f"clipped above {limit:g}") if isinstance(limit, int | float) else None


def _lost_above(table: Mapping[str, Any]) -> tuple[float, str] | None:
    # Without a monitor of its own, the threshold at which Ring's authors call a run lost (arXiv 2510.18855).
    monitor = table.get("monitor")
    stop = monitor.get("stop") if isinstance(monitor, Mapping) else None
    limit = float(stop) if isinstance(stop, int | float) else 0.05
    return limit, f"trouble above {limit:g}"


_LOSS = Curve(
    "Loss",
    "a steady fall. Validation dots that turn up while training keeps falling mean that the model learns by heart.",
    {"train/loss": "training", "validation/loss": "validation"},
    unit="nats a token",
)
_GRAD_NORM = Curve(
    "Gradient norm",
    "spikes that grow: there should be none. Steps above the dashed line were cut back to it.",
    {"train/grad_norm": "norm"},
    y_min=0.0,
    guide=_clip_limit,
)
_ROUTER = Curve(
    "Balance of the experts",
    "values near 100 %: every expert does its share. A fall means that a few experts do the work of all.",
    {"router/load_entropy": "evenness"},
    unit="entropy of the load, share of the largest possible",
    share=True,
    y_max=1.0,
)
_ACCEPTANCE = Curve(
    "Drafts that would be accepted",
    "a rise: the more often the extra layers foresee the model's own next choice, the more tokens a step of "
    "speculative decoding yields. The second layer looks one token further and is right less often.",
    {f"validation/mtp_acceptance/{depth}": f"layer {depth}" for depth in (1, 2, 3)},
    unit="share of held-out tokens where multi-token prediction and model agree",
    share=True,
    y_min=0.0,
    y_max=1.0,
)

_REWARD_CURVES = (
    Curve(
        "Loss",
        "a fall that the validation follows. Where only training falls, the model learns its pairs by heart.",
        {"train/loss": "training", "validation/loss": "validation"},
        unit="nats a pair; 0.693 is guessing",
    ),
    Curve(
        "Pairs in the right order",
        "a rise of the validation's dots above one half.",
        {"reward/accuracy": "training", "validation/accuracy": "validation"},
        share=True,
        y_min=0.0,
        y_max=1.0,
    ),
    _GRAD_NORM,
)
_DPO_CURVES = (
    _REWARD_CURVES[0],
    Curve(
        "Pairs in the right order",
        "a rise: the policy, against its reference, prefers what people prefer.",
        {"dpo/accuracy": "training", "validation/accuracy": "validation"},
        share=True,
        y_min=0.0,
        y_max=1.0,
    ),
    Curve(
        "Margin and the preferred side's reward",
        "both above zero. Where the preferred side falls below it, the preferred answers become less likely, too.",
        {"dpo/margin": "margin", "dpo/chosen_reward": "preferred side"},
        unit="beta times the log-ratio",
    ),
    _GRAD_NORM,
)
_RLHF_CURVES = (
    Curve(
        "Reward and judge",
        "two lines that rise together. Where the reward rises and the held-out judge falls, the policy has found what "
        "only its own reward model likes.",
        {"rlhf/reward": "reward", "rlhf/judge_reward": "held-out judge"},
        unit="mean of a step",
    ),
    Curve(
        "Distance from the first policy",
        "a slow rise below the budget.",
        {"rlhf/kl": "KL"},
        unit="nats a completion",
        y_min=0.0,
    ),
    Curve(
        "Length of the answers",
        "neither a run to the limit nor a collapse: a reward that likes length shows here first.",
        {"rlhf/length": "mean"},
        unit="tokens",
        y_min=0.0,
    ),
    Curve(
        "Answers without a grade",
        "none. Their groups are left out.",
        {"rlhf/ungraded": "answers"},
        y_min=0.0,
    ),
)

_QAT_CURVES = (
    Curve(
        "Divergence from the model before",
        "a fall: what quantization had cost is won back. Dots are held-out problems.",
        {"train/kl": "training", "validation/kl": "validation"},
        unit="nats a token",
        y_min=0.0,
    ),
    _LOSS,
    _GRAD_NORM,
)

CURVES: Mapping[str, Sequence[Curve]] = {
    "pretrain": (_LOSS, _ACCEPTANCE, _GRAD_NORM, _ROUTER),
    "sft": (_LOSS, _ACCEPTANCE, _GRAD_NORM, _ROUTER),
    "reward": _REWARD_CURVES,
    "dpo": _DPO_CURVES,
    "rlhf": _RLHF_CURVES,
    "qat": _QAT_CURVES,
    "mtp": (
        Curve(
            "Divergence from the model",
            "a fall: the layers foresee the model's own next choices better.",
            {"train/loss": "training"},
            unit="nats a token, mean of the layers",
            y_min=0.0,
        ),
        _ACCEPTANCE,
        _GRAD_NORM,
    ),
    "trm": (
        Curve(
            "Loss of the cells",
            "a fall that goes on: the batch holds puzzles at every depth of their solution.",
            {"train/token_loss": "training"},
            unit="nats a cell",
        ),
        Curve(
            "Right answers",
            "validation dots that climb to the top. Training shows cells, of puzzles that are only begun, too.",
            {"train/cells": "training cells", "validation/exact": "validation grids"},
            share=True,
            y_min=0.0,
            y_max=1.0,
        ),
        Curve(
            "Supervision steps",
            "a fall: the halting head learns to tell that an answer is right, and puzzles make room for new ones.",
            {"train/supervision_steps": "training", "validation/supervision_steps": "validation"},
            unit="mean over puzzles that halt",
            y_min=0.0,
        ),
        _GRAD_NORM,
    ),
    "rlvr": (
        Curve(
            "Reward",
            "a rise that outlasts the jitter. A flat line means that the model learns nothing from its own tries.",
            {"rollout/reward_mean": "reward"},
            unit="mean over the tries of a step",
        ),
        Curve(
            "Accuracy of the tries",
            "a rise with the reward. These are training problems: the held-out figure above is the one to believe.",
            {"rollout/accuracy": "correct"},
            share=True,
            y_min=0.0,
        ),
        Curve(
            "Problems that teach nothing",
            "values well below 100 %. These are problems whose tries all got the same reward: too easy or too hard.",
            {"rollout/zero_variance_groups": "share"},
            share=True,
            y_min=0.0,
            y_max=1.0,
        ),
        Curve(
            "Mismatch between engine and trainer",
            "flat lines far below the dashed one. Growth means that the engine that answers and the model that learns "
            "drift apart, which IcePop guards against.",
            {"mismatch/abs_logprob_diff_mean": "mean", "mismatch/abs_logprob_diff_max": "max"},
            unit="|Δ log p| a token, log scale",
            log=True,
            guide=_lost_above,
        ),
        Curve(
            "Divergence of the engines",
            "flat lines. Growth here without a growing mean means that a few tokens carry all of it.",
            {"mismatch/kl": "KL"},
            unit="KL(sampling || training), nats a token, log scale",
            log=True,
        ),
        Curve(
            "Out of the band",
            "values near zero. Answers leave the band by the product of their tokens' ratios, so they do it first.",
            {"mismatch/out_of_band": "tokens", "mismatch/out_of_band_sequences": "answers"},
            unit="probability ratio of the engines outside the monitor's band",
            share=True,
            y_min=0.0,
            y_max=0.001,
        ),
        Curve(
            "Masked tokens",
            "values near zero. These tokens fell outside IcePop's band and teach nothing; they grow with the mismatch.",
            {"mismatch/masked_fraction": "tokens", "mismatch/masked_sequences": "answers with one"},
            share=True,
            y_min=0.0,
            y_max=0.001,
        ),
        Curve(
            "Useful sample size",
            "values near 100 %: the tries are as good as ones drawn from the model that is being trained.",
            {"mismatch/ess": "effective share"},
            share=True,
            y_max=1.0,
        ),
        Curve(
            "Experts in common",
            "values near 100 %: the tokens visit the same experts in sampling and in learning.",
            {"mismatch/expert_agreement": "choices"},
            share=True,
            y_max=1.0,
        ),
        Curve(
            "Length of the answers",
            "neither a run to the limit nor a collapse to nothing.",
            {"rollout/length_mean": "mean"},
            unit="tokens",
            y_min=0.0,
        ),
        Curve(
            "Cut-off and missing answers",
            "a fall. Cut-off tries hit the length limit; unanswered ones hold no answer that can be read.",
            {"rollout/truncated": "cut off", "rollout/unanswered": "unanswered"},
            share=True,
            y_min=0.0,
        ),
        Curve(
            "Entropy",
            "a gentle fall. At zero the model has stopped trying anything new. Masked tokens lie above the others.",
            {"train/entropy": "sampled", "mismatch/entropy": "exact", "mismatch/entropy_masked": "masked tokens"},
            unit="nats a token",
            y_min=0.0,
        ),
        Curve(
            "Loss",
            "sudden jumps: there should be none. Its size says little in reinforcement learning.",
            {"train/loss": "loss"},
        ),
        _GRAD_NORM,
        _ROUTER,
    ),
}

SPEED_CURVES: Sequence[Curve] = (
    Curve(
        "Tokens a second",
        "flat lines. A dip is another program on the machine or a longer batch.",
        {"time/tokens_per_s": ""},
        source="timings",
        unit="over each stage, from its start to its end",
        y_min=0.0,
    ),
    Curve(
        "Seconds a step",
        "the share of a reinforcement-learning step that goes into writing answers (rollouts).",
        {"time/step_s": "", "time/rollout_s": "rollouts"},
        source="timings",
        unit="over each stage, from its start to its end",
        y_min=0.0,
    ),
    Curve(
        "Peak memory",
        "lines that level off. One that keeps climbing would be a leak.",
        {"memory/peak_rss_bytes": ""},
        source="timings",
        unit="over each stage, from its start to its end",
        y_min=0.0,
    ),
)


def curve_lines(curve: Curve, stage: StageRecord) -> list[Line]:
    """The lines of a curve that the stage has numbers for; validation shows as dots."""
    rows = stage.metrics if curve.source == "metrics" else stage.timings
    colors = (f"c-{stage.kind}", "c-second", "c-third")
    found = [(name, legend, series(rows, name)) for name, legend in curve.metrics.items()]
    kept = [(name, legend, points) for name, legend, points in found if any(v is not None for _, v in points)]
    return [
        Line(legend, points, colors[min(i, 2)], dots=name.startswith("validation/"))
        for i, (name, legend, points) in enumerate(kept)
    ]


def speed_lines(curve: Curve, record: RunRecord) -> list[Line]:
    """One line a training stage, over the share of the stage that is done, in percent."""
    lines = []
    for kind, stage in record.stages.items():
        for i, line in enumerate(curve_lines(curve, stage)):
            last = max(step for step, _ in line.points)
            points = [(100 * step / last if last else 0.0, value) for step, value in line.points]
            name = f"{STAGE_TITLES.get(kind, kind)} {line.name}".strip()
            lines.append(Line(name, points, line.color if i == 0 else "c-second"))
    return lines


def draw_lines(
    curve: Curve, lines: Sequence[Line], *, x_label: str = "step", guide: tuple[float, str] | None = None
) -> str:
    """The chart as SVG; empty where there are no numbers for it."""
    options: dict[str, Any] = {"value_format": value_words(curve)}
    if curve.share:
        options["y_format"] = _share_tick
    elif "memory/peak_rss_bytes" in curve.metrics:
        options["y_format"] = _gigabytes
    return line_chart(
        lines,
        title=f"{curve.title} over the steps",
        x_label=x_label,
        log=curve.log,
        y_min=curve.y_min,
        y_max=curve.y_max,
        guide=guide,
        **options,
    )


def value_words(curve: Curve) -> Callable[[float], str]:
    """How a value of the curve is written."""
    if curve.share:
        return percent
    return _gigabytes if "memory/peak_rss_bytes" in curve.metrics else _four_digits


def _four_digits(value: float) -> str:
    return number(value, 4)


def _share_tick(value: float) -> str:
    return f"{100 * value:.6g}%"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value else "0"


def final_loads(stage: StageRecord, rows: int = 10) -> list[tuple[str, list[float | None]]]:
    """Per MoE layer the experts' shares of the tokens, averaged over the stage's last rows."""
    recent = [row for row in stage.metrics if any(key.startswith("router/load/") for key in row)][-rows:]
    layers = sorted({int(key.rsplit("/", 1)[1]) for row in recent for key in row if key.startswith("router/load/")})
    strips: list[tuple[str, list[float | None]]] = []
    for layer in layers:
        loads = [row[f"router/load/{layer}"] for row in recent if isinstance(row.get(f"router/load/{layer}"), list)]
        size = min((len(load) for load in loads), default=0)
        means = [_mean([load[expert] for load in loads]) for expert in range(size)]
        strips.append((f"Layer {layer + 1}", means))
    return strips


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite else None
