"""Write the tables of docs/plan.md between their markers; with --check, say whether they are what they should be.

Chips, claims and minimum chips are computed anew; measured rows and points come from benchmarks/results/plan_*.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from tafkir.plan.advise import minimum_chips
from tafkir.plan.claims import check_claims
from tafkir.plan.hardware import load_chips
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.training import TrainJob, search_training

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plan.md"
RESULTS = ROOT / "benchmarks" / "results"
MINIMA = (
    ("ring-flash-2.0", "bf16", "h20"),
    ("deepseek-r1", "fp8", "h200"),
    ("deepseek-r1", "fp8", "h20"),
    ("deepseek-r1", "fp8", "h100"),
    ("deepseek-r1", "nvfp4", "b200"),
    ("r2-rumoured", "int8", "ascend-910b3"),
)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def chips() -> str:
    """The hardware table."""
    rows = []
    for chip in load_chips(own_only=True).values():
        p = chip.price
        price = f"{p.low:.2f} / {p.mid:.2f} / {p.high:.2f}" if p else "none"
        peaks = ", ".join(f"{name} {rate / 1e12:g}" for name, rate in chip.flops.items())
        numbers = (f"{chip.memory_bytes / 1e9:g}", f"{chip.bandwidth / 1e12:g}", f"{chip.link / 1e9:g}")
        rows.append((chip.key, peaks, *numbers, price, f"{chip.source} ({chip.date})"))
    return table(("chip", "dense TFLOPS", "GB", "TB/s", "link GB/s, one way", "$/h low / mid / high", "source"), rows)


def claims() -> str:
    """What five systems say, recomputed."""
    rows = [(claim.system, claim.claim, claim.computed, claim.verdict) for claim in check_claims()]
    return table(("system", "claim", "computed", "verdict"), rows)


def minima() -> str:
    """Chips that weights want."""
    known = load_chips(own_only=True)
    rows = [(m, p, c, str(minimum_chips(find_shape(m), PRECISIONS[p], known[c]))) for m, p, c in MINIMA]
    return table(("model", "precision", "chip", "chips"), rows)


def silicon() -> str:
    """Every row as predicted from all others."""
    found = json.loads((RESULTS / "plan_fit.json").read_text(encoding="utf-8"))
    rows = []
    for row in found["predictions"]:
        cells = [row["row"]]
        for name in ("tpot", "ttft"):
            measured, left_out = row[f"{name}_s"] * 1e3, row[f"{name}_left_out_s"] * 1e3
            cells += [f"{measured:,.1f}", f"{left_out:,.1f}", f"{left_out / measured - 1:+.0%}"]
        rows.append(tuple(cells))
    return table(("row", "TPOT ms", "left out", "off", "TTFT ms", "left out", "off"), rows)


def accuracy() -> str:
    """Medians, beside the peer's."""
    found = json.loads((RESULTS / "plan_fit.json").read_text(encoding="utf-8"))
    tpot, ttft = found["median_tpot_error"], found["median_ttft_error"]
    rows_predicted = f"{found['predicted']} of {found['rows']}"
    levels = {"data sheet alone": "datasheet", "fitted, rows it saw": "in_sample", "fitted, rows not seen": "left_out"}
    rows = [(name, rows_predicted, f"{tpot[level]:.1%}", f"{ttft[level]:.1%}") for name, level in levels.items()]
    rows.append(("aiconfigurator 0.12.0, its own 35 rows", "24 of 35", "18 %", "52 %"))
    return table(("coefficients", "rows predicted", "median TPOT error", "median TTFT error"), rows)


def points() -> str:
    """Published speeds of large fleets."""
    found = json.loads((RESULTS / "plan_points.json").read_text(encoding="utf-8"))
    rows = []
    for p in found["points"]:
        off = p["computed"] / p["published"] - 1
        what = f"{p['model']}, {p['chip']}, {p['kind']}"
        rows.append((p["source"], what, f"{p['published']:,.0f}", f"{p['computed']:,.0f}", f"{off:+.0%}", p["assumed"]))
    rows.append(("**median error**", "", "", "", f"{found['median_error']:.0%}", ""))
    return table(("source", "what", "published", "computed", "off", "assumed"), rows)


# Name, model, chip, chips, tokens, sequence, tokens of a step, FP8, software, what was published.
RUNS = (
    ("DeepSeek-V3", "deepseek-v3", "h800", 2048, 14.8e12, 4096, 62.9e6, True, "megatron", "39 % MFU, 2.664M hours"),
    ("Llama-3-405B", "llama-3.1-405b", "h100", 16384, 15.6e12, 8192, 16e6, False, "megatron", "38-43 %, 30.8M hours"),
    ("V3, Megatron", "deepseek-v3", "gb200", 256, 1e12, 4096, 33.6e6, True, "megatron", "42 % MFU, 4,185 tokens/s"),
    ("V3, TorchTitan", "deepseek-v3", "b200", 256, 1e12, 4096, 33.6e6, False, "torchtitan", "10 %, 651-859 tokens/s"),
)  # fmt: skip


def training() -> str:
    """Published training runs."""
    known = load_chips(own_only=True)
    rows = []
    for name, model, chip, count, tokens, sequence, batch, fp8, software, published in RUNS:
        job = TrainJob(find_shape(model), known[chip], count, tokens, sequence, batch, fp8, None, software)
        best = search_training(job)[0]
        numbers = (
            f"{best.mfu:.1%}",
            f"{best.tokens_per_s_per_chip:,.0f}",
            f"{best.chip_hours / 1e6:.2f}M",
            f"{best.goodput:.1%}",
        )
        rows.append((f"{name}, {tokens / 1e12:g}T tokens", f"{count} x {chip}", *numbers, str(best.layout), published))
    return table(("run", "chips", "MFU", "tokens/s a chip", "chip hours", "goodput", "layout", "published"), rows)


BLOCKS = {
    "accuracy": accuracy,
    "silicon": silicon,
    "points": points,
    "training": training,
    "minima": minima,
    "claims": claims,
    "chips": chips,
}


def written(text: str) -> str:
    """The page with every block computed anew."""
    for name, make in BLOCKS.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"docs/plan.md has {count} blocks {name!r}")
    return text


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if args.check:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
