"""The `eval` stage: scores the checkpoints of a run on held-out problems, beside trivial baselines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from tafkir.data.contamination import ContaminationReport
from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import CheckpointError, DataError, RecipeError
from tafkir.eval.metrics import accuracy, paired_ratio
from tafkir.eval.records import GREEDY, EvalRecord
from tafkir.eval.run import checkpoint_fingerprint, evaluate
from tafkir.eval.summary import ALL, METRICS, difference_table, problem_scores, score_table, sources_of
from tafkir.ops.native import select_kernels
from tafkir.protocols import Task
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.schema import EvalConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.records import POLICY_STAGES, Example, StageName
from tafkir.tasks.baselines import fit_single_operator, sum_of_numbers
from tafkir.tasks.math import WordProblems
from tafkir.tasks.mixture import TaskMixture
from tafkir.train.loop import peak_rss_bytes

__all__ = ["run_eval"]

MAX_OVERLAPS_LISTED = 20
_QUANTIZED = ("ptq", "quantize")
NUM_GENERATED = 100
"""Problems of each level of a generated kind, where the recipe's `max_problems` names no other number."""

_logger = logging.getLogger(__name__)


def run_eval(ctx: StageContext) -> dict[str, Any]:
    """Answer the held-out problems with every stage that the recipe's `eval.stages` names and this run has.

    A recipe without a training stage has its base scored, under the name `base`. Answers go to
    `eval/<task>-<stage>.jsonl`; a killed evaluation goes on from there.

    Returns:
        Settings, scores per stage and source, the trivial baselines, paired differences between consecutive stages
        and between the baselines and the last stage, and the contamination check.

    Raises:
        RecipeError: none of `eval.stages` is in the recipe, and it has no base either.
        CheckpointError: a stage's checkpoint is missing or damaged.
        DataError: there is no held-out problem.
    """
    config = ctx.recipe.eval
    assert config is not None
    torch.set_num_threads(ctx.recipe.threads)
    select_kernels(ctx.recipe.kernels)
    began, began_cpu = time.perf_counter(), time.process_time()
    corpus = load_corpus(ctx.recipe.data)
    task = _build_task(config, corpus)
    examples = _choose(task, config)
    answers: dict[str, list[EvalRecord]] = {}
    for name, checkpoint in _checkpoints(ctx, config).items():
        answers[name] = _evaluate_checkpoint(ctx, config, task, examples, name, checkpoint)
    guesses = {} if config.tasks else _baselines(task, examples, corpus)
    result = _summarise(config, task, answers, guesses)
    return {
        **result,
        "contamination": _describe_contamination(corpus.contamination, corpus),
        "tokens": sum(record.tokens for records in answers.values() for record in records),
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _build_task(config: EvalConfig, corpus: Corpus) -> Task:
    """The word problems, or the tasks that the recipe names; generated problems are the same in every run."""
    words = WordProblems(corpus.part(config.split))
    if not config.tasks:
        return words
    return TaskMixture(config.tasks, words, samples=config.max_problems or NUM_GENERATED)


def _choose(task: Task, config: EvalConfig) -> list[Example]:
    """The held-out examples, at most `max_problems` per source."""
    taken: dict[str, int] = {}
    chosen = []
    for example in task.examples(config.split):
        taken[example.source] = taken.get(example.source, 0) + 1
        if not config.max_problems or taken[example.source] <= config.max_problems:
            chosen.append(example)
    if not chosen:
        raise DataError(
            f"no problem is in the {config.split} part",
            where="data.sources",
            expected=f'rows with split "{config.split}"',
            fix="add such rows, or set eval.split",
        )
    return chosen


def _checkpoints(ctx: StageContext, config: EvalConfig) -> dict[str, Path]:
    """Name and folder of every checkpoint to score."""
    owners = {name: "quantize" if name == "ptq" else name for name in config.stages}
    present = [name for name in config.stages if getattr(ctx.recipe, owners[name]) is not None]
    for name in config.stages:
        if name not in present:
            _logger.info("eval: the recipe has no stage %s, so it is not scored", name)
    if not present:
        trained = any(getattr(ctx.recipe, name) is not None for name in POLICY_STAGES)
        if trained or ctx.previous is None:
            raise RecipeError(
                "none of these stages is in the recipe",
                where=f"eval.stages = {list(config.stages)}",
                expected="stages that the recipe has",
                fix="set eval.stages",
            )
        return {"base": ctx.previous}
    return {name: _checkpoint_of(ctx, name) for name in present}


def _checkpoint_of(ctx: StageContext, name: str) -> Path:
    if name == "base":
        assert ctx.recipe.base is not None
        return find_checkpoint(ctx.recipe.base)
    if name == "ptq":
        # What is quantized without having been trained for it: the quantize stage's second copy.
        return ctx.run.stage("quantize").path / "ptq"
    return ctx.run.stage(cast(StageName, name)).checkpoint_dir


def _evaluate_checkpoint(
    ctx: StageContext, config: EvalConfig, task: Task, examples: Sequence[Example], name: str, checkpoint: Path
) -> list[EvalRecord]:
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"stage {name} has no checkpoint", where=str(checkpoint), fix=f"run the recipe with --from {name}"
        )
    records = evaluate(
        ctx.build_completer(checkpoint),
        Tokenizer.load(checkpoint),
        task,
        examples,
        samples=config.samples,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=derive_seed(ctx.seed, "eval"),
        path=ctx.run.path / _records_name(task, name),
        fingerprint=checkpoint_fingerprint(checkpoint) + ("" if config.activations == "exact" else " quantized"),
        label=f"eval {name}",
    )
    score = score_table(records)[ALL]
    _logger.info(
        "%s: %.1f %% of sampled and %.1f %% of greedy answers are correct, on %d problems",
        name,
        100 * score["average"]["value"],
        100 * score["greedy"]["value"],
        len(examples),
    )
    return records


def _records_name(task: Task, stage: str) -> str:
    return f"eval/{task.name}-{stage}.jsonl"


def _baselines(task: Task, examples: Sequence[Example], corpus: Corpus) -> dict[str, list[EvalRecord]]:
    """What the two trivial baselines answer, graded by the task's own grader."""
    rules: dict[str, Callable[[str], str | None]] = {
        "best_operator": fit_single_operator(corpus.train),
        "sum_of_numbers": sum_of_numbers,
    }
    return {name: [_guess(task, e, rule(e.question)) for e in examples] for name, rule in rules.items()}


def _guess(task: Task, example: Example, answer: str | None) -> EvalRecord:
    text = "" if answer is None else f"\\boxed{{{answer}}}"
    verdict = task.grade(example, text)
    return EvalRecord(
        key="",
        example_id=example.id,
        source=example.source,
        repeat=GREEDY,
        question=example.question,
        text=text,
        outcome=verdict.outcome,
        reward=verdict.reward,
        extracted=verdict.extracted,
        expected=verdict.expected,
        reason=verdict.reason,
        tokens=0,
        finish_reason="stop",
    )


def _summarise(
    config: EvalConfig,
    task: Task,
    answers: Mapping[str, Sequence[EvalRecord]],
    guesses: Mapping[str, Sequence[EvalRecord]],
) -> dict[str, Any]:
    names = list(answers)
    last = answers[names[-1]]
    differences = [row for a, b in pairwise(names) for row in difference_table(answers[a], answers[b], (a, b))]
    for name, records in guesses.items():
        differences += difference_table(records, last, (name, names[-1]))
    sources = sources_of(last)
    kept = _retention(answers)
    return {
        "task": task.name,
        "split": config.split,
        "samples": config.samples,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "num_problems": sum(sources.values()),
        "sources": sources,
        "stages": {name: score_table(records) for name, records in answers.items()},
        "baselines": {name: _baseline_scores(records) for name, records in guesses.items()},
        "differences": differences,
        **({"retention": kept} if kept else {}),
        "records": {name: _records_name(task, name) for name in names},
    }


def _retention(answers: Mapping[str, Sequence[EvalRecord]]) -> list[dict[str, Any]]:
    """What the quantized checkpoints keep of the score of the model that they were made of, where it is scored."""
    own = [name for name in answers if name not in _QUANTIZED]
    rows: list[dict[str, Any]] = []
    for name in _QUANTIZED:
        if own and name in answers:
            before, after = answers[own[-1]], answers[name]
            for metric in METRICS:
                for source in (ALL, *sources_of(after)):
                    scores = [problem_scores(side, metric, source) for side in (before, after)]
                    found = paired_ratio(scores[0], scores[1])
                    if found is not None:
                        high = found.high if math.isfinite(found.high) else None
                        row = {"before": own[-1], "after": name, "source": source, "metric": metric}
                        rows.append({**row, **found.to_dict(), "high": high})
    return rows


def _baseline_scores(records: Sequence[EvalRecord]) -> dict[str, Any]:
    return {
        source: accuracy([r.correct for r in records if source in (ALL, r.source)]).to_dict()
        for source in (ALL, *sources_of(records))
    }


def _describe_contamination(check: ContaminationReport, corpus: Corpus) -> dict[str, Any]:
    listed = check.removed[:MAX_OVERLAPS_LISTED]
    return {
        "ngram": check.ngram,
        "num_train": check.num_train,
        "num_heldout": check.num_heldout,
        "removed": len(check.removed),
        "remaining": check.remaining,
        "removed_examples": [
            {"train_id": overlap.train_id, "heldout_id": overlap.heldout_id, "text": overlap.text} for overlap in listed
        ],
        "counts": corpus.counts(),
        "dropped": {source: dict(reasons) for source, reasons in corpus.dropped.items()},
    }
