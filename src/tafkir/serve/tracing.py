"""OpenTelemetry traces of requests: how long each choice waited, read its prompt and generated, and of what size.

Attributes have the names of the semantic conventions for generative AI; the three latencies have vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tafkir.errors import BackendUnavailable

if TYPE_CHECKING:
    from tafkir.serve.jobs import Job

__all__ = ["Tracer"]


class Tracer:
    """Sends one span a request, with three inside for each choice, to an OTLP receiver over HTTP.

    Args:
        endpoint: the receiver's address, such as http://localhost:4318/v1/traces.

    Raises:
        BackendUnavailable: OpenTelemetry's SDK is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            fix = 'pip install "tafkir[serve]"'
            raise BackendUnavailable(f"traces need {error.name}", where="--otlp-traces-endpoint", fix=fix) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tafkir"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("tafkir.serve")

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(3000)
        self._provider.shutdown()

    def record(
        self,
        operation: str,
        model: str,
        jobs: Sequence[Job],
        headers: Mapping[str, str],
        request_id: str,
        prompt_tokens: int,
        failure: str | None = None,
    ) -> None:
        """The spans of a request that has ended.

        Args:
            operation: chat or text_completion.
            model: its name.
            jobs: the choices, as the worker timed them.
            headers: of the HTTP request; `traceparent` says which trace the spans belong to.
            request_id: what the client knows the request by.
            prompt_tokens: of all prompts.
            failure: what ended it early.
        """
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        wall = time.time() - time.monotonic()

        def ns(monotonic_s: float) -> int:
            return int((wall + monotonic_s) * 1e9)

        parent = TraceContextTextMapPropagator().extract(dict(headers))
        begin, end = jobs[0].queued_at, max(job.last_at or time.monotonic() for job in jobs)
        span = self._tracer.start_span(
            f"{operation} {model}", context=parent, kind=SpanKind.SERVER, start_time=ns(begin),
            attributes=_attributes(operation, model, jobs, request_id, prompt_tokens, end),
        )  # fmt: skip
        inner = set_span_in_context(span)
        for index, job in enumerate(jobs):
            times = (job.queued_at, job.started_at, job.first_at, job.last_at)
            for name, start_s, end_s in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
                if start_s and end_s:
                    attributes = {"tafkir.choice": index, "tafkir.tokens": _tokens(name, job)}
                    phase = self._tracer.start_span(name, inner, start_time=ns(start_s), attributes=attributes)
                    phase.end(ns(end_s))
        if failure is not None:
            span.set_status(StatusCode.ERROR, failure)
        span.end(ns(end))


def _tokens(phase: str, job: Job) -> int:
    return {"queue": 0, "prefill": len(job.request.prompt_ids), "decode": job.num_tokens}[phase]


def _attributes(
    operation: str, model: str, jobs: Sequence[Job], request_id: str, prompt_tokens: int, end: float
) -> dict[str, Any]:
    first, params = jobs[0], jobs[0].request.params
    found = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tafkir",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request_id,
        "gen_ai.request.choice.count": len(jobs),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stop_sequences": list(params.stop) or None,
        "gen_ai.response.finish_reasons": [job.finish_reason or "error" for job in jobs],
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": sum(job.num_tokens for job in jobs),
        "gen_ai.latency.time_in_queue": first.started_at - first.queued_at if first.started_at else None,
        "gen_ai.latency.time_to_first_token": first.first_at - first.queued_at if first.first_at else None,
        "gen_ai.latency.e2e": end - first.queued_at,
    }
    return {name: value for name, value in found.items() if value is not None}
