"""The numbers and pictures of docs/mhc-lab.md, from finished runs of recipes/mhc-lab.toml.

    tafkir run recipes/mhc-lab.toml
    python benchmarks/mhc_lab.py runs/mhc-lab --out benchmarks/results/mhc_lab.json --figures docs/img

The pictures show the first run; the JSON holds one row per depth and kind of every run that is named.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tafkir.report.collect import RunRecord, VariantRecord, collect, series
from tafkir.report.lab import KIND_TITLES, LAB_HEAD, LabFigure, lab_figures, lab_rows
from tafkir.runlog.rundir import RunDir

WIDTH, HEIGHT, TITLE, LEGEND = 380, 196, 34, 24
COLORS = {
    "baseline": "#8a8f98",
    "second": "#b0456f",
    "third": "#6b5bb5",
    "pretrain": "#a86a12",
    "rlvr": "#0d7f6b",
}
STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#5a6070}.title{font-size:13px;font-weight:600;fill:#1d2230}"
    ".grid{stroke:#e6e8ee}.guide{stroke:#5a6070;stroke-dasharray:4 4}.hit{display:none}"
    ".line{fill:none;stroke:var(--c);stroke-width:2.2}.raw{fill:none;stroke:var(--c);opacity:.3}"
    ".thin{fill:none;stroke:var(--c);stroke-width:1.2;opacity:.6}.dot{fill:var(--c);stroke:#fff}"
    + "".join(f".c-{name}{{--c:{color}}}" for name, color in COLORS.items())
)


def variant_row(own: Sequence[VariantRecord], plain: Sequence[VariantRecord]) -> dict[str, Any]:
    """One depth and kind: means over repeats of the last values, and the largest gain and gradient norm on the way."""

    def values(metric: str, variants: Sequence[VariantRecord] = own) -> list[list[float]]:
        return [[v for _, v in series(variant.metrics, metric) if v is not None] for variant in variants]

    def last(metric: str) -> float | None:
        ends = [line[-1] for line in values(metric) if line]
        return fmean(ends) if ends else None

    twins = {v.seed: line[-1] for v, line in zip(plain, values("validation/loss", plain), strict=True) if line}
    ended = [variant for variant in own if not variant.result.get("diverged")]
    losses = {variant.seed: line[-1] for variant, line in zip(ended, values("validation/loss", ended), strict=True)}
    gaps = [loss - twins[seed] for seed, loss in losses.items() if seed in twins]
    peaks = {name: [v for line in values(name) for v in line] for name in ("gain/composed", "train/grad_norm")}
    return {
        "kind": own[0].kind,
        "layers": own[0].depth,
        "repeats": len(own),
        "parameters": own[0].result.get("parameters"),
        "diverged": [variant.result["diverged"] for variant in own if variant.result.get("diverged")],
        "heldout_loss": last("validation/loss"),
        "heldout_gap_to_plain": fmean(gaps) if gaps else None,
        "heldout_gap_sd": stdev(gaps) if len(gaps) > 1 else None,
        "single_gain": last("gain/single"),
        "composed_gain": last("gain/composed"),
        "composed_gain_peak": max(peaks["gain/composed"], default=None),
        "max_abs_log_column_sum": last("gain/log_column"),
        "grad_norm_last": last("train/grad_norm"),
        "grad_norm_peak": max(peaks["train/grad_norm"], default=None),
        "cpu_s": fmean(float(variant.result["cpu_s"]) for variant in own),
    }


def run_row(record: RunRecord) -> dict[str, Any]:
    """One run: what it was, and a row per depth and kind."""
    lab = record.recipe["lab"]
    groups: dict[tuple[int, str], list[VariantRecord]] = {}
    for variant in record.variants:
        if variant.result:
            groups.setdefault((variant.depth, variant.kind), []).append(variant)
    order = sorted(groups, key=lambda key: (key[0], list(KIND_TITLES).index(key[1])))
    return {
        "recipe": record.name,
        "command": " ".join(["tafkir", *map(str, record.environment.get("command", [])[1:])]),
        "cpu": record.environment.get("cpu"),
        "torch": record.environment.get("torch"),
        "steps": lab["steps"],
        "tokens_per_step": lab["batch_sequences"] * lab["sequence_length"],
        "hidden_size": record.recipe["model"]["hidden_size"],
        "learning_rate": lab["learning_rate"],
        "residual": record.recipe["model"]["residual"],
        "cpu_s": record.result("lab").get("cpu_s"),
        "wall_s": record.result("lab").get("wall_s"),
        "rows": [variant_row(groups[key], groups.get((key[0], "plain"), [])) for key in order],
    }


def picture(figures: Sequence[LabFigure], columns: int = 2) -> str:
    """Charts side by side as one SVG that needs nothing else."""
    cell = TITLE + HEIGHT + LEGEND
    rows = -(-len(figures) // columns)
    width, height = columns * (WIDTH + 20), rows * cell + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for i, figure in enumerate(figures):
        x, y = 10 + i % columns * (WIDTH + 20), i // columns * cell
        chart = re.sub(
            r"^<svg [^>]*>", f'<svg x="{x}" y="{y + TITLE}" width="{WIDTH}" height="{HEIGHT}">', figure.chart
        )
        chart = re.sub(r'<g class="hit">.*(?=</svg>)', "", chart)
        parts.append(f'<text class="title" x="{x}" y="{y + 17}">{escape(figure.title)}</text>')
        parts.append(f'<text x="{x}" y="{y + 31}">{escape(figure.unit)}</text>{chart}')
        left, low = x + 10, y + TITLE + HEIGHT + 12
        for line in figure.lines:
            parts.append(f'<path class="line {line.color}" d="M{left} {low - 4}h14"/>')
            parts.append(f'<text x="{left + 18}" y="{low}">{escape(line.name)}</text>')
            left += 32 + round(5.4 * len(line.name))
    return "".join(parts) + "</svg>\n"


def write_pictures(variants: Sequence[VariantRecord], folder: Path) -> None:
    """`mhc-lab-gains.svg` and `mhc-lab-loss.svg`."""
    figures = {figure.name: figure for figure in lab_figures(variants)}
    deepest = max(variant.depth for variant in variants)
    middle = sorted({variant.depth for variant in variants})[-2:]
    gains = ["gain-by-depth", f"gain-{deepest}", "single-by-sublayer", "composed-by-sublayer"]
    losses = ["gap-by-depth", "column-by-depth", *(f"{name}-{d}" for name in ("gap", "grad-norm") for d in middle)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("gains", gains), ("loss", losses)):
        kept = [figures[key] for key in wanted if key in figures]
        (folder / f"mhc-lab-{name}.svg").write_text(picture(kept), encoding="utf-8")


def render(record: RunRecord) -> str:
    """The report's table as markdown."""
    rows = [[cell.replace("\n", " ").strip() for cell in row] for row in lab_rows(record.variants)]
    lines = [LAB_HEAD, ["---"] * len(LAB_HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--figures", type=Path, help="write the pictures to this folder")
    args = parser.parse_args()
    records = [collect(RunDir.open(path)) for path in args.runs]
    for record in records:
        print(f"{record.path.name}\n\n{render(record)}\n")
    result = {"benchmark": "mhc_lab", "runs": [run_row(record) for record in records]}
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.figures:
        write_pictures(records[0].variants, args.figures)


if __name__ == "__main__":
    main()
