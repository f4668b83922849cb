"""What a run shows, in words and rows that the page and its markdown twin share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tafkir.recipe.model import ModelConfig
from tafkir.records import POLICY_STAGES
from tafkir.report.charts import Bar, number, percent, signed_points
from tafkir.report.collect import RunRecord, StageRecord, series
from tafkir.report.lab import lab_beside, lab_sentence
from tafkir.report.mismatch_lab import mismatch_beside, mismatch_sentence
from tafkir.report.trm import trm_beside, trm_sentence

__all__ = [
    "STAGE_TITLES",
    "STAGE_WORDS",
    "Fact",
    "Headline",
    "accuracy_bars",
    "accuracy_rows",
    "baseline_title",
    "contamination_sentences",
    "cost_rows",
    "count_rows",
    "difference_bars",
    "difference_rows",
    "environment_rows",
    "format_bytes",
    "format_seconds",
    "headline",
    "key_facts",
    "retention_rows",
    "skipped_steps",
    "source_names",
]

Tone = Literal["better", "worse", "same", "plain"]

STAGE_TITLES: Mapping[str, str] = {
    "tokenizer": "Tokenizer",
    "pretrain": "Pre-training",
    "sft": "SFT",
    "reward": "Reward model",
    "dpo": "DPO",
    "rlvr": "RLVR",
    "rlhf": "RLHF",
    "qat": "Trained for quantization",
    "mtp": "Draft layers",
    "ptq": "Quantized untrained",
    "quantize": "Quantized",
    "eval": "Evaluation",
    "lab": "Laboratory",
    "trm": "Recursive model",
    "base": "Base",
}
STAGE_WORDS: Mapping[str, str] = {
    "tokenizer": "learns which pieces of text become tokens",
    "pretrain": "learns language and arithmetic by predicting the next token",
    "sft": "learns to write out its steps, from worked solutions (supervised fine-tuning)",
    "rlvr": "tries problems itself and is rewarded for right answers (reinforcement learning, GRPO with IcePop)",
    "reward": "a model of which answers are preferred, learnt from pairs",
    "dpo": "learns from the preferred and the other answer of each pair directly",
    "rlhf": "answers open prompts and is rewarded for what is preferred (reinforcement learning, GRPO, under a guard)",
    "qat": "learns again with its weights and inputs as they will be once they are quantized",
    "mtp": "extra layers learn to foresee what the finished model will say, for speculative decoding",
    "quantize": "the last model's weights in fewer bits",
    "eval": "answers problems that no stage was trained on",
    "lab": "trains twins that differ in one thing alone: their residual, or their rollouts and loss",
    "trm": "learns to solve puzzles by correcting its own answer again and again",
}
_BASELINES: Mapping[str, str] = {
    "best_operator": "Best single operator",
    "best_single_operator": "Best single operator",
    "single_operator": "Best single operator",
    "sum": "Sum of all numbers",
    "sum_of_numbers": "Sum of all numbers",
    "sum_all": "Sum of all numbers",
}


@dataclass(frozen=True, slots=True)
class Headline:
    """The run in one sentence, the sentences that belong beside it, and whether it is good news."""

    sentence: str
    beside: Sequence[str]
    tone: Tone


@dataclass(frozen=True, slots=True)
class Fact:
    """One number worth a tile: what it is, the number, and a word on it."""

    label: str
    value: str
    note: str = ""


# ---- words for numbers -------------------------------------------------------------------------------------------


def format_seconds(seconds: float | None) -> str:
    """`903` -> `15 min 3 s`, `9000` -> `2 h 30 min`, `0.8` -> `0.8 s`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_bytes(size: float | None) -> str:
    """`1288490188` -> `1.29 GB` (powers of ten)."""
    if size is None:
        return "–"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} B"


def _count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def baseline_title(name: str) -> str:
    """What a trivial baseline is called in a report."""
    return _BASELINES.get(name, name.replace("_", " ").capitalize())


def _title(stage: str) -> str:
    return STAGE_TITLES.get(stage, stage)


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# ---- the headline ------------------------------------------------------------------------------------------------


def headline(record: RunRecord) -> Headline:
    """The run in one sentence: what the last training stage changed on held-out problems, good or bad."""
    evaluation = record.evaluation
    stages = list(_mapping(evaluation.get("stages")))
    if not stages:
        return _headline_without_eval(record)
    if kept := _kept(evaluation, stages[-1]):
        return _headline_of_kept(evaluation, kept, stages)
    change = _find_difference(evaluation, stages, "average")
    if change is None:
        return _headline_of_one(evaluation, stages[-1])
    before, after = (_score(evaluation, change[side], "all", "average") for side in ("before", "after"))
    name = _title(change["after"])
    shift = (
        f"{signed_points(change['value'])} points, 95 % interval {signed_points(change['low'])} "
        f"to {signed_points(change['high'])}"
    )
    old, new = percent(before.get("value")), percent(after.get("value"))
    tone: Tone
    if change["low"] > 0:
        sentence, tone = f"{name} raised held-out accuracy from {old} to {new} ({shift}).", "better"
    elif change["high"] < 0:
        sentence, tone = f"{name} lowered held-out accuracy from {old} to {new} ({shift}).", "worse"
    else:
        sentence = f"{name} did not clearly change held-out accuracy: {old} before, {new} after ({shift})."
        tone = "same"
    return Headline(sentence, _beside(evaluation, stages), tone)


def _headline_without_eval(record: RunRecord) -> Headline:
    done = sum(stage.state == "finished" for stage in record.stages.values())
    if done < len(record.stages):
        sentence = f"This run is not finished: {done} of {len(record.stages)} stages are."
        return Headline(sentence, [], "plain")
    if measured := lab_sentence(record.variants):
        return Headline(measured, lab_beside(record.variants), "plain")
    if measured := mismatch_sentence(record.mismatch_variants):
        return Headline(measured, mismatch_beside(record.mismatch_variants), "plain")
    if solved := trm_sentence(record.result("trm")):
        return Headline(solved, trm_beside(record.result("trm")), "plain")
    trained = [stage for stage in record.stages.values() if stage.kind in POLICY_STAGES]
    beside = ["This recipe has no evaluation, so nothing is said about held-out answers."]
    for name, words in (("validation/loss", "validation loss"), ("train/loss", "training loss")):
        values = [value for _, value in series(trained[-1].metrics, name) if value is not None] if trained else []
        if len(values) > 1:
            verb = "brought down" if values[-1] < values[0] else "did not bring down"
            sentence = (
                f"{_title(trained[-1].kind)} {verb} the {words}: {number(values[0])} at first, {number(values[-1])} "
                "at the end."
            )
            return Headline(sentence, beside, "plain")
    return Headline(f"All {done} stages of this run are finished.", beside, "plain")


def _headline_of_one(evaluation: Mapping[str, Any], stage: str) -> Headline:
    score = _score(evaluation, stage, "all", "average")
    sentence = (
        f"{_title(stage)} answers {percent(score.get('value'))} of the held-out problems "
        f"(95 % interval {_interval(score)})."
    )
    return Headline(sentence, _beside(evaluation, [stage]), "plain")


def _beside(evaluation: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    sentences = [_what_was_measured(evaluation)]
    greedy = _find_difference(evaluation, stages, "greedy")
    if greedy:
        old, new = (_score(evaluation, greedy[side], "all", "greedy").get("value") for side in ("before", "after"))
        sentences.append(
            f"With greedy answers it went from {percent(old)} to {percent(new)} ({signed_points(greedy['value'])} "
            f"points, {signed_points(greedy['low'])} to {signed_points(greedy['high'])}; exact McNemar "
            f"p = {number(greedy['p_value'], 2)})."
        )
    sentences.append(_against_baselines(evaluation, stages[-1]))
    return [sentence for sentence in sentences if sentence]


def _what_was_measured(evaluation: Mapping[str, Any]) -> str:
    samples, problems = evaluation.get("samples"), evaluation.get("num_problems")
    if not samples or not problems:
        return ""
    return (
        f"Accuracy is the mean of {samples} sampled answers to each of {problems:,} problems that no stage was "
        "trained on."
    )


def _against_baselines(evaluation: Mapping[str, Any], stage: str) -> str:
    baselines = _mapping(evaluation.get("baselines"))
    scores = {name: _mapping(_mapping(by_source).get("all")) for name, by_source in baselines.items()}
    scores = {name: score for name, score in scores.items() if "value" in score}
    if not scores:
        return ""
    best = max(scores, key=lambda name: float(scores[name]["value"]))
    bar, score = float(scores[best]["value"]), _score(evaluation, stage, "all", "average")
    if not score:
        return ""
    words = f"the better of the two trivial baselines ({baseline_title(best).lower()}: {percent(bar)})"
    if score["low"] > bar:
        return f"{_title(stage)} is above {words}."
    if score["high"] < bar:
        return f"{_title(stage)} is below {words}: a rule without learning answers more problems."
    return f"{_title(stage)} cannot be told apart from {words}."


def _score(evaluation: Mapping[str, Any], stage: str, source: str, metric: str) -> Mapping[str, Any]:
    by_source = _mapping(_mapping(evaluation.get("stages")).get(stage))
    return _mapping(_mapping(by_source.get(source)).get(metric))


def _differences(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = evaluation.get("differences")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _shown_differences(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of sources that are shown; a single source says the same as all together."""
    sources = source_names(evaluation)
    return [row for row in _differences(evaluation) if row.get("source") in sources]


def _find_difference(evaluation: Mapping[str, Any], stages: Sequence[str], metric: str) -> Mapping[str, Any] | None:
    if len(stages) < 2:
        return None
    wanted = (stages[-2], stages[-1], "all", metric)
    for row in _differences(evaluation):
        if (row.get("before"), row.get("after"), row.get("source"), row.get("metric")) == wanted:
            return row
    return None


def _kept(evaluation: Mapping[str, Any], stage: str) -> Mapping[str, Any] | None:
    """What a stage kept of all problems' score, where it is quantized."""
    rows = evaluation.get("retention")
    for row in rows if isinstance(rows, list) else []:
        if (row.get("after"), row.get("source"), row.get("metric")) == (stage, "all", "average"):
            return _mapping(row)
    return None


def _headline_of_kept(evaluation: Mapping[str, Any], kept: Mapping[str, Any], stages: Sequence[str]) -> Headline:
    old, new = (_score(evaluation, kept[side], "all", "average").get("value") for side in ("before", "after"))
    sentence = f"{_title(kept['after'])}, the model "
    if kept["high"] is None:
        sentence += f"scores {percent(new)}, and {percent(old)} before: too few right answers to say what it keeps."
    else:
        sentence += (
            f"keeps {percent(kept['value'])} of its score (95 % interval {_interval_of(kept)}): "
            f"{percent(old)} before, {percent(new)} after."
        )
    beside = [_what_was_measured(evaluation)]
    if kept["after"] != "ptq" and (plain := _kept(evaluation, "ptq")) and plain["high"] is not None:
        beside.insert(0, f"Without training for it, it keeps {percent(plain['value'])} ({_interval_of(plain)}).")
    beside.append(_against_baselines(evaluation, stages[-1]))
    return Headline(sentence, [text for text in beside if text], "plain")


def _interval_of(kept: Mapping[str, Any]) -> str:
    return f"{percent(kept['low'])} to {percent(kept['high']) if kept['high'] is not None else 'any'}"


# ---- retention ---------------------------------------------------------------------------------------------------


def retention_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """What each quantized checkpoint keeps of the score before, with its interval, and how many problems that is."""
    rows = evaluation.get("retention")
    sources = source_names(evaluation)
    return [
        [
            _title(str(row["after"])),
            str(row["source"]),
            "sampled" if row["metric"] == "average" else "greedy",
            percent(row["value"]),
            _interval_of(row),
            str(row["num_problems"]),
        ]
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, Mapping) and row.get("source") in sources
    ]


# ---- key facts ---------------------------------------------------------------------------------------------------


def key_facts(record: RunRecord) -> list[Fact]:
    """The numbers for the tiles at the top; only those that the run holds."""
    facts = [*_score_facts(record.evaluation), *_model_facts(record)]
    wall = [stage.result.get("wall_s") for stage in record.stages.values()]
    seconds = sum(value for value in wall if isinstance(value, int | float))
    cores = record.environment.get("cores_physical")
    if seconds:
        facts.append(
            Fact(
                "Wall time",
                format_seconds(seconds),
                f"all stages, {cores} core{'' if cores == 1 else 's'}" if cores else "all stages",
            )
        )
    peaks = [stage.result.get("peak_rss_bytes") for stage in record.stages.values()]
    peak = max((value for value in peaks if isinstance(value, int | float)), default=None)
    if peak:
        facts.append(Fact("Peak memory", format_bytes(peak), "largest of all stages"))
    return facts


def _score_facts(evaluation: Mapping[str, Any]) -> list[Fact]:
    stages = list(_mapping(evaluation.get("stages")))
    facts = []
    if stages:
        score = _score(evaluation, stages[-1], "all", "average")
        if score:
            note = f"after {_title(stages[-1])}, 95 % {_interval(score)}"
            facts.append(Fact("Held-out accuracy", percent(score["value"]), note))
    change = _find_difference(evaluation, stages, "average")
    if change:
        note = (
            f"over {_title(change['before'])}, 95 % {signed_points(change['low'])} to {signed_points(change['high'])}"
        )
        facts.append(Fact("Gain in points", signed_points(change["value"]), note))
    return facts


def _model_facts(record: RunRecord) -> list[Fact]:
    recursive = _number(record.result("trm"), "parameters")
    if recursive and not set(POLICY_STAGES) & set(record.stages):
        return [Fact("Parameters", _count(recursive), "used again in every pass")]
    config = model_config(record)
    if config is None:
        return []
    total, active = config.num_parameters(), config.num_parameters(active=True)
    return [Fact("Parameters", _count(total), f"{_count(active)} active for each token")]


def model_config(record: RunRecord) -> ModelConfig | None:
    """The shape of the model, from the recipe; None where it says nothing of it."""
    table = record.recipe.get("model")
    if not isinstance(table, Mapping):
        return None
    known = {key: value for key, value in table.items() if key in ModelConfig.model_fields}
    return ModelConfig.model_validate(known)


# ---- accuracy ----------------------------------------------------------------------------------------------------


def source_names(evaluation: Mapping[str, Any]) -> list[str]:
    """`all`, then every source that was scored on its own (a single one adds nothing to `all`)."""
    sources = list(_mapping(evaluation.get("sources")))
    return ["all", *sources] if len(sources) > 1 else ["all"]


def accuracy_bars(evaluation: Mapping[str, Any], source: str) -> list[Bar]:
    """Rows of the accuracy plot for one source: baselines first, then the stages in order."""
    bars = []
    for name, by_source in _mapping(evaluation.get("baselines")).items():
        score = _mapping(_mapping(by_source).get(source))
        if score:
            bars.append(Bar(baseline_title(name), score["value"], None, None, "c-baseline"))
    for stage in _mapping(evaluation.get("stages")):
        score, greedy = (_score(evaluation, stage, source, metric) for metric in ("average", "greedy"))
        if score:
            hollow = (greedy["value"], greedy["low"], greedy["high"]) if greedy else None
            bars.append(Bar(_title(stage), score["value"], score["low"], score["high"], f"c-{stage}", second=hollow))
    return bars


def accuracy_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Table rows: who and on what, avg@k, greedy, pass@k, share of answers cut off, problems.

    A line break in a cell separates its figure from the small print below it.
    """
    rows = []
    for source in source_names(evaluation):
        for name, by_source in _mapping(evaluation.get("baselines")).items():
            score = _mapping(_mapping(by_source).get(source))
            if score:
                label = f"{baseline_title(name)}\n{_source_words(source)}"
                rows.append([label, "–", _with_interval(score), "–", "–", f"{score['num_problems']:,}"])
        for stage in _mapping(evaluation.get("stages")):
            rows.extend(_stage_row(evaluation, stage, source))
    return rows


def _source_words(source: str) -> str:
    return "all problems" if source == "all" else source


def _with_interval(estimate: Mapping[str, Any]) -> str:
    if not estimate:
        return "–"
    return f"{percent(estimate['value'])}\n{percent(estimate['low'])} to {percent(estimate['high'])}"


def _stage_row(evaluation: Mapping[str, Any], stage: str, source: str) -> list[list[str]]:
    scores = _mapping(_mapping(_mapping(evaluation.get("stages")).get(stage)).get(source))
    if not scores:
        return []
    average, greedy = _mapping(scores.get("average")), _mapping(scores.get("greedy"))
    passes = _mapping(scores.get("pass_at"))
    best = max(passes, key=int, default=None)
    cut = _share(_mapping(_mapping(scores.get("outcomes")).get("sampled")), "length")
    problems = f"{(average or greedy).get('num_problems', 0):,}"
    label = f"{_title(stage)}\n{_source_words(source)}"
    any_right = percent(passes[best]) if best else "–"
    return [[label, _with_interval(average), _with_interval(greedy), any_right, cut, problems]]


def _share(outcomes: Mapping[str, Any], outcome: str) -> str:
    total = sum(outcomes.values())
    return percent(outcomes.get(outcome, 0) / total) if total else "–"


def difference_bars(evaluation: Mapping[str, Any]) -> list[Bar]:
    """Rows of the plot of paired differences: the sampled metric, every pair of stages and source."""
    bars = []
    for row in _shown_differences(evaluation):
        if row.get("metric") == "average":
            label = f"{_title(row['before'])} → {_title(row['after'])}"
            note = _source_words(str(row["source"]))
            bars.append(Bar(label, row["value"], row["low"], row["high"], f"c-{row['after']}", note=note))
    return bars


def difference_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Table rows: change and on what, points with interval, problems up and down, p, detectable difference."""
    rows = []
    for row in _shown_differences(evaluation):
        before = row["before"]
        start = baseline_title(before) if before in _mapping(evaluation.get("baselines")) else _title(before)
        measure = f"mean of {evaluation.get('samples', 'k')}" if row["metric"] == "average" else "greedy"
        rows.append(
            [
                f"{start} → {_title(row['after'])}\n{_source_words(row['source'])}, {measure}",
                f"{signed_points(row['value'])}\n{signed_points(row['low'])} to {signed_points(row['high'])}",
                f"{row['wins']:,} / {row['losses']:,}",
                number(row["p_value"], 2),
                f"{100 * row['min_detectable']:.1f}",
            ]
        )
    return rows


# ---- cost --------------------------------------------------------------------------------------------------------


def cost_rows(record: RunRecord) -> list[list[str]]:
    """Table rows: stage, state, steps, tokens, wall time, CPU time, tokens per second, peak memory."""
    rows = []
    for kind, stage in record.stages.items():
        result = stage.result
        tokens = _number(result, "tokens")
        rows.append(
            [
                _title(kind),
                stage.state,
                number(_number(result, "steps") or _last_step(stage)),
                number(tokens) if tokens else "–",
                format_seconds(_number(result, "wall_s")),
                format_seconds(_number(result, "cpu_s")),
                number(_rate(result, tokens)),
                format_bytes(_number(result, "peak_rss_bytes")),
            ]
        )
    return rows


def _number(result: Mapping[str, Any], key: str) -> float | None:
    value = result.get(key)
    return float(value) if isinstance(value, int | float) else None


def _last_step(stage: StageRecord) -> float | None:
    return float(stage.metrics[-1]["step"]) if stage.metrics and "step" in stage.metrics[-1] else None


def _rate(result: Mapping[str, Any], tokens: float | None) -> float | None:
    seconds = _number(result, "wall_s")
    return round(tokens / seconds) if tokens and seconds else None


def skipped_steps(stage: StageRecord) -> str:
    """A sentence on steps without an update, where there were any."""
    skipped = sum(bool(value) for _, value in series(stage.metrics, "train/skipped"))
    if not skipped:
        return ""
    steps = len(stage.metrics)
    return (
        f"{skipped:,} of {steps:,} logged steps changed nothing: every problem's tries had equal rewards, so there was "
        "nothing to learn from them."
    )


# ---- data and machine --------------------------------------------------------------------------------------------


def contamination_sentences(check: Mapping[str, Any]) -> list[str]:
    """What the contamination check found, in words."""
    ngram, removed, remaining = check.get("ngram"), check.get("removed", 0), check.get("remaining")
    train, heldout = check.get("num_train", 0), check.get("num_heldout", 0)
    how = (
        f"Every run of {ngram} words (numbers written as 0) of the {heldout:,} held-out problems was looked up in the "
        f"{train + removed:,} training problems."
    )
    if removed == 1:
        found = "One training problem shared such a run and was removed before training."
    elif removed:
        found = f"{removed:,} training problems shared such a run and were removed before training."
    else:
        found = "None of them shared such a run."
    if remaining:
        end = f"A second pass still finds {remaining:,} overlaps: the held-out accuracy above is not clean."
    else:
        end = f"A second pass over the {train:,} that remain finds none."
    return [f"{how} {found} {end}"]


def count_rows(check: Mapping[str, Any]) -> list[list[str]]:
    """Table rows: problems per source and part."""
    counts = _mapping(check.get("counts"))
    return [
        [source, *(number(_number(_mapping(parts), part)) for part in ("train", "validation", "test"))]
        for source, parts in counts.items()
    ]


_ENVIRONMENT: Mapping[str, str] = {
    "cpu": "Processor",
    "cores_physical": "Physical cores",
    "cores_logical": "Logical cores",
    "memory_bytes": "Memory",
    "platform": "System",
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "tokenizers": "tokenizers",
    "tafkir": "Tafkir",
    "git_commit": "Source commit",
    "command": "Command",
}


def environment_rows(environment: Mapping[str, Any]) -> list[list[str]]:
    """Table rows: what the numbers were measured on."""
    ordered = [key for key in _ENVIRONMENT if key in environment]
    ordered += [key for key in environment if key not in _ENVIRONMENT]
    rows = []
    for key in ordered:
        value = environment[key]
        if value is None:
            continue
        text = format_bytes(value) if key == "memory_bytes" and isinstance(value, int | float) else str(value)
        if isinstance(value, list):
            text = " ".join(map(str, value))
        rows.append([_ENVIRONMENT.get(key, key), text])
    return rows
