"""A file of requests in OpenAI's batch format through the application in this process; a killed run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import httpx

from tafkir.errors import DataError, RequestError
from tafkir.runlog.atomic import guard_disk
from tafkir.runlog.progress import Progress

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["BatchLine", "BatchSummary", "answer_batch", "finished_ids", "read_batch"]

_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch file."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True)
class BatchSummary:
    """What a run did; `resumed` lines were answered by an earlier one."""

    total: int
    resumed: int
    succeeded: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_batch(path: Path) -> list[BatchLine]:
    """The requests of a file, all checked before any is run.

    Raises:
        DataError: the file is missing or empty, a line is no request of the format, or two share a custom_id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"the batch cannot be read ({error})", where=str(path)) from None
    found: dict[str, BatchLine] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        line = _parse(text, f"{path}:{number}")
        if line.custom_id in found:
            raise DataError(f"custom_id {line.custom_id!r} comes twice", where=f"{path}:{number}", expected="fresh ids")
        found[line.custom_id] = line
    if not found:
        raise DataError("the batch is empty", where=str(path), expected="one request a line")
    return list(found.values())


def _parse(text: str, where: str) -> BatchLine:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line is not JSON ({error})", where=where) from None
    expected = '{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
    if not isinstance(line, dict) or not isinstance(line.get("body"), dict):
        raise DataError("the line is no request", where=where, expected=expected)
    custom_id, url = line.get("custom_id"), line.get("url")
    if not isinstance(custom_id, str) or not custom_id or line.get("method", "POST") != "POST":
        raise DataError("the line has no custom_id, or another method than POST", where=where, expected=expected)
    if url not in _URLS:
        raise DataError(f"url {url!r}", where=where, expected=" or ".join(_URLS))
    if line["body"].get("stream"):
        raise DataError("a batch has no streams", where=where, expected="stream left out")
    return BatchLine(custom_id, url, line["body"])


def finished_ids(path: Path, known: Sequence[str]) -> set[str]:
    """Ids that an output file holds answers to; a last line that a kill cut short is taken off the file.

    Raises:
        DataError: the file holds something else, or answers to another batch.
    """
    if not path.exists():
        return set()
    with guard_disk(path), path.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        file.truncate(whole)
    done: set[str] = set()
    wanted = set(known)
    for number, text in enumerate(data[:whole].splitlines(), 1):
        try:
            id = json.loads(text)["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError("the line is no answer of a batch", where=f"{path}:{number}", fix="move it away") from None
        if not isinstance(id, str) or id not in wanted:
            fix = "choose another --output"
            raise DataError(f"custom_id {id!r} is not in the batch", where=f"{path}:{number}", fix=fix)
        done.add(id)
    return done


def answer_batch(app: FastAPI, lines: Sequence[BatchLine], output: Path, *, concurrency: int) -> BatchSummary:
    """Answer what `output` lacks, `concurrency` requests at a time, each appended when it is whole.

    A request that is refused is an answer with its status and error, as OpenAI's batches have it.

    Args:
        app: of `build_app`, with a queue that holds `concurrency` requests.

    Raises:
        DataError: `output` holds something else.
        RequestError: the engine failed.
        RunDirError: it cannot be written.
    """
    done = finished_ids(output, [line.custom_id for line in lines])
    summary = BatchSummary(total=len(lines), resumed=len(done))
    todo = [line for line in lines if line.custom_id not in done]
    with (
        guard_disk(output),
        output.open("ab") as file,
        Progress("generate", total=len(lines), start=len(done)) as progress,
    ):
        asyncio.run(_answer_all(app, todo, file, concurrency, summary, progress))
        os.fsync(file.fileno())
    return summary


async def _answer_all(
    app: FastAPI,
    todo: Sequence[BatchLine],
    file: IO[bytes],
    concurrency: int,
    summary: BatchSummary,
    progress: Progress,
) -> None:
    queue = iter(todo)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    broken: list[str] = []

    async def work(http: httpx.AsyncClient) -> None:
        for line in queue:
            answer = await http.post(line.url, json=line.body)
            body = answer.json()
            if answer.status_code >= 500:
                # No answer to the request: it is asked again by the next run.
                broken.append(body["error"]["message"])
            if broken:
                return
            record = _record(line, answer.status_code, answer.headers.get("x-request-id", ""), body)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            tokens = _count(summary, answer.status_code, body)
            progress.update(summary.resumed + summary.succeeded + summary.failed, tokens=tokens, failed=summary.failed)

    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
        await asyncio.gather(*(work(http) for _ in range(min(concurrency, len(todo)))))
    if broken:
        raise RequestError(
            f"the engine failed: {broken[0]}", where="generate", fix="run the same command again: it goes on"
        )


def _record(line: BatchLine, status: int, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    id = f"batch_req_{uuid.uuid4().hex}"
    return {"id": id, "custom_id": line.custom_id, "response": response, "error": body.get("error")}


def _count(summary: BatchSummary, status: int, body: dict[str, Any]) -> int:
    """Note an answer; tokens that it cost."""
    if status != 200:
        summary.failed += 1
        return 0
    usage = body.get("usage") or {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    generated = int(usage.get("completion_tokens", usage.get("output_tokens", 0)))
    summary.succeeded += 1
    summary.prompt_tokens += prompt
    summary.completion_tokens += generated
    return generated
