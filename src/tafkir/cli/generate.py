"""`tafkir generate CHECKPOINT --input batch.jsonl --output out.jsonl`: a file of requests, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tafkir.cli.serve import CacheNumbers, CheckpointName, Speculate

__all__ = ["generate"]


def generate(
    checkpoint: CheckpointName,
    input: Annotated[Path, typer.Option("--input", "-i", help="Requests, one JSON object a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers as they come; what is there is kept.")],
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences that run at once.")] = 64,
    max_context: Annotated[int | None, typer.Option(min=2, help="Most tokens of a prompt and its answer.")] = None,
    max_cache_mb: Annotated[int | None, typer.Option(min=1, help="Limit of the key-value cache, in MiB.")] = None,
    kv_cache: Annotated[CacheNumbers, typer.Option("--kv-cache", help="The cache's numbers.")] = CacheNumbers.AUTO,
    speculate: Speculate = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; torch's choice if left out.")] = None,
    model_name: Annotated[str | None, typer.Option(help="What the requests call the model.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print a summary for programs.")] = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    A line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}. Answers
    come in the order in which they finish. After a kill, the same command goes on where it was.
    """
    import json
    from dataclasses import asdict

    from tafkir.cli.completer import checkpoint_of
    from tafkir.serve.offline import BatchSummary, answer_batch, finished_ids, read_batch

    lines = read_batch(input)
    # Checked before the model is loaded; a batch that is done needs none.
    if len(finished_ids(output, [line.custom_id for line in lines])) == len(lines):
        summary = BatchSummary(total=len(lines), resumed=len(lines))
    else:
        from tafkir.serve.app import build_app
        from tafkir.serve.options import ServerOptions

        app = build_app(
            checkpoint_of(checkpoint),
            model_name=model_name,
            max_batch=max_batch,
            max_context=max_context,
            max_cache_bytes=max_cache_mb << 20 if max_cache_mb else None,
            kv_cache=kv_cache.value,
            speculate=speculate,
            max_queue=1 << 20,
            num_threads=threads,
            options=ServerOptions(max_body_bytes=1 << 30, body_timeout_s=600),
        )
        try:
            summary = answer_batch(app, lines, output, concurrency=2 * max_batch)
        finally:
            app.state.worker.stop()
    if json_output:
        print(json.dumps(asdict(summary)))
    else:
        print(
            f"{output}: {summary.total} requests, {summary.resumed} answered before, {summary.succeeded} now, "
            f"{summary.failed} refused; {summary.completion_tokens:,} tokens generated"
        )
