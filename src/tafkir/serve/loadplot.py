"""A picture of a load test: how many requests met which time, and how the times went over the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tafkir.errors import BackendUnavailable
from tafkir.serve.loadtest import LoadReport, Measured

__all__ = ["draw_load"]

_INK, _FIRST, _SECOND, _BAD = "#333333", "#0072b2", "#e69f00", "#d55e00"


def draw_load(measured: Sequence[Measured], report: LoadReport, path: Path) -> None:
    """Write a picture in the format that the file's name ends in.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install 'tafkir[serve]', or leave --plot out"
        raise BackendUnavailable("pictures need matplotlib", where=str(path), fix=fix) from None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    done = [m for m in measured if m.ok]
    axes: Any = figure.subplots(1, 3)
    _share(axes[0], [m.ttft_s for m in done], "time to first token, s", _FIRST)
    _share(axes[1], [m.tpot_s for m in done if m.tpot_s is not None], "time per token, s", _SECOND)
    axes[2].scatter([m.sent_s for m in done], [m.latency_s for m in done], s=10, color=_FIRST, label="answered")
    lost = [m for m in measured if not m.ok]
    if lost:
        axes[2].scatter(
            [m.sent_s for m in lost], [m.latency_s for m in lost], s=14, color=_BAD, marker="x", label="not"
        )
        axes[2].legend(frameon=False)
    axes[2].set(xlabel="sent at, s", ylabel="whole answer, s", ylim=(0, 1.08 * max(m.latency_s for m in measured)))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    figure.suptitle(
        f"{report.succeeded} of {report.requests} requests, {report.tokens_per_s:,.0f} tokens/s, "
        f"goodput {report.good_share:.0%}",
        color=_INK,
    )
    figure.savefig(path, dpi=130)


def _share(axes: Any, values: Sequence[float], label: str, color: str) -> None:
    ordered = sorted(values)
    axes.step(ordered, [100 * (i + 1) / len(ordered) for i in range(len(ordered))], where="post", color=color)
    axes.set(xlabel=label, ylabel="share of requests, %", xlim=(0, None), ylim=(0, 101))
