"""Results and samples as lm-evaluation-harness writes them with `--log_samples` (0.4.13): read, and written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tafkir.errors import DataError
from tafkir.eval.samples import Sample
from tafkir.eval.scores import score_of
from tafkir.eval.statistics import standard_error
from tafkir.runlog.atomic import read_json, write_json, write_text
from tafkir.runlog.metrics import read_jsonl

__all__ = ["load_lm_eval", "write_lm_eval"]

_FILE = re.compile(r"samples_(?P<task>.+)_(?P<stamp>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")
_IDS = ("id", "unique_id", "task_id", "item")
_METRIC = "score"


def load_lm_eval(files: Sequence[Path]) -> list[Sample]:
    """Read files named `samples_<task>_<time>.jsonl`; the model's name is in the results file beside them.

    A task that was scored by several filters becomes several, `<task>, <filter>`. lm-eval scores the first repeat
    alone, so one sample an item comes of it; files that Tafkir wrote bring all repeats back.

    Raises:
        RunDirError: a line is not JSON.
        DataError: a row lacks a field, or its metric is no number from 0 to 1.
    """
    return [sample for file in files for sample in _read(file)]


def _read(file: Path) -> Iterator[Sample]:
    named = _FILE.fullmatch(file.name)
    task = named["task"] if named else file.stem.removeprefix("samples_")
    results = file.with_name(f"results_{named['stamp']}.json") if named else None
    about = read_json(results) if results and results.is_file() else {}
    rows = list(read_jsonl(file))
    filters = list(dict.fromkeys(str(row.get("filter", "none")) for row in rows))
    ids = [_id_of(row) for row in rows]
    # Rows of the first filter stand for all; a data set whose ids repeat is told apart by its order.
    own = [name for name, row in zip(ids, rows, strict=True) if str(row.get("filter", "none")) == filters[0]]
    unique = len(set(own)) == len(own)
    for number, (row, name) in enumerate(zip(rows, ids, strict=True), start=1):
        where = f"{file}:{number}"
        missing = [key for key in ("doc_id", "doc", "target", "resps", "filtered_resps", "metrics") if key not in row]
        if missing:
            raise DataError(f"the row lacks {', '.join(missing)}", where=where, expected="a sample of lm-eval")
        scored = task if len(filters) == 1 else f"{task}, {row['filter']}"
        version = str(about.get("versions", {}).get(task, ""))
        item = name if unique else str(row["doc_id"])
        yield from _samples(row, scored, item, str(about.get("model_name") or file.parent.name), version, where)


def _id_of(row: Mapping[str, Any]) -> str:
    doc = row.get("doc")
    given = next((doc[key] for key in _IDS if key in doc), None) if isinstance(doc, dict) else None
    return str(row.get("doc_id") if given is None else given)


def _samples(row: Mapping[str, Any], task: str, item: str, model: str, version: str, where: str) -> Iterator[Sample]:
    doc, arguments = row["doc"], row.get("arguments", {})
    asked = arguments.get("gen_args_0", {}).get("arg_0", "") if isinstance(arguments, dict) else ""
    metric = row["metrics"][0]
    first, filtered = row["resps"][0], row["filtered_resps"]
    texts = first if isinstance(first, list) else [first]
    kept = row.get("scores")
    scores = kept if isinstance(kept, list) and len(kept) == len(texts) else [row.get(metric)]
    for repeat, score in enumerate(scores):
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise DataError(f"{metric} is {score!r}", where=where, expected="a number from 0 to 1")
        extracted = filtered[repeat] if len(filtered) > repeat else None
        yield Sample(
            key=f"lm-eval-{hashlib.sha256(f'{model}/{task}/{item}/{repeat}'.encode()).hexdigest()[:24]}-v{version}",
            model=model,
            task=task,
            task_version=version,
            item=item,
            source=str(doc.get("source", "")) if isinstance(doc, dict) else "",
            subject=_word(doc, "subject", "category", "type"),
            difficulty=_word(doc, "difficulty", "level"),
            repeat=repeat,
            seed=0,
            question=asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False),
            text=texts[repeat] if isinstance(texts[repeat], str) else json.dumps(texts[repeat], ensure_ascii=False),
            reasoning="",
            outcome="correct" if score == 1 else "wrong" if score == 0 else "graded",
            reward=float(score),
            extracted=None if extracted in (None, "[invalid]") else str(extracted),
            expected=str(row["target"]),
            reason="",
            tokens=0,
            finish_reason="stop",
            latency_s=0.0,
            fingerprint="",
        )


def _word(doc: Any, *keys: str) -> str:
    return next((str(doc[key]) for key in keys if isinstance(doc, dict) and key in doc), "")


# ---- write -------------------------------------------------------------------------------------------------------


def write_lm_eval(samples: Sequence[Sample], folder: Path, stamp: str) -> list[Path]:
    """Write `<folder>/<model>/results_<stamp>.json` and one file of samples a task.

    An item's value is the mean over its repeats; `scores` beside it has each of them. Failures are left out.

    Args:
        stamp: time as lm-eval has it in names, `2026-11-22T17-40-55.922546`.

    Returns:
        The files.
    """
    written: list[Path] = []
    for model in dict.fromkeys(sample.model for sample in samples):
        place = folder / re.sub(r"[\"<>:/\\|?*\[\]]+", "__", model)
        own = [sample for sample in samples if sample.model == model and not sample.failed]
        tasks = {task: _rows([s for s in own if s.task == task]) for task in dict.fromkeys(s.task for s in own)}
        versions = {sample.task: sample.task_version for sample in own}
        for task, rows in tasks.items():
            name = re.sub(r"\W+", "_", task)
            path = place / f"samples_{name}_{stamp}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            written.append(path)
        path = place / f"results_{stamp}.json"
        write_json(path, _results(model, tasks, versions))
        written.append(path)
    return written


def _rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    items: dict[str, list[Sample]] = {}
    for sample in samples:
        items.setdefault(sample.item, []).append(sample)
    return [_item_row(number, own) for number, own in enumerate(items.values())]


def _item_row(number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    first, scores = samples[0], [score_of(sample) for sample in samples]
    doc = {key: getattr(first, key) for key in ("item", "question", "source", "subject", "difficulty")}
    digests = {
        f"{name}_hash": hashlib.sha256(text.encode()).hexdigest()
        for name, text in (
            ("doc", json.dumps(doc, ensure_ascii=False)),
            ("prompt", first.question),
            ("target", first.expected),
        )
    }
    return {
        "doc_id": number,
        "doc": {**doc, "answer": first.expected},
        "target": first.expected,
        "arguments": {"gen_args_0": {"arg_0": first.question, "arg_1": {"until": []}}},
        "resps": [[sample.text for sample in samples]],
        "filtered_resps": ["[invalid]" if sample.extracted is None else sample.extracted for sample in samples],
        "filter": "none",
        "metrics": [_METRIC],
        **digests,
        _METRIC: fmean(scores),
        "scores": scores,
    }


def _results(
    model: str, tasks: Mapping[str, Sequence[Mapping[str, Any]]], versions: Mapping[str, str]
) -> dict[str, Any]:
    def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        scores = [row["scores"] for row in rows]
        return {
            "sample_len": len(rows),
            f"{_METRIC},none": fmean(map(fmean, scores)),
            f"{_METRIC}_stderr,none": standard_error(scores),
        }

    return {
        "results": {task: {"name": task, "alias": task, **score(rows)} for task, rows in tasks.items()},
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "dataset_path": task,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "metric_list": [{"metric": _METRIC, "aggregation": "mean", "higher_is_better": True}],
            }
            for task in tasks
        },
        "versions": {task: versions[task] for task in tasks},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {_METRIC: True} for task in tasks},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)} for task, rows in tasks.items()},
        "config": {"model": "tafkir", "model_args": f"pretrained={model}"},
        "model_source": "tafkir",
        "model_name": model,
        "model_name_sanitized": re.sub(r"[\"<>:/\\|?*\[\]]+", "__", model),
    }
