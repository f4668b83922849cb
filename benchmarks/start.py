"""How soon commands answer, and how soon `tafkir serve` is ready: each a process of its own, in turn.

Figures are medians with the least and the most: seconds by the clock, and CPU-seconds of the process and its children.

    PYTHONPATH=src python benchmarks/start.py --out benchmarks/results/start.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from http_load import serving

TAFKIR = ["-m", "tafkir.cli.main"]
PLAN = [*TAFKIR, "plan", "deepseek-r1", "--precision", "fp8", "--hardware"]
SIZES = (8, 16, 32, 64, 96, 144)
COMMANDS = {
    "help": [[*TAFKIR, "--help"]],
    "model ls": [[*TAFKIR, "model", "ls"]],
    "plan": [[*PLAN, "h200:8"]],
    "plan search": [[*PLAN, f"h200:{count}"] for count in SIZES],
    "import torch": [["-c", "import torch"]],
}


def once(commands: list[list[str]]) -> tuple[float, float]:
    """Seconds by the clock and of processor time for commands one after another."""
    before, began = os.times(), time.perf_counter()
    for command in commands:
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def spread(name: str, values: list[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


def ready(checkpoint: str) -> float:
    with serving(checkpoint) as server:
        return server.ready_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="base-tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    ready_s = []
    for _ in range(args.repeats):
        for name, commands in COMMANDS.items():
            times[name].append(once(commands))
        ready_s.append(ready(args.checkpoint))
    rows = {
        name: spread("wall_s", [wall for wall, _ in found]) | spread("cpu_s", [cpu for _, cpu in found])
        for name, found in times.items()
    }
    found = {
        "repeats": args.repeats,
        "checkpoint": args.checkpoint,
        "commands": rows,
        "search_sizes": SIZES,
        "serve": spread("ready_s", ready_s),
    }
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
