"""Runs a task through a completer: one greedy and k sampled answers a problem, graded, on disk as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tafkir.checkpoint.fingerprint import checkpoint_fingerprint
from tafkir.data.chat import encode_chat
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RequestError
from tafkir.eval.records import GREEDY, EvalRecord, append_records, load_records, write_records
from tafkir.protocols import Completer, Task
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Completion, Example, Request, SamplingParams
from tafkir.runlog.progress import Progress

__all__ = ["checkpoint_fingerprint", "evaluate"]

BATCH_REQUESTS = 1024


@dataclass(frozen=True, slots=True)
class _Planned:
    """One answer that is wanted."""

    example: Example
    repeat: int
    request: Request


def evaluate(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    path: Path,
    fingerprint: str = "",
    label: str = "eval",
    batch_requests: int = BATCH_REQUESTS,
) -> list[EvalRecord]:
    """Answer every example once greedily and `samples` times at `temperature`, grade, and keep the answers in `path`.

    Answers that `path` already holds for the same inputs are taken from there. Work goes in batches, each on disk
    when it is done; a batch that a kill cut short is redone whole, so that the file of a resumed evaluation is that
    of an unbroken one. Each sampled answer has a seed of its own, a function of (`seed`, example id, repeat).

    Args:
        path: JSON-lines file, in the order of the examples, greedy before sampled.
        fingerprint: what identifies the weights, such as a hash of the checkpoint's manifest.
        label: name in the progress line.
        batch_requests: answers per batch.

    Raises:
        DataError: there is no example, or two share an id.
    """
    if len({example.id for example in examples}) != len(examples):
        raise DataError("two examples have the same id", where=task.name, expected="distinct ids")
    if not examples:
        raise DataError("there is no example to evaluate", where=task.name, expected="at least one held-out problem")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, stop_token_ids=(tokenizer.turn_end_id,))
    plan = [p for example in examples for p in _plan(example, tokenizer, task, params, samples, seed, fingerprint)]
    batches = [plan[i : i + batch_requests] for i in range(0, len(plan), batch_requests)]
    records = _resume(path, batches)
    with Progress(label, total=len(plan), start=len(records)) as progress:
        for batch in batches[_whole_batches(records, batches) :]:
            answers = _answer(completer, tokenizer, task, batch, progress, len(records))
            append_records(path, answers)
            records += answers
    return records


def _plan(
    example: Example,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    samples: int,
    seed: int,
    fingerprint: str,
) -> Iterator[_Planned]:
    prompt_ids = tuple(encode_chat(tokenizer, task.prompt(example)))
    for repeat in range(samples + 1):
        if repeat == GREEDY:
            own = replace(params, temperature=0.0, seed=0)
        else:
            own = replace(params, seed=derive_seed(seed, "eval", example.id, repeat))
        key = _key(task.name, example, repeat, prompt_ids, own, fingerprint)
        yield _Planned(example, repeat, Request(key, prompt_ids, own))


def _key(
    task: str, example: Example, repeat: int, prompt_ids: Sequence[int], params: SamplingParams, fingerprint: str
) -> str:
    """Hash of everything that the answer and its verdict depend on; doubles as the request's id."""
    parts = [
        task,
        example.id,
        example.answer,
        repeat,
        list(prompt_ids),
        params.temperature,
        params.max_tokens,
        params.seed,
        fingerprint,
    ]
    return hashlib.blake2b(json.dumps(parts).encode("utf-8"), digest_size=12).hexdigest()


def _resume(path: Path, batches: Sequence[Sequence[_Planned]]) -> list[EvalRecord]:
    """The answers of the leading batches that the file holds in full; the file is cut to them."""
    if not path.exists():
        return []
    present = {record.key: record for record in load_records(path)}
    kept: list[EvalRecord] = []
    for batch in batches:
        if any(planned.request.id not in present for planned in batch):
            break
        kept += [present[planned.request.id] for planned in batch]
    write_records(path, kept)
    return kept


def _whole_batches(records: Sequence[EvalRecord], batches: Sequence[Sequence[_Planned]]) -> int:
    done = 0
    for number, batch in enumerate(batches):
        if done == len(records):
            return number
        done += len(batch)
    return len(batches)


def _answer(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    batch: Sequence[_Planned],
    progress: Progress,
    done: int,
) -> list[EvalRecord]:
    planned = {one.request.id: one for one in batch}
    answers: dict[str, EvalRecord] = {}
    correct = 0
    for completion in completer.complete([one.request for one in batch]):
        record = _grade(tokenizer, task, planned[completion.request_id], completion)
        answers[record.key] = record
        correct += record.correct
        progress.update(done + len(answers), tokens=record.tokens, accuracy=correct / len(answers))
    lost = [key for key in planned if key not in answers]
    if lost:
        raise RequestError(
            f"{len(lost)} of {len(batch)} requests came back without an answer",
            where=planned[lost[0]].example.id,
            expected="one completion per request",
            fix="run the same command again: the answers so far are kept",
        )
    return [answers[one.request.id] for one in batch]


def _grade(tokenizer: Tokenizer, task: Task, planned: _Planned, completion: Completion) -> EvalRecord:
    text = tokenizer.decode(list(completion.token_ids))
    verdict = task.grade(planned.example, text, finished=completion.finish_reason == "stop")
    return EvalRecord(
        key=completion.request_id,
        example_id=planned.example.id,
        source=planned.example.source,
        repeat=planned.repeat,
        question=planned.example.question,
        text=text,
        outcome=verdict.outcome,
        reward=verdict.reward,
        extracted=verdict.extracted,
        expected=verdict.expected,
        reason=verdict.reason,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
    )
