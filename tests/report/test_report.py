"""The page and its markdown twin: whole, safe against what models write, and calm about what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tafkir.recipe.stage import StageContext
from tafkir.report.collect import collect
from tafkir.report.markdown import render_markdown, sparkline
from tafkir.report.render import render_html
from tafkir.report.stage import run_report
from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli

MakeRun = Callable[..., RunDir]
ContextOf = Callable[[RunDir], StageContext]

VOID = {"meta", "link", "br", "img"}
SVG_EMPTY = {"line", "rect", "circle", "path", "polyline"}


class _Checker(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_EMPTY | VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def _check(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    return checker


@pytest.fixture(scope="module")
def page_text(finished_run: RunDir) -> str:
    """The words of the page, without its markup."""
    return "".join(_check(render_html(collect(finished_run))).text)


def test_the_page_is_well_formed_and_self_contained(finished_run: RunDir) -> None:
    page = render_html(collect(finished_run))
    tags = _check(page).tags
    names = {name for name, _ in tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    links = [attrs.get(key) or "" for _, attrs in tags for key in ("src", "href", "xlink:href") if key in attrs]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\(|@import|https?://", page)
    assert not any(key.startswith("on") for _, attrs in tags for key in attrs)
    assert len(page) < 900_000


def test_anchors_lead_somewhere_and_ids_are_unique(finished_run: RunDir) -> None:
    tags = _check(render_html(collect(finished_run))).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    targets = [(attrs.get("href") or "")[1:] for name, attrs in tags if name == "a"]
    assert len(ids) == len(set(ids))
    assert targets and set(targets) <= set(ids)


def test_what_a_model_writes_stays_text(finished_run: RunDir, hostile: str) -> None:
    record = collect(finished_run, num_chains=60)
    page = render_html(record)
    checker = _check(page)
    assert hostile not in page
    assert hostile in "".join(checker.text)
    assert not {"script", "img"} & {name for name, _ in checker.tags}
    assert "default-src 'none'" in page


def test_hostile_settings_stay_text_too(make_run: MakeRun, hostile: str) -> None:
    run = make_run()
    recipe = run.recipe_path.read_text().replace("Demo: base-tiny", "</title><script>x</script>")
    run.recipe_path.write_text(recipe)
    env = json.loads(run.env_path.read_text()) | {"cpu": "<script>y</script>", "command": ["tafkir", hostile]}
    run.env_path.write_text(json.dumps(env))
    checker = _check(render_html(collect(run)))
    assert not {"script", "img"} & {name for name, _ in checker.tags}


def test_arabic_reads_right_to_left_by_itself(finished_run: RunDir, arabic: str) -> None:
    page = render_html(collect(finished_run, num_chains=40))
    assert f'<p class="question" dir="auto">{arabic}</p>' in page
    assert re.search(r'<div class="steps"><p class="mark" dir="auto">', page)


@pytest.mark.parametrize(
    "words",
    [
        "Accuracy by stage",
        "Best single operator",
        "Sum of all numbers",
        "Did a stage help?",
        "Reward",
        "Mismatch between engine and trainer",
        "Masked tokens",
        "Gradient norm",
        "Work of the experts",
        "Tokens a second",
        "Peak memory",
        "Was the test kept apart?",
        "removed before training",
        "recipe.resolved.toml",
        "learning_rate = 1e-4",
        "Example CPU @ 2.60GHz",
    ],
)
def test_everything_asked_for_is_on_the_page(page_text: str, words: str) -> None:
    assert words in page_text


def test_every_chart_says_what_to_look_for(finished_run: RunDir) -> None:
    page = render_html(collect(finished_run))
    charts = page.count('<svg class="chart"')
    assert charts >= 20
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.S)
    for figure in figures:
        if '<svg class="chart"' in figure or "iv-track" in figure:
            assert "Look for" in figure


def test_ten_chains_with_verdicts(finished_run: RunDir) -> None:
    page = render_html(collect(finished_run))
    assert page.count('<article class="card chain') == 10
    assert page.count("<summary>The stage before: ") == 10
    assert "✓ correct" in page and "✗ wrong" in page


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ("env.json", "env.json is missing"),
        ("recipe.resolved.toml", "recipe.resolved.toml is missing"),
        ("stages/06-rlvr/metrics.jsonl", "the curves of rlvr cannot be drawn"),
        ("stages/06-rlvr/timings.jsonl", ""),
        ("stages/06-rlvr/result.json", "Stage rlvr is unfinished"),
        ("stages/11-eval/result.json", "Stage eval is unfinished"),
        ("eval/word_problems-rlvr.jsonl", "its sample chains cannot be shown"),
        ("eval/word_problems-sft.jsonl", "word_problems-sft.jsonl is missing"),
    ],
)
def test_missing_files_are_said(make_run: MakeRun, missing: str, note: str) -> None:
    run = make_run()
    (run.path / missing).unlink()
    record = collect(run)
    text = "".join(_check(render_html(record)).text)
    assert note in text
    assert note in render_markdown(record).replace("\\", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("env.json", "{"),
        ("env.json", "[1]"),
        ("recipe.resolved.toml", "name = ["),
        ("stages/06-rlvr/metrics.jsonl", '{"step": 1, "train/loss": 0.5}\nnot json\n{"step": 2}\n'),
        ("stages/06-rlvr/result.json", "null"),
        ("stages/11-eval/result.json", '{"records": {"sft": "eval/none.jsonl"}, "stages": {}}'),
        ("eval/word_problems-rlvr.jsonl", '{"example_id": "a", "repeat": 0}\n'),
        ("eval/word_problems-rlvr.jsonl", '{"example_id": "a", "repeat": 0, "outco'),
    ],
)
def test_damaged_files_do_not_stop_the_report(make_run: MakeRun, name: str, content: str) -> None:
    run = make_run()
    (run.path / name).write_text(content, encoding="utf-8")
    record = collect(run)
    _check(render_html(record))
    assert render_markdown(record)


def test_rows_before_the_damage_are_shown(make_run: MakeRun) -> None:
    run = make_run()
    path = run.stage("sft").metrics_path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + "garbage\n" + "".join(lines[20:]))
    record = collect(run)
    assert len(record.stages["sft"].metrics) == 20
    assert any("metrics.jsonl:21" in note for note in record.notes)


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "empty")
    page = render_html(collect(run))
    assert "recipe.resolved.toml is missing" in page
    _check(page)


def test_values_that_were_not_finite_are_counted(make_run: MakeRun) -> None:
    run = make_run()
    path = run.stage("rlvr").metrics_path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["rollout/reward_mean"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1 value was not finite" in render_html(collect(run))


def test_steps_without_an_update_are_said(make_run: MakeRun) -> None:
    run = make_run()
    path = run.stage("rlvr").metrics_path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["train/skipped"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3 of 60 logged steps changed nothing" in render_html(collect(run))


def test_a_single_source_is_not_shown_twice(make_run: MakeRun) -> None:
    run = make_run()
    path = run.stage("eval").result_path
    result = json.loads(path.read_text())
    result["sources"] = {"gsm8k": 300}
    path.write_text(json.dumps(result))
    page = render_html(collect(run))
    assert "<small>gsm8k</small>" not in page and "<small>all problems</small>" in page


def test_the_stage_writes_both_files_and_repeats(make_run: MakeRun, context_of: ContextOf) -> None:
    run = make_run()
    result = run_report(context_of(run))
    first = run.report_html.read_bytes(), run.report_md.read_bytes()
    assert result["html_bytes"] == len(first[0]) and result["notes"] == []
    assert result["headline"].startswith("RLVR raised")
    assert run_report(context_of(run)) == result
    assert (run.report_html.read_bytes(), run.report_md.read_bytes()) == first


def test_markdown_holds_the_same_findings(finished_run: RunDir, page_text: str, hostile: str) -> None:
    text = render_markdown(collect(finished_run))
    headline = re.search(r"^\*\*(.+)\*\*$", text, flags=re.M)
    assert headline and headline[1].replace("\\", "") in page_text
    assert hostile not in re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.M | re.S)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_a_chain_cannot_leave_its_code_block(make_run: MakeRun) -> None:
    run = make_run()
    path = run.eval_dir / "word_problems-rlvr.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = "```\n# a heading of the model's own\n````\n<b>bold</b>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = render_markdown(collect(run))
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.M | re.S)
    assert "heading of the model" not in outside and "<b>" not in outside


def test_sparklines_follow_the_values() -> None:
    assert sparkline([(float(i), float(i)) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([(float(i), float(i % 7)) for i in range(1000)])) <= 24
    assert sparkline([(0.0, None)]) == ""
    assert sparkline([(0.0, 2.0), (1.0, 2.0)]) == "▁▁"


def test_a_run_of_another_version_has_its_report(make_run: MakeRun, here: Cli) -> None:
    """Its recipe cannot be run any more, and is shown as it stands; the command says so."""
    run = make_run()
    written = run.recipe_path.read_text(encoding="utf-8")
    run.recipe_path.write_text(written.replace("[report]\n", "[report]\ncolours = 7\n"), encoding="utf-8")
    done = here("report", str(run.path))
    assert done.returncode == 0 and done.stdout.strip() == str(run.report_html)
    assert "colours" in done.stderr and "shows the recipe as it stands" in done.stderr
    assert "colours = 7" in run.report_html.read_text(encoding="utf-8")
    run.recipe_path.unlink()
    assert here("report", str(run.path)).returncode == 0
    assert "the settings of this run are not known" in run.report_md.read_text(encoding="utf-8")
