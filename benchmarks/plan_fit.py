"""Fit the planner's coefficients on published serving points, with every point predicted from all others.

Writes benchmarks/results/plan_fit.json and, with --write, the coefficients that `tafkir plan` uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tafkir.errors import TafkirError
from tafkir.plan import coefficients as table
from tafkir.plan.coefficients import DATASHEET, Coefficients, fitted_coefficients
from tafkir.plan.fit import LeaveOneOut, fit_coefficients, leave_one_out, median
from tafkir.plan.references import REFERENCES, Reference, predict_reference, read_references

RESULT = Path(__file__).resolve().parent / "results" / "plan_fit.json"


def main() -> None:
    """Fit, predict each point from the others, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=REFERENCES, help="a table with the columns of the shipped one")
    parser.add_argument("--try-rows", type=Path, metavar="FILE", help="predict a table with the shipped coefficients")
    parser.add_argument("--write", action="store_true", help="write the coefficients that the planner uses")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.try_rows:
        try_rows(args.try_rows)
        return
    start = time.process_time()
    references = read_references(args.rows)
    predictable, refused = split(references)
    fitted = fit_coefficients(predictable, source=f"fitted on {len(predictable)} published rows")
    left_out = leave_one_out(predictable)
    result = summary(fitted, left_out, refused, time.process_time() - start)
    show(left_out, refused, result)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.write:
        write(fitted, result)


def try_rows(path: Path) -> None:
    """Rows that nobody fitted, by what ships; refused ones with their reason."""
    predictable, refused = split(read_references(path))
    points = [predict_reference(reference, fitted_coefficients()) for reference in predictable]
    unseen = [LeaveOneOut(row, p.ttft_s, p.tpot_s) for row, p in zip(predictable, points, strict=True)]
    print_rows(unseen, refused)
    for name in ("tpot", "ttft"):
        errors = [abs(getattr(row, f"{name}_error")) for row in unseen]
        print(f"median {name} error {median(errors):.1%} of {len(errors)}, {len(refused)} refused")


def split(references: list[Reference]) -> tuple[list[Reference], dict[str, str]]:
    """Rows that the model can say something about, and why it refuses the others."""
    predictable, refused = [], {}
    for reference in references:
        try:
            predict_reference(reference, DATASHEET)
        except TafkirError as error:
            refused[reference.name] = str(error)
        else:
            predictable.append(reference)
    return predictable, refused


def summary(fitted: Coefficients, left_out: list[LeaveOneOut], refused: dict[str, str], cpu_s: float) -> dict[str, Any]:
    """Medians in sample and left out, and every row."""
    sheet = [predict_reference(row.reference, DATASHEET) for row in left_out]
    inside = [predict_reference(row.reference, fitted) for row in left_out]
    rows = [
        {
            "row": row.reference.name,
            "ttft_s": row.reference.ttft_s,
            "ttft_left_out_s": row.ttft_s,
            "tpot_s": row.reference.tpot_s,
            "tpot_left_out_s": row.tpot_s,
        }
        for row in left_out
    ]

    def error(points: list[Any], name: str) -> float:
        pairs = zip(points, left_out, strict=True)
        return median([abs(getattr(p, name) / getattr(row.reference, name) - 1) for p, row in pairs])

    return {
        "rows": len(left_out) + len(refused),
        "predicted": len(left_out),
        "median_tpot_error": {
            "left_out": median([abs(r.tpot_error) for r in left_out]),
            "in_sample": error(inside, "tpot_s"),
            "datasheet": error(sheet, "tpot_s"),
        },
        "median_ttft_error": {
            "left_out": median([abs(r.ttft_error) for r in left_out]),
            "in_sample": error(inside, "ttft_s"),
            "datasheet": error(sheet, "ttft_s"),
        },
        "coefficients": {name: getattr(fitted, name) for name in Coefficients.__dataclass_fields__},
        "cpu_s": cpu_s,
        "refused": refused,
        "predictions": rows,
    }


def show(left_out: list[LeaveOneOut], refused: dict[str, str], result: dict[str, Any]) -> None:
    """Every row left out, then the medians."""
    print_rows(left_out, refused)
    for name in ("median_tpot_error", "median_ttft_error"):
        print(name, {key: f"{value:.1%}" for key, value in result[name].items()})
    print(result["coefficients"])


def print_rows(left_out: list[LeaveOneOut], refused: dict[str, str]) -> None:
    """Every row, and why others were refused."""
    print(f"{'row':<64} {'TPOT ms':>8} {'left out':>9} {'':>6}  {'TTFT ms':>8} {'left out':>9}")
    for row in left_out:
        measured = row.reference
        print(
            f"{measured.name[-64:]:<64} {measured.tpot_s * 1e3:8.1f} {row.tpot_s * 1e3:9.1f} {row.tpot_error:+6.0%}  "
            f"{measured.ttft_s * 1e3:8.0f} {row.ttft_s * 1e3:9.0f} {row.ttft_error:+6.0%}"
        )
    for name, why in refused.items():
        print(f"refused {name}: {why}")


def write(fitted: Coefficients, result: dict[str, Any]) -> None:
    """The table that `tafkir.plan.coefficients` reads."""
    lines = ["# Written by `python benchmarks/plan_fit.py --write`: do not edit.", "", "[fitted]"]
    constants = fitted.first_token_steps
    for name in Coefficients.__dataclass_fields__:
        value = getattr(fitted, name)
        if name == "first_token_steps":
            inner = ", ".join(f"{engine} = {constants[engine]:.6g}" for engine in sorted(constants))
            lines.append(f"{name} = {{ {inner} }}")
        else:
            lines.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value:.6g}")
    lines += ["", "# Median relative error of rows that the fit did not see.", "[left_out]"]
    lines += [f"{name} = {result[f'median_{name}_error']['left_out']:.4f}" for name in ("tpot", "ttft")]
    path = Path(table.__file__).resolve().parent / "tables" / "coefficients.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
