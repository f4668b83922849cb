"""The card of results files, the shipped table of published figures, and what is measured of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.errors import RecipeError
from tafkir.eval.costs import Meter
from tafkir.eval.results_card import Shape, load_published, results_card, shape_of_model
from tafkir.plan.flops import completion_flops
from tafkir.recipe.hf_config import config_to_hf
from tafkir.recipe.presets import load_preset
from tests.eval.test_compare import sample, write


def test_rows_and_the_front() -> None:
    """Three models: a cheap one, a better one, and one that is worse for more."""
    right = {"cheap": 12, "better": 18, "waste": 11}
    samples = [sample(name, i, right=i < count, tokens=100) for name, count in right.items() for i in range(20)]
    samples[0] = replace(samples[0], outcome="error")
    sizes = {"cheap": Shape(1e9, 1e9), "better": Shape(9e9, 2e9, bytes=5e9), "waste": Shape(3e9, 3e9)}
    rows = results_card(samples, shapes=sizes, prices={"better": (0.0, 2.0)})["cards"][0]["rows"]
    cheap, better, waste = rows
    assert [row["best"] for row in rows] == [True, True, False]
    assert (cheap["failed"], cheap["num_items"], cheap["accuracy"]["value"]) == (1, 19, pytest.approx(11 / 19))
    assert better["flops"] == 2 * 2e9 * 100 and better["bytes"] == 5e9
    assert better["dollars"] == pytest.approx(1000 * 100 * 2.0 / 1e6) and waste["dollars"] is None
    assert better["tokens_per_s"] == pytest.approx(100 / 0.25)
    with pytest.raises(RecipeError, match="'nobody' has no answers here"):
        results_card(samples, prices={"nobody": (0.0, 1.0)})


def test_flops_of_an_answer_are_those_of_its_passes(tmp_path: Path) -> None:
    """A checkpoint's are counted by its config: near one pass a token from the start on, as the planner has it."""
    config = load_preset("qwen3-0.6b")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    shape = shape_of_model(str(tmp_path))
    assert shape.parameters == config.num_parameters() and shape.bytes == 1000
    whole, prompt = completion_flops(config, 1, 201), completion_flops(config, 1, 1)
    assert shape.flops(200) == pytest.approx(whole - prompt, rel=0.01)
    assert shape_of_model("qwen3-8b").flops(10) == pytest.approx(20 * shape_of_model("qwen3-8b").active_parameters)


def test_published_figures_say_where_they_are_from() -> None:
    rows = load_published()
    names = {row["name"].split(",")[0].split(" ")[0] for row in rows}
    wanted = {"Ring-flash-2.0", "DeepSeek-R1-0528", "TRM", "GPT-OSS-120B", "Qwen3-32B", "Seed-OSS-36B-Instruct"}
    assert wanted | {"Gemini-2.5-Flash"} == names
    for row in rows:
        assert row["source"].startswith("https://") and re.fullmatch(r"\d{4}-\d\d-\d\d", row["read"])
        assert all(0 <= score <= 100 for score in row.get("scores", {}).values())
        assert row.get("active_parameters", 0) <= row.get("parameters", 0)


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    own = [replace(sample("mine", i, right=i < 5), task="aime24") for i in range(10)]
    write(tmp_path / "samples.jsonl", own)
    page = tmp_path / "card.html"
    words = ["card", str(tmp_path), "--shape", "mine=qwen3-8b", "--published", "--html", str(page)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "8.19G" in done.stdout and "Seed-OSS-36B-Instruct: 91.7 %" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "active parameters" in text and "read 2026" in text
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(found["cards"][0]["published"]) == 7
    wrong = CliRunner().invoke(app, ["card", str(tmp_path / "nothing")])
    assert isinstance(wrong.exception, RecipeError) and "--task sudoku4" in str(wrong.exception)


def test_energy_is_summed_over_packages_and_wraps(tmp_path: Path) -> None:
    """Counters as Linux lays them out: two packages, one of which starts again, and a part that must not count."""
    for name, start in (("intel-rapl:0", 900), ("intel-rapl:1", 10), ("intel-rapl:0:0", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{start}\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
    with Meter(tmp_path) as meter:
        held = bytearray(30_000_000)
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("60\n")
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("500\n")
    assert meter.joules == pytest.approx((200 + 50) / 1e6) and meter.seconds > 0
    assert meter.peak_bytes is None or meter.peak_bytes > len(held)
    with Meter(tmp_path / "nowhere", tmp_path / "nobody") as blind:
        pass
    assert blind.joules is None and blind.peak_bytes is None
