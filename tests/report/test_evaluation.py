"""The report of an evaluation in both languages: whole, the same figures, nothing from outside."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.report.words import EVALUATION_WORDS
from tafkir.runlog.rundir import RunDir
from tests.eval.test_compare import sample, write


def _figures(page: str) -> list[str]:
    """The numbers in the cells of tables and beside the bars, in order."""
    places = re.findall(r'<td[^>]*>.*?</td>|<span class="iv-value">.*?</span>', page, re.S)
    return [number for place in places for number in re.findall(r"\d[\d.]*", re.sub(r"<[^>]+>", " ", place))]


def test_both_languages_say_the_same(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "results")
    samples = [sample(m, i, right=i < n, tokens=t) for m, n, t in (("a", 30, 9), ("b", 24, 12)) for i in range(40)]
    write(run.path / "samples.jsonl", [*samples[:-1], replace(samples[-1], outcome="error")])
    pages = {}
    for language in ("en", "ar"):
        done = CliRunner().invoke(app, ["report", str(run.path), "--language", language])
        assert done.exit_code == 0, done.output
        pages[language] = run.report_html.read_text(encoding="utf-8")
    assert '<html lang="ar" dir="rtl">' in pages["ar"] and '<html lang="en">' in pages["en"]
    assert _figures(pages["ar"]) == _figures(pages["en"])
    for language, page in pages.items():
        words = EVALUATION_WORDS[language]
        assert all(f'<section id="{part}"><h2>{words[part]}' in page for part in ("evaluation", "retention", "card"))
        assert "<script" not in page and "http" not in page.replace("http-equiv", "")
        assert "75.0" in page and words["worse"] in page
    keys = [set(re.findall(r"{\w+}", text)) for words in EVALUATION_WORDS.values() for text in words.values()]
    english, arabic = EVALUATION_WORDS["en"], EVALUATION_WORDS["ar"]
    assert english.keys() == arabic.keys() and keys[: len(english)] == keys[len(english) :]
