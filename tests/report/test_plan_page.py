"""The page of `tafkir plan --html` in a real browser: pickers, both languages, phone width, no request outside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.grid import Grid, grid_cells
from tafkir.plan.hardware import load_chips
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.workload import WORKLOADS
from tafkir.report.plan_page import render_plan_page
from tests.report.test_browser import _browse, _serve

PROBE = """<!doctype html><link rel="icon" href="data:,"><body>
<iframe src="report.html#qwen3-32b|h100|chat|en" style="width:390px;height:900px"></iframe>
<iframe src="report.html#qwen3-32b|h100|chat|ar" style="width:1280px;height:900px"></iframe>
<script>
window.onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, states = [];
    const look = () => states.push({
      width: root.clientWidth, scroll: root.scrollWidth, dir: root.dir, title: page.querySelector("h1").textContent,
      users: page.querySelector("#fact-users dd")?.textContent, charts: page.querySelectorAll("svg.chart").length,
      memory: [...page.querySelectorAll("#membar span")].reduce((sum, s) => sum + s.getBoundingClientRect().width, 0),
      bar: page.querySelector("#membar").clientWidth, hidden: page.querySelector("#facts").hidden,
      nan: page.body.innerHTML.includes("NaN") || page.body.innerHTML.includes("undefined"),
    });
    look();
    const chip = page.querySelector("#chip");
    chip.value = "rtx4090"; chip.dispatchEvent(new Event("change")); look();
    chip.value = "h100"; chip.dispatchEvent(new Event("change"));
    page.querySelector("#lang").click(); look();
    return states;
  });
  document.body.textContent = "PROBE" + JSON.stringify(seen) + "END";
};
</script></body>"""


def data() -> dict[str, Any]:
    known = load_chips(own_only=True)
    chips = [(known["h100"], 4), (known["rtx4090"], 1)]
    models = {"qwen3-32b": find_shape("qwen3-32b")}
    workloads = {"chat": WORKLOADS["chat"]}
    grid = Grid(models, chips, workloads, PRECISIONS["bf16"], fitted_coefficients(), requests=200)
    return {
        "models": {"qwen3-32b": "qwen3-32b"},
        "chips": {chip.key: chip.name for chip, _ in chips},
        "workloads": {"chat": {"prompt_tokens": 2048.0, "output_tokens": 512.0}},
        "cells": list(grid_cells(grid)),
        "first": {"model": "qwen3-32b", "chip": "rtx4090", "workload": "chat"},
        "notes": ["a note that would end the script: </script><b>"],
    }


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_pickers_languages_and_widths(tmp_path: Path) -> None:
    facts = data()
    users = facts["cells"][0]["layouts"][0]["users"]
    (tmp_path / "report.html").write_text(render_plan_page(facts), encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE, encoding="utf-8")
    with _serve(tmp_path) as (address, paths):
        visit = _browse(address, paths, tmp_path / "profile")
    assert set(visit.requests) == {"/probe.html", "/report.html"} and visit.console == []
    for (first, refused, turned), language in zip(visit.seen, ("ltr", "rtl"), strict=True):
        assert first["dir"] == language != turned["dir"]
        assert first["users"] == turned["users"] == f"{users:.0f}" and first["charts"] == 4
        assert "4 × NVIDIA H100" in first["title"] and "RTX" in refused["title"] and refused["hidden"]
        assert first["memory"] == pytest.approx(first["bar"], abs=1)
        for state in (first, refused, turned):
            assert state["scroll"] <= state["width"] and not state["nan"]
