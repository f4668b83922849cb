"""Results and samples in the Every Eval Ever schema 0.3.0 (arXiv 2606.14516): read, and written."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tafkir
from tafkir.errors import DataError
from tafkir.eval.samples import Sample
from tafkir.eval.scores import estimate_of, item_scores, score_of
from tafkir.eval.statistics import standard_error
from tafkir.intervals import CONFIDENCE
from tafkir.runlog.atomic import write_json, write_text
from tafkir.runlog.metrics import read_jsonl

__all__ = ["SCHEMA_VERSION", "load_every_eval_ever", "write_every_eval_ever"]

SCHEMA_VERSION = "0.3.0"
_NEEDED = ("model_id", "evaluation_name", "sample_id", "input", "evaluation")
# What only Tafkir knows of a sample; all values of `metadata` are strings.
_KEPT = (
    *("key", "task_version", "source", "subject", "difficulty", "repeat", "seed"),
    *("outcome", "reason", "finish_reason", "fingerprint"),
)


def load_every_eval_ever(files: Sequence[Path]) -> list[Sample]:
    """Read files named `<uuid>_samples.jsonl`; a sample id that comes again is the next repeat of its item.

    Raises:
        RunDirError: a line is not JSON.
        DataError: a row lacks a field.
    """
    return [sample for file in files for sample in _read(file)]


def _read(file: Path) -> Iterator[Sample]:
    counts: dict[tuple[str, str, str], int] = {}
    for number, row in enumerate(read_jsonl(file), start=1):
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise DataError(
                f"the row lacks {', '.join(missing)}", where=f"{file}:{number}", expected="a sample of Every Eval Ever"
            )
        identity = (row["model_id"], row["evaluation_name"], row["sample_id"])
        repeat = counts[identity] = counts.get(identity, -1) + 1
        yield _sample(row, identity, repeat)


def _sample(row: dict[str, Any], identity: tuple[str, str, str], repeat: int) -> Sample:
    model, task, item = identity
    known, output, score = row.get("metadata") or {}, row.get("output") or {}, float(row["evaluation"]["score"])
    texts = output.get("raw") or [m.get("content") or "" for m in row.get("messages") or []][-1:] or [""]
    answers = [found["extracted_value"] for found in row.get("answer_attribution") or []]
    right = bool(row["evaluation"]["is_correct"])
    outcome = "error" if row.get("error") else "correct" if right else "wrong" if score == 0 else "graded"
    digest = hashlib.sha256("/".join((*identity, str(repeat))).encode()).hexdigest()[:24]
    return Sample(
        key=known.get("key", f"every-eval-ever-{digest}-v"),
        model=model,
        task=task,
        task_version=known.get("task_version", ""),
        item=item,
        source=known.get("source", ""),
        subject=known.get("subject", ""),
        difficulty=known.get("difficulty", ""),
        repeat=int(known.get("repeat", repeat)),
        seed=int(known.get("seed", 0)),
        question=row["input"]["raw"],
        text=texts[0],
        reasoning="\n".join(output.get("reasoning_trace") or []),
        outcome=known.get("outcome", outcome),
        reward=score,
        extracted=answers[-1] if answers else None,
        expected=(row["input"].get("reference") or [""])[0],
        reason=known.get("reason", row.get("error") or ""),
        tokens=int((row.get("token_usage") or {}).get("output_tokens", known.get("output_tokens", 0))),
        finish_reason=known.get("finish_reason", "stop"),
        latency_s=float((row.get("performance") or {}).get("latency_ms") or 0) / 1e3,
        fingerprint=known.get("fingerprint", ""),
    )


# ---- write -------------------------------------------------------------------------------------------------------


def write_every_eval_ever(samples: Sequence[Sample], folder: Path, *, organization: str, now: float) -> list[Path]:
    """Write `data/tafkir/<developer>/<model>/<uuid>.json` and `<uuid>_samples.jsonl` below a folder, for each model.

    Args:
        organization: whose evaluation it is; the schema asks for it.
        now: seconds of the Unix clock, which the schema wants in ids.

    Returns:
        The files.
    """
    written: list[Path] = []
    for model in dict.fromkeys(sample.model for sample in samples):
        own = [sample for sample in samples if sample.model == model]
        developer, _, name = model.rpartition("/")
        model_id = f"{_slug(developer or organization)}/{_slug(name)}"
        place = folder / "data" / "tafkir" / model_id
        run = f"tafkir/{model_id.replace('/', '_')}/{now:.0f}"
        file = str(uuid.uuid4())
        rows = [_row(sample, model_id, run) for sample in own]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        details, whole = place / f"{file}_samples.jsonl", place / f"{file}.json"
        write_text(details, text)
        write_json(whole, _log(own, model, model_id, run, organization, now) | {
            "detailed_evaluation_results": {
                "format": "jsonl",
                "file_path": details.relative_to(folder).as_posix(),
                "hash_algorithm": "sha256",
                "checksum": hashlib.sha256(text.encode()).hexdigest(),
                "total_rows": len(rows),
            }
        })  # fmt: skip
        written += [whole, details]
    return written


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "unknown"


def _row(sample: Sample, model_id: str, run: str) -> dict[str, Any]:
    asked = {"raw": sample.question, "reference": [sample.expected] if sample.expected else []}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    answer = {"turn_idx": 0, "source": "output.raw", "extraction_method": sample.task, "is_terminal": True}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": run,
        "model_id": model_id,
        "evaluation_name": sample.task,
        "evaluation_result_id": f"{run}#{sample.task}",
        "sample_id": sample.item,
        "sample_hash": digest,
        "interaction_type": "single_turn",
        "input": asked,
        "output": {"raw": [sample.text], "reasoning_trace": [sample.reasoning] if sample.reasoning else None},
        "messages": None,
        "answer_attribution": [] if sample.extracted is None else [{**answer, "extracted_value": sample.extracted}],
        "evaluation": {"score": score_of(sample), "is_correct": sample.correct},
        "performance": {"latency_ms": 1e3 * sample.latency_s},
        "error": (sample.reason or sample.outcome) if sample.failed else None,
        "metadata": {
            **{key: str(getattr(sample, key)) for key in _KEPT},
            "output_tokens": str(sample.tokens),
        },
    }


def _log(
    samples: Sequence[Sample], model: str, model_id: str, run: str, organization: str, now: float
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": run,
        "retrieved_timestamp": f"{now:.0f}",
        "source_metadata": {
            "source_name": "tafkir eval",
            "source_type": "evaluation_run",
            "source_organization_name": organization,
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "tafkir", "version": tafkir.__version__},
        "model_info": {
            "name": model,
            "id": model_id,
            "additional_details": {
                "deployment_type": "unknown",
                "model_availability": "unknown",
                "fingerprint": samples[0].fingerprint,
            },
        },
        "evaluation_results": [_result(task, samples, run) for task in dict.fromkeys(s.task for s in samples)],
    }


def _result(task: str, samples: Sequence[Sample], run: str) -> dict[str, Any]:
    own = [sample for sample in samples if sample.task == task]
    scores = item_scores(own)
    if not scores:
        raise DataError("every answer failed", where=task, fix="evaluate again before exporting")
    found = estimate_of(scores)
    return {
        "evaluation_result_id": f"{run}#{task}",
        "evaluation_name": task,
        "source_data": {
            "dataset_name": task,
            "source_type": "other",
            "additional_details": {"task_version": own[0].task_version},
        },
        "metric_config": {
            "evaluation_description": f"Mean over items of the mean over samples of {task}",
            "metric_id": "accuracy",
            "metric_name": f"avg@{max(map(len, scores.values()))}",
            "metric_kind": "accuracy",
            "metric_unit": "proportion",
            "lower_is_better": False,
            "score_type": "continuous",
            "min_score": 0.0,
            "max_score": 1.0,
        },
        "score_details": {
            "score": found.value,
            "details": {"failed": str(sum(sample.failed for sample in own))},
            "uncertainty": {
                "standard_error": {
                    "value": standard_error(list(scores.values())),
                    "method": "analytic, clustered by item",
                },
                "confidence_interval": {
                    "lower": found.low,
                    "upper": found.high,
                    "confidence_level": CONFIDENCE,
                    "method": found.method,
                },
                "num_samples": len(scores),
            },
        },
    }
