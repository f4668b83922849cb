"""The page of `tafkir plan --html`: one file in which a reader picks model, chip and workload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from tafkir.report.page import page_style

__all__ = ["render_plan_page"]


def render_plan_page(data: Mapping[str, Any]) -> str:
    """A whole page, in English and Arabic, that asks nobody for anything.

    Args:
        data: `models` and `chips` (name by key), `workloads`, `cells` (as `plan.grid.grid_cells` gives them),
            `first` (model, chip and workload that it opens with), `notes` (lines).
    """
    page = resources.files("tafkir.report").joinpath("plan_page.html").read_text(encoding="utf-8")
    # A "</script>" inside a string would end the script.
    text = json.dumps(_rounded(data), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return page.replace("/* page.css */", page_style()).replace("/* data */ null", text)


def _rounded(value: Any) -> Any:
    """Five digits are enough to draw with."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
