"""Writes the table of presets in docs/models.md, from the shapes that ship with the package.

python tools/write_models.py          rewrite the table
python tools/write_models.py --check  say whether it is out of date (exit code 1)
"""

from __future__ import annotations

import sys
from pathlib import Path

from tafkir.plan.params import describe_layers, summarize_model
from tafkir.recipe.presets import list_presets, load_preset

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
START, END = "<!-- table: written by tools/write_models.py -->\n", "<!-- end of table -->\n"
HEAD = (
    "preset",
    "layers",
    "total",
    "active",
    "active, no embeddings",
    "MTP",
    "KV cache a token",
    "bf16",
    "fp8",
    "nvfp4",
)
CONTEXT = 4096


def render_table() -> str:
    """One row per preset, biggest last; parameters in billions, cache in KiB, weights in GB (10^9 bytes)."""
    rows = [HEAD, ("---",) * 2 + ("---:",) * (len(HEAD) - 2)]
    configs = {name: load_preset(name) for name in list_presets()}
    for name, config in sorted(configs.items(), key=lambda item: (item[1].num_parameters(), item[0])):
        summary = summarize_model(config, CONTEXT)
        counts = summary.parameters
        billions = (counts.total, counts.active, counts.active_non_embedding)
        rows.append(
            (
                f"`{name}`",
                describe_layers(config),
                *(f"{count / 1e9:.2f}" for count in billions),
                f"+{counts.mtp / 1e9:.2f}" if counts.mtp else "",
                f"{summary.kv_bytes_per_token / 1024:.1f}",
                *(f"{size / 1e9:,.1f}" for size in summary.weight_bytes.values()),
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def updated_page() -> str:
    """The page with a fresh table between its two marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + render_table() + "\n" + END + after


def main() -> int:
    fresh = updated_page()
    if "--check" in sys.argv[1:]:
        return int(fresh != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
