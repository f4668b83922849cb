"""The numbers and the picture of docs/mismatch-lab.md, from runs of recipes/mismatch-lab.toml, finished or not.

    tafkir run recipes/mismatch-lab.toml
    python benchmarks/mismatch_lab.py runs/mismatch-lab --out benchmarks/results/mismatch_lab.json \\
        --figures docs/img --docs docs/mismatch-lab.md

Variants that are not finished are left out and counted. The pictures show the first run: one of four panels for each
kind of rollouts, like the figures of arXiv 2510.18855. `--docs` puts tables and findings between that page's marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mhc_lab import picture

from tafkir.intervals import mean_interval
from tafkir.report.collect import MismatchRecord, RunRecord, collect, series
from tafkir.report.mismatch_lab import (
    LOSS_TITLES,
    MISMATCH_HEAD,
    ROLLOUT_TITLES,
    mismatch_beside,
    mismatch_figures,
    mismatch_matrix,
    mismatch_rows,
    shares_of_exact,
)
from tafkir.runlog.rundir import RunDir

PEAKS = {"grad_norm": "train/grad_norm", "abs_logprob_diff": "mismatch/abs_logprob_diff_max"}
MEANS = {
    "abs_logprob_diff_mean": "mismatch/abs_logprob_diff_mean",
    "masked_fraction": "mismatch/masked_fraction",
    "out_of_band": "mismatch/out_of_band",
    "ess": "mismatch/ess",
    "expert_agreement": "mismatch/expert_agreement",
}
WINDOW = 10
PICTURED = ("nvfp4", "nvfp4_w4a4", "noise")
BEGIN, END = "<!-- measured: written by benchmarks/mismatch_lab.py -->", "<!-- end -->"
# What 4-bit rollouts are asked to reach.
WANTED = 0.98


def values_of(variants: Sequence[MismatchRecord], metric: str) -> list[float]:
    """A metric at every step of every repeat."""
    return [value for v in variants for _, value in series(v.metrics, metric) if value is not None]


def ends_of(variants: Sequence[MismatchRecord]) -> list[dict[str, float]]:
    """For each repeat, the best and the last mean reward of ten steps in training."""
    rows = []
    for variant in variants:
        rewards = values_of([variant], "rollout/reward_mean")
        means = [fmean(rewards[i : i + WINDOW]) for i in range(max(1, len(rewards) - WINDOW + 1))] if rewards else [0.0]
        rows.append({"best": max(means), "last": means[-1]})
    return rows


def share_of_exact(own: Sequence[MismatchRecord], done: Sequence[MismatchRecord]) -> dict[str, Any] | None:
    """Held-out reward as a share of float32 rollouts' with the same seed: mean over repeats, Student's interval."""
    shares = shares_of_exact(done, own)
    if not shares:
        return None
    found = mean_interval(shares)
    interval = [found.low, found.high] if len(shares) > 1 else None
    return {"mean": found.value, "interval": interval, "repeats": shares}


def row_of(own: Sequence[MismatchRecord], done: Sequence[MismatchRecord]) -> dict[str, Any]:
    """One kind of rollouts with one loss, over its repeats."""
    rewards = [float(v.result["heldout_reward"]) for v in own]
    peaks = {f"{name}_max": max(values_of(own, metric), default=None) for name, metric in PEAKS.items()}
    means = {name: fmean(found) for name, metric in MEANS.items() if (found := values_of(own, metric))}
    return {
        "rollout": own[0].rollout,
        "loss": own[0].loss,
        "replay": own[0].replay,
        "repeats": len(own),
        "steps": own[0].result["steps"],
        "survived": [v.result["survived"] for v in own],
        "diverged": [v.result["diverged"] for v in own if v.result["diverged"]],
        "heldout_reward": fmean(rewards),
        "heldout_reward_sd": stdev(rewards) if len(rewards) > 1 else None,
        "share_of_float32": share_of_exact(own, done),
        "reward_in_training": ends_of(own),
        **peaks,
        **means,
        "cpu_s": fmean(float(v.result["cpu_s"]) for v in own),
    }


def run_row(record: RunRecord) -> dict[str, Any]:
    """One run: its settings, and a row for every kind of rollouts, replay and loss."""
    lab = dict(record.recipe["lab"])
    groups: dict[tuple[int, bool, int], list[MismatchRecord]] = {}
    done = [variant for variant in record.mismatch_variants if "heldout_reward" in variant.result]
    for variant in done:
        place = list(ROLLOUT_TITLES).index(variant.rollout), variant.replay, list(LOSS_TITLES).index(variant.loss)
        groups.setdefault(place, []).append(variant)
    keys = ("steps", "digits", "noise", "learning_rate", "prompts_per_step", "group_size", "updates_per_rollout")
    return {
        "recipe": record.name,
        "command": " ".join(["tafkir", *map(str, record.environment.get("command", [])[1:])]),
        "cpu": record.environment.get("cpu"),
        "torch": record.environment.get("torch"),
        **{key: lab[key] for key in keys if key in lab},
        "hidden_size": record.recipe["model"]["hidden_size"],
        "num_experts": record.recipe["model"].get("num_experts"),
        "variants": len(done),
        "not_finished": len(record.mismatch_variants) - len(done),
        "cpu_s": sum(float(variant.result["cpu_s"]) for variant in done),
        "rows": [row_of(groups[place], done) for place in sorted(groups)],
    }


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose small print follows its figures after a comma."""
    lines = [head, ["---"] * len(head), *([cell.replace("\n", ", ").strip() for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(record: RunRecord) -> str:
    """The report's two tables."""
    variants = record.mismatch_variants
    return f"{as_markdown(*mismatch_matrix(variants))}\n\n{as_markdown(MISMATCH_HEAD, mismatch_rows(variants))}"


def share_words(row: dict[str, Any]) -> str:
    share = row["share_of_float32"]
    low, high = share["interval"] or (None, None)
    between = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{LOSS_TITLES[row['loss']]} {100 * share['mean']:.1f} %{between}"


def findings(run: dict[str, Any]) -> list[str]:
    """What the rows say of the claims: who reaches 98 %, which loss is best, how much IcePop masks."""
    told = []
    for rollout, title in ROLLOUT_TITLES.items():
        rows = [
            row for row in run["rows"] if row["rollout"] == rollout and not row["replay"] and row["share_of_float32"]
        ]
        rows.sort(key=lambda row: -row["share_of_float32"]["mean"])
        if rollout == "float32" or not rows:
            continue
        reach = [LOSS_TITLES[row["loss"]] for row in rows if row["share_of_float32"]["mean"] >= WANTED]
        first, *others = map(share_words, rows)
        words = f"{title}, best first: **{first}**" + "".join(f", {other}" for other in others)
        told.append(f"{words}. {100 * WANTED:.0f} % of float32's reward is reached by {', '.join(reach) or 'none'}.")
    masked = [
        f"{1000 * row['masked_fraction']:.2f} ({ROLLOUT_TITLES[row['rollout']]})"
        for row in run["rows"]
        if row["loss"] == "icepop" and not row["replay"] and row["rollout"] != "float32" and "masked_fraction" in row
    ]
    return [*told, f"IcePop [0.5, 5] masks per mille of the tokens: {', '.join(masked)}. Its authors saw 1 to 2."]


def write_docs(page: Path, record: RunRecord, run: dict[str, Any]) -> None:
    """Put tables and findings between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    repeats = max(row["repeats"] for row in run["rows"])
    minutes = f"{run['cpu_s'] / 60:.0f} CPU-minutes"
    count = f"{run['variants']} variants, {repeats} repeat{'s' * (repeats > 1)} at most, {minutes}"
    left = f"; {run['not_finished']} were not finished and are left out" if run["not_finished"] else ""
    variants = [variant for variant in record.mismatch_variants if "heldout_reward" in variant.result]
    points = "\n".join(f"- {line}" for line in (*mismatch_beside(variants), *findings(run)))
    body = f"{count}{left}.\n\n{as_markdown(*mismatch_matrix(variants))}\n\n{points}\n\n"
    body += as_markdown(MISMATCH_HEAD, mismatch_rows(variants))
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def write_pictures(record: RunRecord, folder: Path) -> None:
    """`mismatch-lab-<rollout>.svg` for 4-bit and noisy rollouts without replay."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Any]] = {}
    for figure in mismatch_figures(record.mismatch_variants):
        _, rollout, replay = figure.name.rsplit("-", 2)
        if replay == "own" and rollout in PICTURED:
            groups.setdefault(rollout, []).append(figure)
    for name, figures in groups.items():
        (folder / f"mismatch-lab-{name}.svg").write_text(picture(figures), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--figures", type=Path, help="write the pictures to this folder")
    parser.add_argument("--docs", type=Path, help="write tables and findings of the first run into this page")
    args = parser.parse_args()
    records = [collect(RunDir.open(path)) for path in args.runs]
    for record in records:
        print(f"{record.path.name}\n\n{render(record)}\n")
    result = {"benchmark": "mismatch_lab", "runs": [run_row(record) for record in records]}
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.figures:
        write_pictures(records[0], args.figures)
    if args.docs:
        write_docs(args.docs, records[0], result["runs"][0])


if __name__ == "__main__":
    main()
