"""What the recursive model's recipes reach, beside networks that answer directly and variants that lack one thing each.

python benchmarks/trm_ablations.py --out benchmarks/results/trm.json
python benchmarks/trm_ablations.py --only figures --threads 1 --out benchmarks/results/trm.json

Every run is `tafkir run` of a shipped recipe with `--set`, below --runs-dir. What is finished there is not run again,
and a killed run goes on where it was: the same command continues. "figures": each recipe with three seeds. "direct":
the same network without recursion (T = 1, n = 1, one supervision step), for as many FLOPs of training as the recipe's;
of mazes also one whose mixer sees the whole grid at once, and has several times the parameters.
"ablations": variants of the shortened 4x4 recipe; one thing is changed in each, all have the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import write_between

from tafkir.intervals import wilson
from tafkir.recipe.load import load_recipe
from tafkir.recipe.trm import TrmConfig
from tafkir.runlog.atomic import write_json

RECIPES = ("trm-sudoku4", "trm-sudoku6", "trm-maze-small")
SEEDS = (0, 1, 2)
DIRECT = ("num_recursions=1", "num_latent_steps=1", "max_supervision_steps=1")
SEES_ALL = ("trm.model.mixer=mlp",)


@dataclass(frozen=True)
class Variant:
    """A recipe with changes, and the seeds that it is run with."""

    part: str
    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS


def config_of(recipe: str, *overrides: str) -> TrmConfig:
    config = load_recipe([recipe], list(overrides)).recipe.trm
    assert config is not None
    return config


def flops_of(config: TrmConfig) -> float:
    """Of a training step of one puzzle; the symbols do not count."""
    shape = config.model.for_puzzles(8, config.puzzles.num_cells or 0)
    return shape.flops_per_supervision_step(train=True)


def direct(recipe: str, name: str = "direct", network: tuple[str, ...] = ()) -> Variant:
    """As many FLOPs as the recipe: fewer passes a step, more steps; `network` changes what is no recursion."""
    changes = (*network, *(f"trm.model.{word}" for word in DIRECT), "trm.curriculum=")
    config = config_of(recipe)
    steps = round(config.steps * flops_of(config) / flops_of(config_of(recipe, *changes)))
    return Variant("direct", f"{recipe}-{name}", recipe, (*changes, f"trm.steps={steps}"), seeds=(0,))


ABLATIONS: dict[str, tuple[str, ...]] = {
    "as-it-is": (),
    "no-ema": ("trm.ema=",),
    "one-step-gradient": ("trm.model.gradient=one_step",),
    "attention": ("trm.model.mixer=attention", "trm.model.position_encoding=rope"),
    "t1-n3": ("trm.model.num_recursions=1",),
    "t3-n3": ("trm.model.num_recursions=3",),
    "t2-n1": ("trm.model.num_latent_steps=1",),
    "t2-n6": ("trm.model.num_latent_steps=6",),
    "n-sup-1": ("trm.model.max_supervision_steps=1",),
    "no-act": ("trm.act=false",),
    "single-latent": ("trm.model.latents=z",),
    "two-networks": ("trm.model.separate_networks=true",),
    "softmax": ("trm.loss=softmax",),
    "no-augmentation": ("trm.puzzles.augment=false",),
}


def variants(steps: int) -> Iterator[Variant]:
    """All of them, the most wanted first."""
    for recipe in RECIPES:
        yield Variant("figures", recipe, recipe)
    for recipe in RECIPES:
        yield direct(recipe)
    yield direct("trm-maze-small", "direct-mlp", SEES_ALL)
    for name, overrides in ABLATIONS.items():
        shorter = (f"trm.steps={steps}", "trm.curriculum=")
        yield Variant("ablations", f"sudoku4-{name}", "trm-sudoku4", (*shorter, *overrides), seeds=(0,))


def result_of(runs_dir: Path, name: str) -> dict[str, Any] | None:
    """What a finished run found."""
    found = sorted((runs_dir / name / "stages").glob("*-trm/result.json"))
    return json.loads(found[0].read_text(encoding="utf-8")) if found else None


def run(variant: Variant, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, as a user starts it."""
    name = f"{variant.name}-{seed}"
    done = result_of(args.runs_dir, name)
    if done is not None:
        return done
    overrides = (f"seed={seed}", f"threads={args.threads}", *variant.overrides)
    command = [sys.executable, "-m", "tafkir.cli.main", "run", variant.recipe, "--name", name]
    command += ["--runs-dir", str(args.runs_dir), *(word for value in overrides for word in ("--set", value))]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    done = result_of(args.runs_dir, name)
    assert done is not None
    return done


def row_of(variant: Variant, by_seed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, over the seeds that are done."""
    results = list(by_seed.values())
    exact = [result["test"]["exact"] for result in results]
    shares = [share["value"] for share in exact]
    problems = sum(share["num_problems"] for share in exact)
    solved = sum(round(share["value"] * share["num_problems"]) for share in exact)
    return {
        "part": variant.part,
        "name": variant.name,
        "recipe": variant.recipe,
        "overrides": variant.overrides,
        "seeds": list(by_seed),
        "exact": shares,
        "exact_median": statistics.median(shares),
        "exact_pooled": wilson(solved, problems).to_dict(),
        "cells": [result["test"]["cells"] for result in results],
        "halted_exact": [result["test"]["halting"]["exact"]["value"] for result in results],
        "halted_steps": [result["test"]["halting"]["mean_steps"] for result in results],
        "by_step": results[0]["test"]["by_step"],
        "steps": results[0]["steps"],
        "wall_s": [result["wall_s"] for result in results],
        "cpu_s": [result["cpu_s"] for result in results],
        "parameters": results[0]["parameters"],
        "flops_per_supervision_step": results[0]["flops_per_supervision_step"],
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
    }


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """As Markdown has it."""
    lines = [
        "| run | whole grids right (95 %) | by seed | steps | CPU-s | seconds | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pooled = row["exact_pooled"]
        interval = f"{100 * pooled['low']:.1f} to {100 * pooled['high']:.1f}"
        seeds = ", ".join(f"{100 * share:.1f}" for share in row["exact"])
        lines.append(
            f"| `{row['name']}` | {percent(row['exact_median'])} ({interval}) | {seeds} | {row['steps']:,} | "
            f"{statistics.median(row['cpu_s']):.0f} | {statistics.median(row['wall_s']):.0f} | {row['parameters']:,} |"
        )
    return lines


def render(rows: list[dict[str, Any]]) -> str:
    """The recipes with the networks that answer directly, then the variants."""
    parts = [[row for row in rows if (row["part"] == "ablations") == flag] for flag in (False, True)]
    return "\n\n".join("\n".join(table(part)) for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("figures", "direct", "ablations"), help="these parts alone")
    parser.add_argument("--names", nargs="+", help="these runs alone, such as sudoku4-no-ema")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds alone, where a run has them")
    parser.add_argument("--steps", type=int, default=500, help="of each ablation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/trm-ablations"))
    parser.add_argument("--collect", action="store_true", help="run nothing, collect what is done")
    parser.add_argument("--out", type=Path, required=True, help="write the JSON to this file")
    parser.add_argument("--page", type=Path, help="write the tables into this page, too: docs/trm.md")
    args = parser.parse_args()
    rows = []
    for variant in variants(args.steps):
        wanted = (not args.only or variant.part in args.only) and (not args.names or variant.name in args.names)
        results: dict[int, dict[str, Any]] = {}
        for seed in variant.seeds:
            start = wanted and not args.collect and (args.seeds is None or seed in args.seeds)
            found = run(variant, seed, args) if start else result_of(args.runs_dir, f"{variant.name}-{seed}")
            results |= {} if found is None else {seed: found}
        rows += [row_of(variant, results)] if results else []
        outcome = {
            "benchmark": "trm_ablations",
            "threads": args.threads,
            "cpu": platform.processor() or platform.machine(),
            "rows": rows,
        }
        write_json(args.out, outcome)
    print(render(rows))
    if args.page:
        write_between(args.page, "trm_ablations", render(rows))


if __name__ == "__main__":
    main()
