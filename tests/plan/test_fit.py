"""The coefficients: what the shipped ones predict of the published rows, and how a fit finds and keeps them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tafkir.errors import DataError, RecipeError
from tafkir.plan.calibrate import left_out_errors, load_coefficients
from tafkir.plan.coefficients import DATASHEET, fitted_coefficients
from tafkir.plan.fit import PRIOR, fit_coefficients, leave_one_out, median
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.load import Fleet, predict_point
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import REFERENCES, Reference, find_shape, predict_reference, read_references
from tafkir.plan.serving import Deployment
from tests.conftest import ROOT

ROWS = read_references()


def errors(name: str, coefficients: object) -> float:
    return median([abs(getattr(predict_reference(row, coefficients), name) / getattr(row, name) - 1) for row in ROWS])  # type: ignore[arg-type]


def test_the_rows_ship_with_their_licence() -> None:
    assert len(ROWS) == 26 and "Apache License" in (REFERENCES.parent / "LICENSE").read_text()


def test_every_row_is_predicted_and_the_published_errors_hold() -> None:
    fitted = fitted_coefficients()
    result = json.loads((ROOT / "benchmarks/results/plan_fit.json").read_text())
    assert result["predicted"] == len(ROWS)
    assert errors("tpot_s", fitted) == pytest.approx(result["median_tpot_error"]["in_sample"], abs=2e-3)
    assert errors("ttft_s", fitted) == pytest.approx(result["median_ttft_error"]["in_sample"], abs=2e-3)
    assert left_out_errors()["tpot"] == pytest.approx(result["median_tpot_error"]["left_out"], abs=1e-4)
    # A pure roofline is far off; few coefficients that mean something bring it close.
    assert errors("tpot_s", DATASHEET) > 2 * errors("tpot_s", fitted)


def test_a_fit_finds_the_coefficients_that_made_the_rows() -> None:
    """Rows made up by the model itself, with other coefficients than the prior: their times come back."""
    truth = replace(PRIOR, layer_s=150e-6, first_token_steps=dict.fromkeys(PRIOR.first_token_steps, 16.0))
    rows = ROWS[:6]
    made = [
        Reference(row.fields, point.ttft_s, point.tpot_s) for row in rows for point in [predict_reference(row, truth)]
    ]
    found = fit_coefficients(made)
    worst = [abs(predict_reference(row, found).tpot_s / row.tpot_s - 1) for row in made]
    assert median(worst) < 0.05 < median([abs(predict_reference(row, PRIOR).tpot_s / row.tpot_s - 1) for row in made])


def test_what_is_left_out_is_not_seen() -> None:
    """A row that repeats another under a new name is left out with it."""
    first, other = ROWS[0], ROWS[1]
    twin = Reference({**first.fields, "id": "again"}, first.ttft_s, first.tpot_s)
    blind = predict_reference(first, fit_coefficients([other]))
    assert leave_one_out([first, twin, other])[0].tpot_s == pytest.approx(blind.tpot_s)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("model_path", "nobody/Nothing-7B", "its shape is not known"),
        ("model_path", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "another model than its name begins with"),
        ("system", "v100", "no such chip"),
        ("backend", "mlc", "engine 'mlc' is not known"),
        ("precision", "fp6", "precision 'fp6' is not known"),
        ("tp_size", "two", "tp_size is 'two'"),
    ],
)
def test_rows_that_cannot_be_predicted_say_why(column: str, value: str, says: str) -> None:
    row = Reference({**ROWS[0].fields, column: value}, 1.0, 1.0)
    with pytest.raises(RecipeError, match=says):
        predict_reference(row, DATASHEET)


def test_names_of_checkpoints_lead_to_shapes() -> None:
    names = {"nvidia/DeepSeek-R1-0528-NVFP4-v2": 671, "openai/gpt-oss-120b": 117, "zai-org/GLM-5-FP8": 743}
    for name, billions in names.items():
        assert find_shape(name).total / 1e9 == pytest.approx(billions, rel=0.01)
    assert find_shape("Qwen/Qwen3-235B-A22B-FP8").num_layers == 94


def test_tables_without_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "silicon_ttft_ms", "silicon_tpot_ms"], ["x", "", "3"]])
    with pytest.raises(DataError, match="no measured times"):
        read_references(path)
    with pytest.raises(DataError, match="no such table"):
        read_references(tmp_path / "none.csv")


def mine() -> Deployment:
    chip = load_chips(own_only=True)["h100"]
    return Deployment(find_shape("qwen3-32b"), chip, PRECISIONS["bf16"], Layout(), fitted_coefficients(), "vllm")


def test_ones_own_bench_wins(tmp_path: Path) -> None:
    """Measurements 1.5 times as slow as predicted: the plan then predicts them."""
    rows = []
    for batch in (4, 16, 64):
        point = predict_point(Fleet(replace(mine(), layout=Layout(tp=2))), batch, 1024, 256)
        rows.append({"tp": 2, "batch": batch, "prompt_tokens": 1024, "output_tokens": 256})
        rows[-1] |= {"ttft_s": point.ttft_s * 1.5, "tpot_s": point.tpot_s * 1.5}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(rows))
    found = load_coefficients(str(path), mine())
    again = predict_point(Fleet(replace(mine(), layout=Layout(tp=2), coefficients=found)), 16, 1024, 256)
    assert again.tpot_s == pytest.approx(rows[1]["tpot_s"], rel=0.03)
    assert again.ttft_s == pytest.approx(rows[1]["ttft_s"], rel=0.2)
    assert "3 measurements" in found.source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "not a list"),
        ("{", "not valid JSON"),
        ('[{"batch": -1}]', "batch = -1"),
        ('[{"batch": 1}]', "prompt_tokens"),
    ],
)
def test_bad_benches(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        load_coefficients(str(path), mine())
    with pytest.raises(RecipeError, match="no such level"):
        load_coefficients("measured")
