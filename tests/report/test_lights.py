"""The mismatch monitor's lights on the page: counts, reasons, tokens as text, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tafkir.report.charts import light_strip
from tafkir.report.collect import StageRecord, collect
from tafkir.report.curves import CURVES
from tafkir.report.lights import LIGHT_NAMES, light_cells, light_sentences, token_rows
from tafkir.report.markdown import render_markdown
from tafkir.report.render import render_html
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.rundir import RunDir

MakeRun = Callable[..., RunDir]


def token(text: str, training: float | None, sampling: float, **more: Any) -> dict[str, Any]:
    found = {"example": "svamp/train/3", "position": 4, "token_id": 9, "before": "3+4=", "masked": True}
    return found | {"text": text, "logprob_training": training, "logprob_sampling": sampling} | more


EVENTS: list[Mapping[str, Any]] = [
    {"step": 3, "light": "green", "reasons": [], "tokens": [token("7", -3.0, -1.0)]},
    {"step": 5, "light": "yellow", "reasons": ["1.20% of the tokens are out of [0.5, 5]"], "tokens": []},
    {
        "step": 6,
        "light": "red",
        "reasons": ["mean |Δ log p| 0.3 is above stop = 0.05"],
        "tokens": [token("<script>\n", None, -1.0, masked=False), token(" so", -9.0, -1.0)],
    },
]


def stage(lights: list[float], events: list[Mapping[str, Any]], **more: Any) -> StageRecord:
    rows = [{"step": i + 1, "mismatch/light": light, **more} for i, light in enumerate(lights)]
    return StageRecord("rlvr", "finished", {}, rows, [], events)


def test_sentences_count_the_lights_and_say_what_was_wrong_first() -> None:
    assert light_sentences(stage([0.0] * 80, [])) == [
        "The light was green at all 80 logged steps: the two engines agree."
    ]
    # Step 6 was not logged: it is counted all the same.
    assert light_sentences(stage([0.0, 0.0, 0.0, 0.0, 1.0], EVENTS)) == [
        "Of 6 steps: 4 green, 1 yellow, 1 red.",
        "First yellow at step 5: 1.20% of the tokens are out of [0.5, 5].",
        "First red at step 6: mean |Δ log p| 0.3 is above stop = 0.05.",
    ]
    protected = stage([2.0, 0.0], [], **{"mismatch/protected": 1.0})
    assert light_sentences(protected)[-1] == "Protection was on from step 1 at the latest."
    assert light_sentences(StageRecord("rlvr", "finished", {}, [{"step": 1}], [])) == []


def test_long_runs_become_stretches_with_their_worst_light() -> None:
    lights = [0.0] * 1000
    lights[500] = 2.0
    cells = light_cells(stage(lights, []))
    assert len(cells) <= 120 and cells[0][0] == 1 and cells[-1][1] == 1000
    assert [light for _, _, light in cells if light] == [2]
    strip = light_strip(cells, LIGHT_NAMES, title="x")
    assert strip.count('class="light-red"') == 1 and strip.count("<rect") == len(cells)


def test_tokens_stand_worst_first_on_one_line() -> None:
    rows = token_rows(stage([0.0], EVENTS))
    # Isolated, so that a token in Arabic turns nothing around it.
    assert [row[0].partition("\n")[0] for row in rows] == [f"“\u2068{x}\u2069”" for x in ("<script>\\n", " so", "7")]
    assert rows[0][3:] == ["–", "–", "not finite", "no"]
    assert [cell.replace("\u202f", "") for cell in rows[2][1:]] == [
        "3",
        "svamp/train/3",
        "4.98%",
        "36.79%",
        "0.135",
        "yes",
    ]


def test_the_page_and_its_markdown_show_them(make_run: MakeRun) -> None:
    run = make_run(stages=("rlvr",), evaluate=False)
    path = run.stage("rlvr").path / "mismatch.jsonl"
    with JsonlWriter(run.stage("rlvr").metrics_path) as writer:
        writer.write(61, {"mismatch/light": 0.0, "mismatch/out_of_band": 0.002, "mismatch/expert_agreement": 0.98})
        writer.write(62, {"mismatch/light": 1.0, "mismatch/out_of_band": 0.012, "mismatch/expert_agreement": 0.9})
    with JsonlWriter(path) as writer:
        for row in EVENTS:
            writer.append(row)
    record = collect(run)
    page, text = render_html(record), render_markdown(record)
    for words in ("Do the two engines agree?", "First red at step 6", "svamp/train/3"):
        assert words in page and words in text
    assert 'class="light-red"' in page and "<script>" not in page and "<script>" not in text
    assert "Out of the band" in page and "Experts in common" in page


def test_a_run_without_lights_has_no_such_section(finished_run: RunDir) -> None:
    record = collect(finished_run)
    assert "Do the two engines agree?" not in render_html(record) + render_markdown(record)


def test_the_line_is_the_recipes_own() -> None:
    curve = next(curve for curve in CURVES["rlvr"] if curve.title == "Mismatch between engine and trainer")
    assert curve.guide is not None
    assert curve.guide({"monitor": {"stop": 0.2}}) == (0.2, "trouble above 0.2")
    assert curve.guide({}) == (0.05, "trouble above 0.05")


def test_damaged_events_are_a_note(make_run: MakeRun) -> None:
    run = make_run(stages=("rlvr",), evaluate=False)
    (run.stage("rlvr").path / "mismatch.jsonl").write_text('{"step": 1, "light": "red"}\nnot json\n', encoding="utf-8")
    record = collect(run)
    assert any("mismatch.jsonl is damaged" in note for note in record.notes)
    assert "First red at step 1" in render_html(record)
