"""Every kind of report in a real Chromium, held to WCAG 2.2 AA by axe-core, by day and by night, on desk and phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.report.collect import collect
from tafkir.report.plan_page import render_plan_page
from tafkir.report.quantized import render_verification
from tafkir.report.render import render_html
from tafkir.runlog.rundir import RunDir
from tests.eval.test_compare import sample, write
from tests.export.browser import Browser
from tests.report.test_plan_page import data as plan_data
from tests.report.test_quantized import verification

pytestmark = pytest.mark.browser


def _pages(run: RunDir, folder: Path, hostile: str, arabic: str) -> dict[str, str]:
    """Name and HTML of each kind of page; those of results are written by the commands."""
    results = RunDir.create(folder / "results")
    write(
        results.path / "samples.jsonl",
        [sample(m, i, right=i < n) for m, n in (("a", 30), ("b", 20)) for i in range(40)],
    )
    made = {}
    for language in ("en", "ar"):
        assert CliRunner().invoke(app, ["report", str(results.path), "--language", language]).exit_code == 0
        made[f"evaluation-{language}"] = results.report_html.read_text(encoding="utf-8")
    for command in ("compare", "card"):
        page = folder / f"{command}.html"
        assert CliRunner().invoke(app, [command, str(results.path), "--html", str(page)]).exit_code == 0
        made[command] = page.read_text(encoding="utf-8")
    return {
        **made,
        "report": render_html(collect(run)),
        "verification": render_verification(verification(hostile, arabic)),
        "plan": render_plan_page(plan_data()),
    }


def test_nothing_against_wcag(finished_run: RunDir, tmp_path: Path, hostile: str, arabic: str) -> None:
    with Browser(tmp_path / "profile") as browser:
        for number, (name, html) in enumerate(_pages(finished_run, tmp_path, hostile, arabic).items()):
            (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
            # They share one sheet: every other page by night on a phone sees all of its colours.
            theme, width = (("light", 1200), ("dark", 390))[number % 2]
            browser.resize(width, 900, phone=width < 600)
            browser.prefer(theme)
            browser.open((tmp_path / f"{name}.html").as_uri())
            browser.run("new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))")
            assert browser.faults() == [], (name, theme)
        assert browser.console == []
        browser.run("document.querySelector('h1').style.color = 'var(--line)'")
        assert "color-contrast" in " ".join(browser.faults()), "the check would notice"
