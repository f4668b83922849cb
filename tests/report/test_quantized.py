"""The page of a verification: what it says, and that nothing in a checkpoint or an answer can break it."""

from __future__ import annotations

from typing import Any

import pytest

from tafkir.report.bars import Share, histogram, share_plot
from tafkir.report.quantized import render_verification


def tensor(layer: int | None, part: str, error: float, **more: Any) -> dict[str, Any]:
    return {
        "name": f"model.layers.{layer}.{part}.weight", "component": part, "layer": layer, "format": "nvfp4",
        "parameters": 4096, "source_bytes": 8192, "output_bytes": 2304, "relative_mse": error, "cosine": 0.995,
        "saturated": 0.0, "underflowed": 0.07, "worst_blocks": [(32, 0.03)] if error else [], **more,
    }  # fmt: skip


def verification(hostile: str, arabic: str) -> dict[str, Any]:
    """What `tafkir verify` may have measured, with all that could break a page in it."""
    tensors = [tensor(i, part, 0.009 + i / 1000) for i in range(4) for part in ("experts", "attention")]
    part = {**tensor(None, "experts", 0.009), "tensors": 8, "ratio": 3.55, "worst_relative_mse": 0.012}
    score = {"all": {"average": {"value": 0.45}, "greedy": {"value": 0.5}}}
    kept = {"value": 0.991, "low": 0.962, "high": None}
    row = {"source": "all", "metric": "average", "value": -0.004, "low": -0.02, "high": 0.012, "wins": 9, "losses": 12}
    task = {
        "task": hostile, "samples": 4, "metric": "average", "num_problems": 960, "before": score, "after": score,
        "retention": {"average": kept, "greedy": None}, "verdict": "not shown", "differences": [row],
        "lengths": {
            "before": 33.0, "after": 36.5, "ratio": 1.1, "cut_off_before": 0.01, "cut_off_after": 0.03,
            "difference": {"value": 3.5, "low": 2.0, "high": 5.0},
        },
        "changed": [
            {"id": "x/1", "question": arabic, "expected": "30", "before": "24+6=30", "after": hostile, "reason": "29"}
        ],
    }  # fmt: skip
    return {
        "source": "base-tiny", "quantized": hostile, "source_bytes": 10**7, "output_bytes": 3 * 10**6, "ratio": 3.33,
        "parts": [part], "tensors": [*tensors, tensor(None, "norm", 0.0)],
        "logits": {
            "tokens": 4096, "kl_mean": 0.012, "kl_max": 2.5, "kl_quantiles": {"0.5": 1e-4, "0.9": 0.03, "0.99": 0.3},
            "kl_histogram": [(10 ** (k / 6), 5 + k % 7) for k in range(-48, 3)], "perplexity_source": 3.1,
            "perplexity_quantized": 3.14, "top1_agreement": 0.97,
        },
        "retention": {"min_retention": 0.98, "activations": "quantized", "verdict": "not shown", "tasks": [task]},
    }  # fmt: skip


@pytest.fixture
def page(hostile: str, arabic: str) -> str:
    return render_verification(verification(hostile, arabic))


def test_the_page_says_what_was_found(page: str, hostile: str, arabic: str) -> None:
    assert "3.33 times smaller" in page and "99.1\u202f% of" in page and "98\u202f% is not shown" in page
    assert "no upper end" in page and "33.0 → 36.5" in page and "12 worse, 9 better" in page
    assert hostile not in page and "&lt;script&gt;" in page and "<script" not in page
    assert f'<p class="question" dir="auto">{arabic}</p>' in page
    assert page.count('<svg class="chart"') == 2 and "KL by token" in page and "none were right before" in page


def test_parts_that_were_not_measured_are_left_out(hostile: str, arabic: str) -> None:
    whole = verification(hostile, arabic)
    bare = {key: value for key, value in whole.items() if key not in ("logits", "retention")}
    page = render_verification(bare)
    assert "What is kept" not in page and "KL by token" not in page and "Error by layer" in page
    only = render_verification({**bare, "logits": whole["logits"]})
    assert "predictions move by 0.012 nats" in only
    unchanged = render_verification({**bare, "tensors": [tensor(None, "norm", 0.0)]})
    assert "No weight has changed" in unchanged


def test_a_share_plot_has_the_limit_and_a_bar_for_each_row() -> None:
    plot = share_plot([Share("wordmath", "4 samples", 0.99, 0.9, None, "c-rlvr")], 0.98, title="kept")
    assert plot.count("iv-row") == 2 and 'class="guide"' in plot and 'x2="100.00%"' in plot
    assert share_plot([], 0.98, title="kept") == "" and histogram([], title="", x_label="") == ""
    assert histogram([(1.0, 0), (10.0, 0)], title="", x_label="") == ""
