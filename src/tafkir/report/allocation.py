"""Which matrix got which format, and what it cost: one SVG that needs nothing else, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tafkir.report.charts import nice_ticks, number

__all__ = ["render_allocation"]

_WIDTH, _LEFT, _RIGHT, _TOP = 860, 132, 18, 64
_CELL, _CURVE = 34, 220
_COLORS = {
    "nvfp4": "four", "nvfp4_w4a16": "four", "mxfp4": "four", "int4": "four", "fp8": "eight", "fp8_channel": "eight",
    "fp8_block": "eight", "mxfp8": "eight", "int8": "eight", "keep": "whole",
}  # fmt: skip
_STYLE = """
text { font: 12px system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans Arabic', sans-serif; fill: #5c626b; }
.paper { fill: #faf9f6; } .title { font-size: 16px; font-weight: 650; fill: #1c1e22; } .strong { fill: #1c1e22; }
.leader { fill: none; stroke: #8a8f98; }
.grid { stroke: #e5e2da; } .four { --c: #0d7f6b; } .eight { --c: #2464c9; } .whole { --c: #a86a12; }
.cell { fill: var(--c); } .on { fill: #fff; font-size: 11px; } .line { fill: none; stroke: #0d7f6b; stroke-width: 2.2; }
.dot { fill: #0d7f6b; stroke: #faf9f6; stroke-width: 1.5; } .ring { fill: #faf9f6; stroke: #b0456f; stroke-width: 2.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #9fa5ae; } .paper { fill: #14161a; } .title, .strong { fill: #e8e6e1; } .grid { stroke: #30343b; }
  .four { --c: #3fc6aa; } .eight { --c: #74a9f7; } .whole { --c: #e0a34a; } .on { fill: #14161a; }
  .line { stroke: #3fc6aa; } .dot { fill: #3fc6aa; stroke: #14161a; } .ring { fill: #14161a; stroke: #ec8bb0; }
}
"""

Data = Mapping[str, Any]


def render_allocation(result: Data, *, others: Sequence[tuple[str, float, float]] = ()) -> str:
    """A map of formats over layers, and KL against bits.

    Args:
        result: what `AutoResult.to_dict` gives.
        others: other choices to set beside it, such as presets: (name, bits, measured KL).
    """
    kinds = list(dict.fromkeys(group["kind"] for group in result["groups"]))
    low = _TOP + _CELL * len(kinds) + 34
    height = low + _CURVE + 96
    title = (
        f"{result['bits']:.2f} bits a weight, KL {number(result['measured_kl'])} nats a token "
        f"({number(result['predicted_kl'])} as a sum)"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>',
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="20" y="28">{escape(title)}</text>{_key(result["groups"])}',
        _map(result["groups"], kinds),
        _curve(result, others, low + 34),
    ]
    return "".join(parts) + "</svg>\n"


def _key(groups: Sequence[Data]) -> str:
    parts, x = [], 20
    for format in dict.fromkeys(group["format"] for group in groups):
        share = sum(group["numel"] for group in groups if group["format"] == format)
        words = f"{format}: {100 * share / sum(group['numel'] for group in groups):.0f} % of the weights"
        parts.append(f'<rect class="cell {_COLORS[format]}" x="{x}" y="41" width="11" height="11" rx="2"/>')
        parts.append(f'<text x="{x + 17}" y="51">{escape(words)}</text>')
        x += 40 + round(6.6 * len(words))
    return "".join(parts)


def _map(groups: Sequence[Data], kinds: Sequence[str]) -> str:
    """Layers from left to right, what is in them from top to bottom; numbers are the KL of the smallest format."""
    layers = sorted({group["layer"] for group in groups})
    width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(layers))
    every = math.ceil(len(layers) / 24)
    parts = [
        f'<text x="{_LEFT - 12}" y="{_TOP + _CELL * i + 21}" text-anchor="end">{escape(kind)}</text>'
        for i, kind in enumerate(kinds)
    ]
    for group in groups:
        x, y = _LEFT + layers.index(group["layer"]) * width, _TOP + _CELL * kinds.index(group["kind"])
        told = ", ".join(f"{format} {number(loss)}" for format, loss in group["losses"].items() if format != "keep")
        words = f"{group['name']}: {group['format']}; KL {told}; {group['reason']}"
        cell = f'<rect class="cell {_COLORS[group["format"]]}" x="{x + 1:.1f}" y="{y + 1}" rx="4" '
        parts.append(
            f'{cell}width="{max(1.0, width - 2):.1f}" height="{_CELL - 3}"><title>{escape(words)}</title></rect>'
        )
        losses = [loss for format, loss in group["losses"].items() if format != "keep"]
        if width > 52 and losses:
            words = number(max(losses), 2)
            parts.append(f'<text class="on" x="{x + width / 2:.1f}" y="{y + 21}" text-anchor="middle">{words}</text>')
    bottom = _TOP + _CELL * len(kinds) + 16
    parts += [
        f'<text x="{_LEFT + (i + 0.5) * width:.1f}" y="{bottom}" text-anchor="middle">{layer}</text>'
        for i, layer in enumerate(layers)
        if i % every == 0
    ]
    return "".join([*parts, f'<text x="{_LEFT - 12}" y="{bottom}" text-anchor="end">layer</text>'])


def _curve(result: Data, others: Sequence[tuple[str, float, float]], top: float) -> str:
    """KL over bits: the best mixtures by their groups' losses, this one as measured, and others."""
    marks = [("this mixture", result["bits"], result["measured_kl"]), *others]
    most = max([loss for _, loss in result["frontier"]] + [kl for _, _, kl in marks])
    # What is far below the marks is of no interest, and would press them together.
    line = [(bits, loss) for bits, loss in result["frontier"] if loss > most / 1e3]
    values = [loss for _, loss in line] + [kl for _, _, kl in marks if kl > 0]
    if not line or not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    wide = [bits for bits, _ in line] + [bits for _, bits, _ in marks]
    ticks = nice_ticks(min(wide), max(*wide, min(wide) + 1), 8)
    bottom = top + _CURVE

    def x(bits: float) -> float:
        return _LEFT + (bits - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(kl: float) -> float:
        return bottom - (math.log10(kl) - low) / (high - low) * _CURVE

    parts = [f'<text class="strong" x="20" y="{top - 18}">KL, nats a token, over bits a weight</text>']
    for power in range(low, high + 1):
        place = y(10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        label = number(10.0**power)
        parts.append(f'<text x="{_LEFT - 12}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [f'<text x="{x(t):.1f}" y="{bottom + 20}" text-anchor="middle">{t:g}</text>' for t in ticks]
    path = " ".join(f"{x(bits):.1f},{y(loss):.1f}" for bits, loss in line)
    parts.append(f'<polyline class="line" points="{path}"/>')
    # The names stand to the upper right, where the line does not come.
    column, at = max(0.62 * _WIDTH, max(x(bits) for _, bits, _ in marks) + 30), top - 13
    for name, bits, kl in sorted(marks, key=lambda mark: -mark[2]):
        if kl <= 0:
            continue
        right, height, kind = x(bits), y(kl), "dot" if name == marks[0][0] else "ring"
        at += 17
        parts.append(f'<path class="leader" d="M{right:.1f} {height:.1f}L{column:.1f} {at:.1f}h14"/>')
        parts.append(f'<circle class="{kind}" cx="{right:.1f}" cy="{height:.1f}" r="5.5"/>')
        words = f"{escape(name)} {number(kl, 2)}"
        parts.append(f'<text class="strong" x="{column + 19:.1f}" y="{at + 4:.1f}">{words}</text>')
    note = "Line: the best mixture for each budget, as the sum of its groups' own losses. Dots: measured as a whole."
    return "".join([*parts, f'<text x="{_LEFT}" y="{bottom + 48}">{note}</text>'])
