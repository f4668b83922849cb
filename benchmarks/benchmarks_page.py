"""docs/benchmarks.md and its pictures, from the plan and from the results that are there."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from figures import ROOT, Missing, Plan, Step, find, read_json

__all__ = ["PAGE", "pictures", "render_page", "write_page"]

PAGE = ROOT / "docs" / "benchmarks.md"

INTRO = """<!-- Written by benchmarks/run_all.py --write-page from benchmarks/figures.toml and benchmarks/results. -->

# Benchmarks

Every figure that was asked of Tafkir, what was reached, and beside what. `make bench` measures them again on two CPU
cores, one command after another, within the hour; trainings take longer and keep the date of their last run. Every
number under *reached* and *beside* is read from a file in `benchmarks/results` when this page is written. Where a
figure falls short, it stands here all the same, **in bold** and with the reason. Ranges in brackets are the least and
the most of the repeats, or 95 % intervals where the figure is a share; ratios are medians of ratios within one run.
"""


def _table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def _step_row(step: Step) -> str:
    stamp = step.stamp()
    took = f"{stamp['seconds'] / 60:.1f}" if "seconds" in stamp else ""
    load = " to ".join(f"{each:.1f}" for each in stamp.get("load", ()))
    commit = stamp.get("commit", "") + ("*" if stamp.get("changed") else "")
    kind = "long" if step.long else ""
    return f"| `{step.name}` | {kind} | {took} | {stamp.get('date', '')} | {commit} | {load} |"


def _machine(plan: Plan) -> str:
    stamps = [stamp for step in plan.steps.values() if "machine" in (stamp := step.stamp())]
    if not stamps:
        return ""
    found = max(stamps, key=lambda stamp: stamp["date"])["machine"]
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB"
    parts = (found["cpu"], f"{found['cores_logical']} cores", memory, f"Python {found['python']}")
    return f"Machine of the last run: {', '.join(parts)}, torch {found['torch']}.\n\n"


def render_page(plan: Plan) -> str:
    """The page: a table a milestone, then what was run and when."""
    states = Counter(figure.state for figure in plan.figures)
    parts = [
        INTRO,
        f"Of {len(plan.figures)} figures, {states['reached']} reach what was asked and {states['short']} fall short; "
        f"{states['told']} were to be reported, without a mark to reach; {states['missing']} are not measured yet.\n",
    ]
    parts += [f"![{plot['title']}](img/{plot['file']})\n" for plot in plan.plots if bars(plan, plot)]
    head = "| figure | asked | reached | beside | measured by, day, commit |"
    for title, figures in plan.milestones.items():
        parts.append(f"## {title}\n\n{_table(head, [figure.row() for figure in figures])}\n")
    head = "| step | | minutes | day, UTC | commit | load before and after |"
    rows = [_step_row(step) for step in plan.steps.values()]
    note = (
        "Names in capitals are other environments or folders, given by `--with name=PATH`. Of steps without minutes "
        "the day and the commit are those that brought their results file. A star: the code had changes not committed."
    )
    commands = "\n".join(f"# {step.name}\n{step.command}" for step in plan.steps.values())
    parts.append(f"## How it was measured\n\n{_machine(plan)}{note}\n\n{_table(head, rows)}\n")
    parts.append(f"```bash\n{commands}\n```\n")
    return "\n".join(parts)


def bars(plan: Plan, plot: dict[str, Any]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Groups of a picture: a label, and names with values; what is not measured is left out."""
    groups = []
    for group in plot["groups"]:
        found = []
        for name, path in group["bars"].items():
            try:
                found.append((name, float(find(read_json(plan.steps[group["step"]].file), path))))
            except Missing:
                continue
        if found:
            groups.append((group["label"], found))
    return groups


STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 15px }
.group { font-weight: 600 } .other { fill: #8c959f } .ours { fill: #00796b } .back { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .other { fill: #6e7681 } .ours { fill: #26a69a } .back { fill: #1e2129 }
}
</style>"""


def picture(plot: dict[str, Any], groups: list[tuple[str, list[tuple[str, float]]]]) -> str:
    """Bars lying on their side; every group has a scale of its own, ours in colour. Readable in the dark, too."""
    width, left, line = 760, 170, 22
    y, parts = 56, []
    for label, found in groups:
        parts.append(f'<text class="group" x="10" y="{y}">{escape(label)}</text>')
        y += 10
        most = max(value for _, value in found)
        for name, value in found:
            kind = "ours" if name.startswith("Tafkir") else "other"
            length = max(2.0, (width - left - 90) * value / most)
            parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect class="{kind}" x="{left}" y="{y + 2}" width="{length:.1f}" height="16" rx="2"/>')
            parts.append(f'<text x="{left + length + 8:.1f}" y="{y + 14}">{value:{plot["form"]}}</text>')
            y += line
        y += 22
    head = '<rect class="back" width="100%" height="100%" rx="6"/>'
    head += f'<text class="title" x="10" y="24">{escape(plot["title"])}</text>'
    size = f'viewBox="0 0 {width} {y - 10}" width="{width}" height="{y - 10}" role="img"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<title>{escape(plot["title"])}</title>\n{STYLE}\n'
        + "\n".join([head, *parts])
        + "\n</svg>\n"
    )


def pictures(plan: Plan) -> dict[Path, str]:
    """Every picture's text by its file."""
    found = {PAGE.parent / "img" / plot["file"]: (plot, bars(plan, plot)) for plot in plan.plots}
    return {path: picture(plot, groups) for path, (plot, groups) in found.items() if groups}


def write_page(plan: Plan) -> str:
    """Write page and pictures; results that came from elsewhere than `make bench` get their stamps. What it wrote."""
    for step in plan.steps.values():
        if step.file.exists() and not step.is_stamped():
            step.write_stamp()
    for path, text in {PAGE: render_page(plan), **pictures(plan)}.items():
        path.write_text(text, encoding="utf-8")
    return str(PAGE.relative_to(ROOT))
