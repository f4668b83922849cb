"""The report as markdown: the same findings and tables, with small text sparklines in place of the plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tafkir.report import findings
from tafkir.report.chains import OUTCOME_WORDS
from tafkir.report.charts import Point, number, percent
from tafkir.report.collect import Chain, RunRecord, StageRecord
from tafkir.report.curves import CURVES, SPEED_CURVES, curve_lines, final_loads, value_words
from tafkir.report.lab import LAB_HEAD, LabFigure, lab_figures, lab_rows
from tafkir.report.lights import TOKEN_HEAD, light_sentences, token_rows
from tafkir.report.mismatch_lab import MISMATCH_HEAD, mismatch_figures, mismatch_matrix, mismatch_rows
from tafkir.report.preference import (
    QUALITY_HEAD,
    RELIABILITY_HEAD,
    guard_sentences,
    quality_rows,
    reliability_rows,
)
from tafkir.report.trm import TRM_HEAD, trm_figures, trm_rows
from tafkir.report.words import ACCURACY_HEAD, COST_HEAD, DIFFERENCE_HEAD, RETENTION_HEAD, WORDS

__all__ = ["render_markdown"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24


def render_markdown(record: RunRecord) -> str:
    """The whole report as one string."""
    head = findings.headline(record)
    parts = [f"# {_plain(record.name)}: Tafkir run report", f"**{_plain(head.sentence)}**"]
    if head.beside:
        parts.append(" ".join(_plain(sentence) for sentence in head.beside))
    facts = [(fact.label, fact.value, fact.note) for fact in findings.key_facts(record)]
    parts.append(_table(("", "", ""), facts))
    if record.notes:
        parts.append("What this report cannot show:\n\n" + "\n".join(f"- {_plain(note)}" for note in record.notes))
    parts += _scores(record)
    parts += _curves(record)
    parts += _preference(record)
    parts += _agreement(record)
    parts += _lab(record)
    parts += _mismatch_lab(record)
    parts += _recursive(record)
    parts += _chains(record)
    parts += _background(record)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, *body: str) -> list[str]:
    shown = [part for part in body if part]
    return [f"## {title}", *shown] if shown else []


def _scores(record: RunRecord) -> list[str]:
    evaluation = record.evaluation
    return [
        *_section("Accuracy by stage", _table(ACCURACY_HEAD, findings.accuracy_rows(evaluation))),
        *_section("Did a stage help?", _table(DIFFERENCE_HEAD, findings.difference_rows(evaluation))),
        *_section("What quantization kept", _table(RETENTION_HEAD, findings.retention_rows(evaluation))),
        *_section("Time, speed and memory", _table(COST_HEAD, findings.cost_rows(record))),
    ]


def _curves(record: RunRecord) -> list[str]:
    rows: list[list[str]] = []
    for kind, curves in CURVES.items():
        stage = next((stage for stage in record.stages.values() if stage.kind == kind), None)
        if stage is None:
            continue
        for curve in (*curves, *SPEED_CURVES):
            for line in curve_lines(curve, stage):
                values = [value for _, value in line.points if value is not None]
                ends = [value_words(curve)(value) for value in (values[0], values[-1], min(values), max(values))]
                name = findings.STAGE_TITLES.get(kind, kind)
                rows.append([name, f"{curve.title}: {line.name}".rstrip(": "), f"`{sparkline(line.points)}`", *ends])
    return _section(
        "Curves",
        _table(("Stage", "Curve", "Over the steps", "First", "Last", "Least", "Most"), rows, escaped=(2,)),
        *(_loads(stage) for stage in record.stages.values()),
    )


def _preference(record: RunRecord) -> list[str]:
    return [
        *_section(
            "Reward model",
            _table(QUALITY_HEAD, quality_rows(record)),
            _table(RELIABILITY_HEAD, reliability_rows(record)),
        ),
        *_section("Guard against reward hacking", *map(_plain, guard_sentences(record))),
    ]


def _agreement(record: RunRecord) -> list[str]:
    body = []
    for kind, stage in record.stages.items():
        if sentences := light_sentences(stage):
            title = findings.STAGE_TITLES.get(kind, kind)
            body += [f"{title}: " + " ".join(map(_plain, sentences)), _table(TOKEN_HEAD, token_rows(stage))]
    return _section("Do the two engines agree?", *body)


def _lab(record: RunRecord) -> list[str]:
    return _section(
        "The laboratory of residuals",
        _table(LAB_HEAD, lab_rows(record.variants)),
        _figure_table("Residual", lab_figures(record.variants)),
    )


def _mismatch_lab(record: RunRecord) -> list[str]:
    return _section(
        "The laboratory of mismatch",
        _table(*mismatch_matrix(record.mismatch_variants)) if record.mismatch_variants else "",
        _table(MISMATCH_HEAD, mismatch_rows(record.mismatch_variants)),
        _figure_table("Loss", mismatch_figures(record.mismatch_variants)),
    )


def _figure_table(what: str, figures: Sequence[LabFigure]) -> str:
    """One row for each line of each figure."""
    rows = []
    for figure in figures:
        for line in figure.lines:
            values = [value for _, value in line.points if value is not None]
            if values:
                ends = [number(value, 4) for value in (values[0], values[-1], min(values), max(values))]
                rows.append([figure.title, line.name, f"`{sparkline(line.points)}`", *ends])
    return _table(("Figure", what, "Left to right", "First", "Last", "Least", "Most"), rows, escaped=(2,))


def _recursive(record: RunRecord) -> list[str]:
    result = record.result("trm")
    steps = [
        [figure.title, f"`{sparkline(line.points)}`", *(percent(value) for _, value in line.points)]
        for figure in trm_figures(result)
        for line in figure.lines
    ]
    head = ("Figure", "Step by step", *(str(i) for i in range(1, max(map(len, steps), default=2) - 1)))
    return _section("The recursive model", _table(TRM_HEAD, trm_rows(result)), _table(head, steps, escaped=(1,)))


def _loads(stage: StageRecord) -> str:
    strips = final_loads(stage)
    if not strips:
        return ""
    rows = []
    for label, shares in strips:
        relative = [(share or 0.0) * len(shares) for share in shares]
        cells = "".join(_BLOCKS[min(7, int(value * 3.5))] for value in relative)
        rows.append([label, f"`{cells}`", f"{max(relative, default=0):.1f}×"])
    title = f"Work of the experts at the end of {findings.STAGE_TITLES.get(stage.kind, stage.kind)}:"
    return f"{title}\n\n" + _table(("Layer", "Load of each expert", "Busiest"), rows, escaped=(1,))


def sparkline(points: Sequence[Point]) -> str:
    """A curve as at most 24 block characters, lowest value lowest."""
    values = [value for _, value in points if value is not None]
    if not values:
        return ""
    size = max(1, -(-len(values) // _SPARK_WIDTH))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * len(means)
    return "".join(_BLOCKS[round((value - low) / (high - low) * 7)] for value in means)


def _chains(record: RunRecord) -> list[str]:
    if not record.chains:
        return []
    stage = findings.STAGE_TITLES.get(record.chain_stage or "", record.chain_stage or "")
    lead = (
        f"Greedy answers of {stage}, drawn by a hash, each outcome in its share of the whole and at least one of each."
    )
    return _section("Sample answers", lead, *(_chain(chain) for chain in record.chains))


def _chain(chain: Chain) -> str:
    given = "nothing" if chain.extracted is None else chain.extracted
    outcome = OUTCOME_WORDS.get(chain.outcome, chain.outcome)
    verdict = f"Answered {_plain(given)}, right is {_plain(chain.expected)}."
    was = f" The stage before: {OUTCOME_WORDS.get(chain.before.outcome, chain.before.outcome)}." if chain.before else ""
    title = f"### {_plain(chain.example_id)}: {outcome}"
    return "\n\n".join((title, _plain(chain.question), _fence(chain.text), verdict + was))


def _background(record: RunRecord) -> list[str]:
    check = record.evaluation.get("contamination")
    clean: Sequence[str] = ()
    if isinstance(check, dict):
        counts = _table(("Source", "Training", "Validation", "Test"), findings.count_rows(check))
        clean = (*map(_plain, findings.contamination_sentences(check)), counts)
    words = "\n".join(f"- **{term}**: {text}" for term, text in WORDS.items())
    return [
        *_section("Was the test kept apart?", *clean),
        *_section("Recipe", _fence(record.recipe_text, "toml") if record.recipe_text else ""),
        *_section("Machine and versions", _table(("What", "Value"), findings.environment_rows(record.environment))),
        *_section("Words in this report", words),
    ]


# ---- markdown pieces ---------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text from outside as markdown that shows it as it is, on one line."""
    one_line = re.sub(r"[^\S\u00a0\u202f]+", " ", text).strip()
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _cell(text: str) -> str:
    figure, _, small = text.partition("\n")
    return _plain(f"{figure} ({small})" if small else figure)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, escaped: Sequence[int] = ()) -> str:
    """A table; the columns in `escaped` are markdown already."""
    body = ["| " + " | ".join(c if i in escaped else _cell(c) for i, c in enumerate(row)) + " |" for row in rows]
    if not body:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body])
