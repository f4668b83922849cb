"""Writes the tables of docs/robustness.md from what `make crash` and `make fuzz` measured.

python tools/write_robustness.py          rewrite them
python tools/write_robustness.py --check  say whether they are out of date (exit code 1)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "robustness.md"
COMMANDS = {
    "rlvr": "rlvr, eval, report", "rlhf": "reward, rlhf", "calibrate": "quantize --calibrate --gptq",
    "eval": "eval --tasks",
}  # fmt: skip
FAMILIES = {
    "recipes": "recipe files and `--set`", "data": "JSON lines: problems, preferences, batches, items",
    "safetensors": "safetensors headers", "manifests": "manifest, config, index of a checkpoint",
    "requests": "chat and other requests", "answers": "answers to graders", "grids": "puzzle files, grids, ARC tasks",
}  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def render_crash(found: dict[str, Any]) -> str:
    """What was broken, by command, and what that came to."""
    keys = ("kills", "at_files", "interrupts", "full_disks", "read_only", "clocks", "compared")
    head = ("command", "kill -9", "of them at file operations", "Ctrl-C, SIGTERM", "disk full", "disk read-only",
            "clock jumps", "comparisons", "faults")  # fmt: skip
    commands = found["commands"]
    rows = [(COMMANDS.get(name, name), *(row[key] for key in keys), len(row["faults"]))
            for name, row in commands.items()]  # fmt: skip
    total = {key: sum(row[key] for row in commands.values()) for key in ("compared", "files", "cpu_s")}
    return (
        f"{_table(head, rows)}\n{found['kills']} kills, {total['compared']} comparisons of {total['files']:,} files, "
        f"{total['cpu_s']:.0f} CPU-seconds, {found['wall_s'] / 60:.0f} minutes.\n"
    )


def render_fuzz(found: dict[str, Any]) -> str:
    """What every family came to."""
    head = ("family", "cases", "refused", "CPU-seconds", "slowest case", "memory grown", "faults")
    families = found["families"]
    rows = [
        (label, f"{row['cases']:,}", f"{row['refused']:,}", row["cpu_s"], f"{row['slowest_ms']} ms",
         f"{row['grown_mb']} MB", len(row["faults"]))
        for name, label in FAMILIES.items() if (row := families.get(name))
    ]  # fmt: skip
    return _table(head, rows)


def updated_page() -> str:
    """The page with fresh tables between their marks."""
    page = PAGE.read_text(encoding="utf-8")
    for name, render in (("crash", render_crash), ("fuzz", render_fuzz)):
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        start, end = f"<!-- {name}: written by tools/write_robustness.py -->\n", f"<!-- end of {name} -->\n"
        page = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{render(found)}\n{end}", page, flags=re.DOTALL)  # noqa: B023
    return page


def main() -> int:
    fresh = updated_page()
    if "--check" in sys.argv[1:]:
        return int(fresh != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
