"""Traces as a receiver gets them over OTLP: whose they are, what they say, and how their times nest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tafkir.serve.app import build_app
from tafkir.serve.options import ServerOptions
from tests.serve.conftest import start

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") is None:
                got.append(collector.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        server.shutdown()


def test_traces(checkpoint: Path, receiver: tuple[str, list[Any]]) -> None:
    url, got = receiver
    options = ServerOptions(otlp_traces_endpoint=url, request_timeout_s=0.3)
    app = build_app(checkpoint, max_batch=4, max_queue=80, num_threads=1, options=options)
    server, uvicorn_server, thread = start(app, options)
    body = {"prompt": "What is 48?", "max_tokens": 3, "ignore_eos": True, "temperature": 0.5, "n": 2, "seed": 7}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)
    endless = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "n": 64}
    late = httpx.post(f"{server.url}/v1/chat/completions", json=endless, timeout=30)
    uvicorn_server.should_exit = True
    thread.join(timeout=30)
    spans = [span for each in got for part in each.resource_spans for scope in part.scope_spans for span in scope.spans]
    named = [span for span in spans if span.trace_id.hex() == TRACE]
    (root,) = [span for span in named if span.parent_span_id.hex() == PARENT]
    assert root.name == "text_completion tiny-random" and root.kind == 2  # SERVER
    said = {each.key: each.value for each in root.attributes}
    assert said["gen_ai.operation.name"].string_value == "text_completion"
    assert said["gen_ai.response.id"].string_value == "mine"
    assert said["gen_ai.request.temperature"].double_value == 0.5
    assert said["gen_ai.request.choice.count"].int_value == 2 and said["gen_ai.request.seed"].int_value == 7
    usage = answer.json()["usage"]
    assert said["gen_ai.usage.input_tokens"].int_value == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"].int_value == usage["completion_tokens"] == 6
    assert [each.string_value for each in said["gen_ai.response.finish_reasons"].array_value.values] == ["length"] * 2
    for choice in range(2):
        inner = [
            span for span in named
            if any(each.key == "tafkir.choice" and each.value.int_value == choice for each in span.attributes)
        ]  # fmt: skip
        assert [span.name for span in inner] == ["queue", "prefill", "decode"]
        assert all(span.parent_span_id == root.span_id for span in inner)
        times = [time for span in inner for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
        assert times == sorted(times) and times[1] == times[2] and times[3] == times[4]
        assert root.start_time_unix_nano <= times[0] and times[-1] <= root.end_time_unix_nano
    assert late.status_code == 504
    (failed,) = [span for span in spans if span.name == "chat tiny-random"]
    assert failed.status.code == 2 and "longer than" in failed.status.message  # ERROR
    assert failed.trace_id.hex() != TRACE
