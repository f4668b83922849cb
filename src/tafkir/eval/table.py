"""The table of an evaluation: a row a model and task, with what went wrong beside it; and accuracy by token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tafkir.eval.harness import grade_sample
from tafkir.eval.metrics import Estimate, mean_interval
from tafkir.eval.perplexity import PERPLEXITY, perplexity_of
from tafkir.eval.samples import FAILURES, Sample
from tafkir.eval.scores import codeforces_rating, estimate_of, metric_scores
from tafkir.records import Example
from tafkir.tasks.catalog import EvalTask

__all__ = ["budget_curve", "render_scores", "score_samples"]

Key = tuple[str, str]
STEPS = "steps"


def _groups(samples: Iterable[Sample]) -> dict[Key, list[Sample]]:
    """(model, task) -> its samples, in order of first appearance."""
    groups: dict[Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.task), []).append(sample)
    return groups


def score_samples(samples: Iterable[Sample], metrics: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One row a model and task.

    Args:
        metrics: task -> the metric on its card: "pass@2" counts an item by whether one of two answers is right
            (unbiased where there are more); "perplexity" adds `perplexity` and `bits_per_byte` and has no accuracy;
            "steps" adds `steps`, the share of all steps that are right. Codeforces' problems with ratings add
            `rating`, as `codeforces_rating` gives it.

    Returns:
        `model`, `task`, `task_version`, `items`, `samples`, `repeats`; `accuracy` (mean over items of the mean score
        of their answers, with its 95 % interval clustered by item; None where every answer failed); shares of
        `length`, `no_answer` and `failed` answers, `outcomes` and `reasons` (counts; of failures, the commonest);
        `mean_tokens`, `tokens`.
    """
    metrics = metrics or {}
    return [_row(key, group, metrics.get(key[1], "accuracy")) for key, group in _groups(samples).items()]


def _scores(samples: Iterable[Sample], metric: str) -> dict[str, list[float]]:
    return {} if metric == PERPLEXITY else metric_scores(samples, metric)


def _row(key: Key, group: Sequence[Sample], metric: str) -> dict[str, Any]:
    outcomes = Counter(sample.outcome for sample in group)
    scores = _scores(group, metric)
    answered = [sample for sample in group if not sample.failed]
    return {
        "model": key[0],
        "task": key[1],
        "task_version": group[-1].task_version,
        "metric": metric,
        "items": len({sample.item for sample in group}),
        "samples": len(group),
        "repeats": len({sample.repeat for sample in group}),
        "accuracy": estimate_of(scores).to_dict() if scores else None,
        "length": outcomes["length"] / len(group),
        "no_answer": outcomes["no_answer"] / len(group),
        "failed": sum(sample.failed for sample in group) / len(group),
        "outcomes": dict(outcomes.most_common()),
        "reasons": dict(Counter(sample.reason for sample in group if sample.outcome in FAILURES).most_common(5)),
        "mean_tokens": fmean(sample.tokens for sample in answered) if answered else 0.0,
        "tokens": sum(sample.tokens for sample in group),
        **(perplexity_of(group) if metric == PERPLEXITY else {}),
        **({"rating": rating} if (rating := codeforces_rating(group)) else {}),
        **({"steps": found.to_dict()} if metric == STEPS and (found := _steps(answered)) else {}),
    }


def _steps(answered: Sequence[Sample]) -> Estimate | None:
    """Right steps of all steps, whose marks ("1101") `extracted` holds; with the interval of a ratio of two sums."""
    marks: dict[str, list[tuple[int, int]]] = {}
    for sample in answered:
        if sample.extracted:
            marks.setdefault(sample.item, []).append((sample.extracted.count("1"), len(sample.extracted)))
    if not marks:
        return None
    means = [[fmean(column) for column in zip(*own, strict=True)] for own in marks.values()]
    right, asked = (sum(column) for column in zip(*means, strict=True))
    share = right / asked
    # Cochran's linearised ratio: its error is that of the mean of what each problem has above the common share
    spread = mean_interval([(mine - share * all_) * len(means) / asked for mine, all_ in means])
    half = spread.high - spread.value if len(means) > 1 else 1.0
    low, high = max(0.0, share - half), min(1.0, share + half)
    return Estimate(share, low, high, len(means), "ratio of sums, clustered by problem")


def render_scores(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    width = max([5, *(len(row["model"]) for row in rows)])
    tasks = max([4, *(len(row["task"]) for row in rows)])
    head = f"{'model':<{width}}  {'task':<{tasks}}  {'items':>6} {'k':>4}  {'accuracy':<24}"
    lines = [f"{head}{'length':>8}{'none':>8}{'failed':>8}{'tokens':>9}"]
    for row in rows:
        named = f"{row['model']:<{width}}  {row['task']:<{tasks}}  {row['items']:>6,} {row['repeats']:>4}"
        lines.append(
            f"{named}  {_score_words(row):<24}"
            f"{row['length']:>8.1%}{row['no_answer']:>8.1%}{row['failed']:>8.1%}{row['mean_tokens']:>9,.0f}"
        )
        lines += [f"  {count:,} failed: {reason}" for reason, count in row["reasons"].items()]
        if found := row.get("rating"):
            ends = f"[{found['low']:,.0f}, {found['high']:,.0f}]"
            above = f"above {found['percentile']:.1f} % of the users of 2024"
            lines.append(f"  rating: {found['value']:,.0f} {ends} by {found['num_problems']:,} rated problems, {above}")
        if found := row.get("steps"):
            lines.append(f"  steps: {_percent(found)}")
    return "\n".join(lines)


def _score_words(row: Mapping[str, Any]) -> str:
    found = row["accuracy"]
    if found:
        return _percent(found)
    if "perplexity" in row:
        return f"{row['perplexity']:.4g} ({row['bits_per_byte']:.3f} bit/byte)"
    return "all failed"


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:5.1f} % [{100 * found['low']:5.1f}, {100 * found['high']:5.1f}]"


# ---- accuracy by token budget --------------------------------------------------------------------------------------


def budget_curve(
    samples: Iterable[Sample], tasks: Mapping[str, EvalTask], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """What each model would have scored with fewer tokens an answer, from the text that is stored.

    An answer longer than a budget is cut and graded as one that the limit cut off: what is boxed by then counts,
    also within the thinking. Tokens are taken to be equally long within one answer.

    Returns:
        One row a model, task and budget: `model`, `task`, `budget`, `accuracy`, `cut` (share of answers cut).
    """
    rows = []
    for (model, name), group in _groups(samples).items():
        task = tasks[name]
        if task.card.metric == PERPLEXITY:
            continue
        examples = {example.id: example for example in task.examples("test")}
        graded = [sample for sample in group if not sample.failed]
        for budget in sorted(budgets):
            scores = _scores([_cut(task, examples[sample.item], sample, budget) for sample in graded], task.card.metric)
            rows.append(
                {
                    "model": model,
                    "task": name,
                    "budget": budget,
                    "accuracy": estimate_of(scores).to_dict() if scores else None,
                    "cut": fmean(sample.tokens > budget for sample in graded) if graded else 0.0,
                }
            )
    return rows


def _cut(task: EvalTask, example: Example, sample: Sample, budget: int) -> Sample:
    if sample.tokens <= budget:
        return sample
    thinking, text = sample.reasoning, sample.text
    kept = round((len(thinking) + len(text)) * budget / sample.tokens)
    so_far = text[: kept - len(thinking)] if kept > len(thinking) else thinking[:kept]
    return grade_sample(task, example, replace(sample, text=so_far, tokens=budget, finish_reason="length"))
