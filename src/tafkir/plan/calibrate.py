"""Which coefficients a plan uses: the data sheet's, the fitted ones, or those that agree with one's own bench."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tafkir.errors import DataError, RecipeError
from tafkir.plan.coefficients import DATASHEET, Coefficients, fitted_coefficients
from tafkir.plan.fit import median
from tafkir.plan.layout import Layout, check_layout
from tafkir.plan.load import Fleet, predict_point
from tafkir.plan.serving import Deployment

__all__ = ["left_out_errors", "load_coefficients"]

_TABLE = Path(__file__).resolve().parent / "tables" / "coefficients.toml"
_KEYS = ("batch", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s")
_OPTIONAL = ("tp", "pp", "dp", "ep")


def left_out_errors() -> dict[str, float]:
    """Median relative errors, `tpot` and `ttft`, of published rows that the fit did not see."""
    table: dict[str, float] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["left_out"]
    return table


def load_coefficients(level: str, deployment: Deployment | None = None) -> Coefficients:
    """The coefficients of a level.

    Args:
        level: `datasheet`, `fitted`, or a JSON file of one's own measurements: a list of tables with `batch`,
            `prompt_tokens`, `output_tokens`, `ttft_s`, `tpot_s`, and the layout's `tp`, `pp`, `dp`, `ep`.
        deployment: what was measured; needed for a file.

    Raises:
        RecipeError: there is no such level or file.
        DataError: the file says what cannot be used.
    """
    if level == "datasheet":
        return DATASHEET
    if level == "fitted":
        return fitted_coefficients()
    path = Path(level)
    if not path.is_file():
        raise RecipeError(
            "no such level or file", where=f"--coefficients {level}", expected="fitted, datasheet or JSON"
        )
    if deployment is None:
        raise DataError("what was measured is not known", where=level)
    return _from_bench(_read_bench(path), deployment, path)


def _read_bench(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not valid JSON ({error})", where=str(path)) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError("not a list of measurements", where=str(path), expected=f"tables with {', '.join(_KEYS)}")
    for number, row in enumerate(rows):
        for key in (*_KEYS, *_OPTIONAL):
            value = row.get(key, 1 if key in _OPTIONAL else None)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise DataError(f"{key} = {value!r}", where=f"{path}: row {number}", expected="a positive number")
    return rows


def _from_bench(rows: list[dict[str, Any]], deployment: Deployment, path: Path) -> Coefficients:
    """The fitted coefficients, scaled so that the median measurement comes out as measured.

    One factor for what a step takes, one for a request's way to its first token: a handful of points from one server
    supports no more.
    """
    fitted = replace(deployment, coefficients=fitted_coefficients())

    def ratios(d: Deployment, name: str) -> list[float]:
        found = []
        for row in rows:
            layout = Layout(*(int(row.get(key, 1)) for key in _OPTIONAL))
            check_layout(d.shape, layout)
            fleet = Fleet(replace(d, layout=layout))
            point = predict_point(fleet, row["batch"], row["prompt_tokens"], row["output_tokens"])
            found.append(row[name] / getattr(point, name))
        return found

    slower = median(ratios(fitted, "tpot_s"))
    c = fitted.coefficients
    scaled = replace(
        c,
        bandwidth_share=c.bandwidth_share / slower,
        compute_share=c.compute_share / slower,
        network_share=c.network_share / slower,
        layer_s=c.layer_s * slower,
        source=f"{len(rows)} measurements of {path.name}: steps take {slower:.2f} times the fitted ones",
    )
    later = median(ratios(replace(fitted, coefficients=scaled), "ttft_s"))
    steps = {engine: number * later for engine, number in c.first_token_steps.items()}
    return replace(scaled, request_s=c.request_s * later, first_token_steps=steps, burst=min(1.0, c.burst * later))
