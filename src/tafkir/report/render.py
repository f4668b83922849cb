"""Turns a collected run into one self-contained HTML page: no script, no outside resource, light and dark, print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from tafkir.records import StageName
from tafkir.report import findings
from tafkir.report.chains import OUTCOME_WORDS, read_chain
from tafkir.report.charts import Line, heat_strip, interval_plot, light_strip
from tafkir.report.collect import Chain, RunRecord, StageRecord
from tafkir.report.curves import CURVES, SPEED_CURVES, Curve, curve_lines, draw_lines, final_loads, speed_lines
from tafkir.report.evaluation import card_body
from tafkir.report.lab import LAB_HEAD, LabFigure, lab_figures, lab_rows
from tafkir.report.lights import LIGHT_NAMES, TOKEN_HEAD, light_cells, light_sentences, token_rows
from tafkir.report.mismatch_lab import MISMATCH_HEAD, mismatch_groups, mismatch_matrix, mismatch_rows
from tafkir.report.page import frame_page, plain_table
from tafkir.report.preference import (
    QUALITY_HEAD,
    RELIABILITY_HEAD,
    calibration_figure,
    guard_sentences,
    quality_rows,
    reliability_rows,
)
from tafkir.report.run_card import run_card
from tafkir.report.trm import TRM_HEAD, trm_figures, trm_rows
from tafkir.report.words import ACCURACY_HEAD, COST_HEAD, DIFFERENCE_HEAD, RETENTION_HEAD, WORDS
from tafkir.runlog.rundir import RunDir

__all__ = ["render_html"]

_TRAINING: Sequence[StageName] = ("pretrain", "sft", "reward", "dpo", "rlvr", "rlhf", "qat", "mtp")


def render_html(record: RunRecord) -> str:
    """The whole page as one string."""
    parts = [(anchor, title, build(record)) for anchor, title, build in _SECTIONS]
    shown = [(anchor, title, body) for anchor, title, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in shown)
    sections = "".join(
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' for anchor, title, body in shown
    )
    body = f"{_hero(record, links)}{_notes(record)}<main>{sections}</main>{_footer(record)}"
    return frame_page(f"{record.name} · Tafkir run report", body)


# ---- frame -------------------------------------------------------------------------------------------------------


def _hero(record: RunRecord, links: str) -> str:
    head = findings.headline(record)
    beside = "".join(f"<p>{escape(sentence)}</p>" for sentence in head.beside)
    facts = "".join(
        f'<div class="fact"><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}'
        f"<small>{escape(fact.note)}</small></dd></div>"
        for fact in findings.key_facts(record)
    )
    return (
        f'<header class="hero {head.tone}"><p class="eyebrow">Tafkir run report · <b>{escape(record.name)}</b></p>'
        f'<h1>{escape(head.sentence)}</h1><div class="beside">{beside}</div>'
        f'<dl class="facts">{facts}</dl><nav aria-label="Sections">{links}</nav></header>'
    )


def _notes(record: RunRecord) -> str:
    if not record.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
    return f'<div class="notes"><b>What this page cannot show</b><ul>{items}</ul></div>'


def _footer(record: RunRecord) -> str:
    version = record.environment.get("tafkir")
    made = f"Tafkir {escape(str(version))}" if version else "Tafkir"
    return f"<footer>Made by {made} from the run directory alone; every number can be recomputed from it.</footer>"


def _lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


# ---- sections ----------------------------------------------------------------------------------------------------


def _stages(record: RunRecord) -> str:
    description = str(record.recipe.get("description") or "")
    base = record.recipe.get("base")
    start = f" It starts from the checkpoint {base}." if base else " It starts from random weights."
    items = "".join(_stage_item(stage) for stage in record.stages.values())
    return _lead(f"{description.rstrip('.')}.{start}" if description else start.strip()) + (
        f'<ol class="stages">{items}</ol>' if items else ""
    )


def _stage_item(stage: StageRecord) -> str:
    title = findings.STAGE_TITLES.get(stage.kind, stage.kind)
    wall = stage.result.get("wall_s")
    spent = f" in {findings.format_seconds(float(wall))}" if isinstance(wall, int | float) else ""
    state = stage.state.replace(" ", "-")
    return (
        f'<li class="s-{stage.kind} {state}"><h3>{escape(title)}</h3>'
        f"<p>{escape(findings.STAGE_WORDS.get(stage.kind, ''))}</p>"
        f'<span class="state">{escape(stage.state + spent)}</span></li>'
    )


def _accuracy(record: RunRecord) -> str:
    evaluation = record.evaluation
    sources = findings.source_names(evaluation)
    plots, bars = "", {source: findings.accuracy_bars(evaluation, source) for source in sources}
    reach = max((bar.high or bar.value for own in bars.values() for bar in own), default=0.01)
    for source in sources:
        title = "All problems" if source == "all" else source
        plot = interval_plot(bars[source], title=f"Accuracy on {title} by stage", reach=reach)
        plots += f"<h3>{escape(title)}</h3>{plot}" if len(sources) > 1 else plot
    if not plots:
        return ""
    samples = evaluation.get("samples", "k")
    legend = (
        f'<div class="legend"><span class="key-dot"><i></i>mean of {escape(str(samples))} sampled answers</span>'
        '<span class="key-hollow"><i></i>greedy answer</span><span>bars: 95 % intervals</span></div>'
    )
    look = (
        "<figcaption><b>Look for</b> stages further right, clear of the baselines' marks. Overlapping bars do not mean "
        "“no difference”: the paired comparison below decides that.</figcaption>"
    )
    table = plain_table(ACCURACY_HEAD, findings.accuracy_rows(evaluation))
    return f'<figure class="card split">{legend}{plots}{look}</figure>{table}'


def _differences(record: RunRecord) -> str:
    rows = findings.difference_rows(record.evaluation)
    if not rows:
        return ""
    plot = interval_plot(
        findings.difference_bars(record.evaluation), title="Paired differences between stages", signed=True
    )
    look = (
        "<figcaption><b>Look for</b> bars that stay clear of the zero line: to the right the later stage answers "
        "more problems, to the left fewer; a bar across zero leaves it open.</figcaption>"
    )
    figure = f'<figure class="card">{plot}{look}</figure>' if plot else ""
    return figure + plain_table(DIFFERENCE_HEAD, rows)


def _retention(record: RunRecord) -> str:
    rows = findings.retention_rows(record.evaluation)
    if not rows:
        return ""
    lead = (
        "Each figure is the score in fewer bits as a share of the score before, on the same problems and with the same "
        "seeds; the interval holds every share that a paired test at 95 % would not refuse."
    )
    return _lead(lead) + plain_table(RETENTION_HEAD, rows, words=3)


def _card(record: RunRecord) -> str:
    card = run_card(RunDir(record.path), record.evaluation, record.recipe)
    if card is None:
        return ""
    titles = findings.STAGE_TITLES
    named = [
        {**each, "rows": [{**row, "name": titles.get(row["name"], row["name"])} for row in each["rows"]]}
        for each in card["cards"]
    ]
    spent, tokens = record.evaluation.get("wall_s"), record.evaluation.get("tokens")
    memory = record.evaluation.get("peak_rss_bytes")
    told = "FLOPs of text are of an answer's own tokens, without its prompt. " if record.evaluation else ""
    if spent and tokens:
        told += f"All stages were asked at {tokens / spent:,.0f} tokens a second on this machine"
        told += f", with at most {findings.format_bytes(memory)} of memory." if memory else "."
    return card_body({"cards": named}) + f"<p><small>{escape(told)}</small></p>"


def _training(kind: StageName, lead: str) -> Callable[[RunRecord], str]:
    def build(record: RunRecord) -> str:
        stage = record.stages.get(kind)
        if stage is None:
            return ""
        figures = "".join(_stage_figure(curve, stage, record) for curve in CURVES[kind])
        if not figures:
            return _lead("No numbers of this stage were found.")
        skipped = _lead(findings.skipped_steps(stage)) if findings.skipped_steps(stage) else ""
        return _lead(lead) + skipped + f'<div class="cards">{figures}</div>'

    return build


def _stage_figure(curve: Curve, stage: StageRecord, record: RunRecord) -> str:
    lines = curve_lines(curve, stage)
    table = record.recipe.get(stage.kind)
    guide = curve.guide(table) if curve.guide and isinstance(table, Mapping) else None
    return _figure(curve, lines, draw_lines(curve, lines, guide=guide))


def _figure(curve: Curve | LabFigure, lines: Sequence[Line], chart: str) -> str:
    if not chart:
        return ""
    keys = "".join(
        f'<span class="{line.color}{" key-dot" if line.dots else ""}">'
        f'<i style="color:var(--c)"></i>{escape(line.name)}</span>'
        for line in lines
    )
    gaps = sum(value is None for line in lines for _, value in line.points)
    are = "value was not finite and is" if gaps == 1 else "values were not finite and are"
    warning = f" {gaps} {are} left out." if gaps else ""
    return (
        f'<figure class="card"><h3>{escape(curve.title)}</h3><p class="unit">{escape(curve.unit)}</p>'
        f'{chart}<div class="legend">{keys if len(lines) > 1 else ""}</div>'
        f"<figcaption><b>Look for</b> {escape(curve.look)}{warning}</figcaption></figure>"
    )


def _agreement(record: RunRecord) -> str:
    body = ""
    for kind, stage in record.stages.items():
        sentences = light_sentences(stage)
        if not sentences:
            continue
        title = findings.STAGE_TITLES.get(kind, kind)
        cells = light_cells(stage)
        strip = light_strip(cells, LIGHT_NAMES, title=f"Lights of the mismatch monitor in {title}")
        ends = f'<p class="ends"><span>step {cells[0][0]}</span><span>step {cells[-1][1]}</span></p>'
        told = "".join(f'<p class="told">{escape(sentence)}</p>' for sentence in sentences)
        look = "<b>Look for</b> green. Yellow: watch it. Red: the authors of Ring call such a run lost."
        body += (
            f'<figure class="card split"><h3>{escape(title)}</h3>{strip}{ends}{told}'
            f"<figcaption>{look}</figcaption></figure>"
        )
        if rows := token_rows(stage):
            table = plain_table(TOKEN_HEAD, rows, words=3, wide=0)
            body += f"<details><summary>The tokens that they were furthest apart on</summary>{table}</details>"
    if not body:
        return ""
    lead = (
        "The engine that samples and the trainer that learns compute the same model, each in its own way. The monitor "
        "compares the probabilities that they gave to every sampled token; the curves above show them."
    )
    return _lead(lead) + body


def _lab(record: RunRecord) -> str:
    if not record.variants:
        return ""
    figures = "".join(_figure(figure, figure.lines, figure.chart) for figure in lab_figures(record.variants))
    lead = (
        "Twins that differ in their residual alone: the same weights, text and steps. A gain is the largest absolute "
        "sum of a row (forward) or a column (backward) of the matrix that mixes the residual streams, or of the "
        "product of all such matrices up to the end. Where it is 1, neither signal nor gradient grows on its way."
    )
    return _lead(lead) + plain_table(LAB_HEAD, lab_rows(record.variants)) + f'<div class="cards spaced">{figures}</div>'


def _recursive(record: RunRecord) -> str:
    training = _training("trm", "Each step is one supervision step of a batch; solved puzzles make room for new ones.")
    result = record.result("trm")
    if not trm_rows(result):
        return training(record)
    figures = "".join(_figure(figure, figure.lines, figure.chart) for figure in trm_figures(result))
    lead = (
        "Puzzles that training saw in none of their forms. The model corrects its answer in up to so many supervision "
        "steps, and says after each one, by its halting head q, whether it takes the answer for right."
    )
    table = plain_table(TRM_HEAD, trm_rows(result))
    return _lead(lead) + table + f'<div class="cards spaced">{figures}</div>' + training(record)


def _mismatch_lab(record: RunRecord) -> str:
    variants = record.mismatch_variants
    if not variants:
        return ""
    lead = (
        "The same task and the same start, trained in float32 on rollouts that were sampled with other numbers. The "
        "losses differ in what they do with a token whose probability the two engines see differently: nothing (GRPO), "
        "cut its weight (TIS), or leave it out beyond a band (IcePop) or a distance (KPop). The figures are rewards on "
        "held-out problems, with the weights as they are, in share of those after float32 rollouts."
    )
    head, rows = mismatch_matrix(variants)
    details = (
        "A run has survived until the mean reward of ten steps falls below half of the best that it was. Differences "
        "are |Δ log p| in nats, at equal weights. All figures are over all steps and repeats."
    )
    table = _lead(details) + plain_table(MISMATCH_HEAD, mismatch_rows(variants))
    more = f"<details><summary>Every kind of rollouts and loss in numbers</summary>{table}</details>"
    charts = "".join(
        f'<h3 class="group">{escape(title)}</h3><div class="cards pairs">'
        + "".join(_figure(figure, figure.lines, figure.chart) for figure in figures)
        + "</div>"
        for title, figures in mismatch_groups(variants)
    )
    return _lead(lead) + plain_table(head, rows) + more + charts


def _experts(record: RunRecord) -> str:
    figures = ""
    for kind in _TRAINING:
        stage = record.stages.get(kind)
        strips = final_loads(stage) if stage else []
        if strips:
            title = f"At the end of {findings.STAGE_TITLES[kind]}"
            figures += (
                f'<figure class="card c-{kind}"><h3>{escape(title)}</h3>'
                f"{heat_strip(strips, title=f'Expert load per layer at the end of {kind}')}</figure>"
            )
    if not figures:
        return ""
    lead = (
        "One strip a layer, one cell an expert; the stronger the colour, the more tokens the expert was given. The "
        "figure on the right is the busiest expert's load, with 1× the even share. Look for even strips: a blank "
        "cell is an expert that nobody visits."
    )
    return _lead(lead) + f'<div class="cards">{figures}</div>'


def _cost(record: RunRecord) -> str:
    rows = findings.cost_rows(record)
    if not rows:
        return ""
    figures = "".join(_speed_figure(curve, record) for curve in SPEED_CURVES)
    return plain_table(COST_HEAD, rows, words=2) + f'<div class="cards spaced">{figures}</div>'


def _speed_figure(curve: Curve, record: RunRecord) -> str:
    lines = speed_lines(curve, record)
    return _figure(curve, lines, draw_lines(curve, lines, x_label="%"))


# ---- sample chains -----------------------------------------------------------------------------------------------


def _chains(record: RunRecord) -> str:
    if not record.chains:
        return ""
    stage = findings.STAGE_TITLES.get(record.chain_stage or "", record.chain_stage or "")
    lead = (
        f"Greedy answers of {stage} to {len(record.chains)} of {record.chain_pool:,} held-out problems, drawn by a "
        "hash, each outcome in its share of the whole and at least one of each; nobody chose them. A tick marks a "
        "step that computes, a wavy line one that does not."
    )
    return _lead(lead) + f'<div class="chains">{"".join(_chain(chain) for chain in record.chains)}</div>'


def _chain(chain: Chain) -> str:
    before = ""
    if chain.before:
        before = (
            f'<details class="before o-{_outcome_class(chain.before)}"><summary>The stage before: '
            f"{_badge(chain.before)}</summary>{_steps(chain.before)}{_verdict(chain.before)}</details>"
        )
    return (
        f'<article class="card chain o-{_outcome_class(chain)}"><header>{_badge(chain)}'
        f"<small>{escape(chain.example_id)} · {chain.tokens:,} tokens</small></header>"
        f'<p class="question" dir="auto">{escape(chain.question)}</p>{_steps(chain)}{_verdict(chain)}{before}</article>'
    )


def _outcome_class(chain: Chain) -> str:
    return chain.outcome if chain.outcome in OUTCOME_WORDS else "error"


def _badge(chain: Chain) -> str:
    return f'<span class="badge">{escape(OUTCOME_WORDS.get(chain.outcome, chain.outcome))}</span>'


def _steps(chain: Chain) -> str:
    lines = "".join(f'<p class="{line.kind}" dir="auto">{escape(line.text)}</p>' for line in read_chain(chain.text))
    return f'<div class="steps">{lines}</div>'


def _verdict(chain: Chain) -> str:
    given = "nothing" if chain.extracted is None else chain.extracted
    reason = f" ({escape(chain.reason)})" if chain.reason and chain.outcome not in ("correct", "wrong") else ""
    return (
        f'<p class="outcome">Answered <b><bdi>{escape(given)}</bdi></b>{reason}, right is '
        f"<b><bdi>{escape(chain.expected)}</bdi></b>.</p>"
    )


# ---- contamination, recipe, environment --------------------------------------------------------------------------


def _contamination(record: RunRecord) -> str:
    check = record.evaluation.get("contamination")
    if not isinstance(check, Mapping):
        return ""
    words = findings.contamination_sentences(check)
    overlaps = check.get("removed_examples")
    rows = [[str(o.get("train_id")), str(o.get("heldout_id")), str(o.get("text"))] for o in overlaps or []]
    shown = ""
    if rows:
        table = plain_table(
            ("Training problem", "Held-out problem", "Shared words (numbers as 0)"), rows, words=3, wide=2
        )
        shown = f"<details><summary>Training problems that were removed ({len(rows)} shown)</summary>{table}</details>"
    counts = findings.count_rows(check)
    table = plain_table(("Source", "Training", "Validation", "Test"), counts) if counts else ""
    return "".join(_lead(sentence) for sentence in words) + table + shown


def _recipe(record: RunRecord) -> str:
    if not record.recipe_text:
        return ""
    lead = "Every setting as it was resolved. Two runs of this file with the same seed give the same numbers."
    return _lead(lead) + (
        f"<details><summary>recipe.resolved.toml</summary><pre>{escape(record.recipe_text)}</pre></details>"
    )


def _environment(record: RunRecord) -> str:
    rows = findings.environment_rows(record.environment)
    return plain_table(("What", "Value"), rows, words=2, wide=1) if rows else ""


def _glossary(record: RunRecord) -> str:
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in WORDS.items())
    return f'<dl class="words">{items}</dl>'


def _reward(record: RunRecord) -> str:
    curves = _training("reward", "A second model learns from pairs which of two answers is preferred.")(record)
    quality, reliability = quality_rows(record), reliability_rows(record)
    if not quality:
        return curves
    lead = (
        "On pairs that were held out, with 95 % intervals. A model that only likes length is right where the chosen "
        "side is longer and wrong where it is shorter; confidence and right answers agree in a calibrated one."
    )
    figure = calibration_figure(record)
    drawn = f'<div class="cards pairs spaced">{_figure(figure, figure.lines, figure.chart)}</div>' if figure else ""
    table = plain_table(RELIABILITY_HEAD, reliability)
    more = f"<details><summary>Confidence in numbers</summary>{table}</details>" if reliability else ""
    return curves + _lead(lead) + plain_table(QUALITY_HEAD, quality) + drawn + more


def _rlhf(record: RunRecord) -> str:
    words = "The model answers open prompts several times, and what is preferred becomes more likely."
    curves = _training("rlhf", words)(record)
    return curves + "".join(_lead(sentence) for sentence in guard_sentences(record)) if curves else ""


_SECTIONS: Sequence[tuple[str, str, Callable[[RunRecord], str]]] = (
    ("run", "What was run", _stages),
    ("accuracy", "Accuracy by stage", _accuracy),
    ("differences", "Did a stage help?", _differences),
    ("retention", "What quantization kept", _retention),
    ("card", "What answers cost", _card),
    ("chains", "Sample answers", _chains),
    ("pretrain", "Pre-training", _training("pretrain", "The model reads text and predicts each next token.")),
    (
        "sft",
        "Supervised fine-tuning",
        _training("sft", "The model learns to write the steps of worked solutions, and nothing else counts."),
    ),
    (
        "rlvr",
        "Reinforcement learning",
        _training(
            "rlvr",
            "The model tries training problems several times, and what led to right answers becomes more likely. "
            "Faint: each step; bold: smoothed.",
        ),
    ),
    ("reward", "Reward model", _reward),
    ("dpo", "Direct preference optimisation", _training("dpo", "The model learns from pairs of answers directly.")),
    ("rlhf", "Reinforcement learning from preferences", _rlhf),
    (
        "qat",
        "Training for quantization",
        _training(
            "qat",
            "The model learns with its weights and inputs as they will be once they are quantized, and is to predict "
            "what it predicted before.",
        ),
    ),
    (
        "mtp",
        "Layers that draft",
        _training("mtp", "The model stays as it is; extra layers learn to foresee what it is about to say."),
    ),
    ("agreement", "Do the two engines agree?", _agreement),
    ("lab", "The laboratory of residuals", _lab),
    ("mismatch-lab", "The laboratory of mismatch", _mismatch_lab),
    ("trm", "The recursive model", _recursive),
    ("experts", "Work of the experts", _experts),
    ("cost", "Time, speed and memory", _cost),
    ("contamination", "Was the test kept apart?", _contamination),
    ("recipe", "Recipe", _recipe),
    ("environment", "Machine and versions", _environment),
    ("words", "Words on this page", _glossary),
)
