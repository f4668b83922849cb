"""What a server in front of people must do: keys, rates, limits, deadlines, a queue that refuses, a clean end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tafkir.errors import RecipeError
from tafkir.serve.access import ApiKeys, RateLimiter
from tafkir.serve.app import build_app
from tafkir.serve.gateway import EarlyRefusal
from tafkir.serve.metrics import ServerMetrics
from tafkir.serve.options import ServerOptions, read_api_keys
from tafkir.serve.worker import EngineWorker, Overloaded
from tests.serve.conftest import Server, start

PROMPT: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


@contextmanager
def serving(checkpoint: Path, *, max_batch: int = 4, max_queue: int = 8, **limits: Any) -> Iterator[Server]:
    options = ServerOptions(**limits)
    app = build_app(checkpoint, max_batch=max_batch, max_queue=max_queue, num_threads=1, options=options)
    server, uvicorn_server, thread = start(app, options)
    try:
        yield server
    finally:
        uvicorn_server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Iterator[Server]:
    with serving(
        checkpoint,
        max_queue=100,
        api_keys=("first-key", "second-key"),
        requests_per_minute=60,
        max_body_bytes=10_000,
        body_timeout_s=0.4,
        request_timeout_s=1.0,
        cors_origins=("https://page.example",),
    ) as server:
        yield server


def post(server: Server, body: Any = PROMPT, key: str = "first-key", **options: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}".strip(), **options.pop("headers", {})}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=20, **options)


def test_keys(guarded: Server) -> None:
    for key in ("", "wrong", "first-keyx", "first-key second-key"):
        refused = post(guarded, key=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        guarded.client().models.list()
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="second-key", max_retries=0)
    assert client.completions.create(model="tiny-random", prompt="a", max_tokens=2).choices
    for path in ("/", "/web/page.js", "/health", "/ready", "/version", "/metrics"):
        assert httpx.get(guarded.url + path).status_code == 200, path


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# staff\nalpha\n\n  beta \n")
    assert read_api_keys(path) == ("alpha", "beta")
    path.write_text("# nobody\n")
    with pytest.raises(RecipeError, match="no API key"):
        read_api_keys(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_api_keys(tmp_path / "none")
    with pytest.raises(RecipeError, match="cannot be sent"):
        ServerOptions(api_keys=("two words",))
    keys = ApiKeys(("alpha", "beta"))
    assert keys.caller("Bearer alpha") != keys.caller("bearer beta") is not None
    assert keys.caller("Basic alpha") is None is keys.caller("alpha")


def test_a_bucket_refills_evenly() -> None:
    now = 0.0
    limiter = RateLimiter(6, clock=lambda: now)
    assert [limiter.take("a") for _ in range(7)] == [0] * 6 + [pytest.approx(10)]
    assert limiter.take("b") == 0, "each caller has a bucket"
    now = 5.0
    assert limiter.take("a") == pytest.approx(5)
    now = 10.0
    assert (limiter.take("a"), limiter.take("a")) == (0, pytest.approx(10))


def test_a_rate_above_the_limit(checkpoint: Path) -> None:
    with serving(checkpoint, requests_per_minute=3) as server:
        answers = [post(server) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert "3 requests a minute" in answers[-1].json()["error"]["message"]
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="tiny-random", prompt="a")
        assert httpx.get(f"{server.url}/v1/models").status_code == 200, "reading costs nothing"


def test_bodies_that_are_too_large(guarded: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b"x" * 5000 for _ in range(4))

    auth = {"authorization": "Bearer first-key"}
    whole = post(guarded, {"prompt": "x" * 20_000})
    chunked = httpx.post(f"{guarded.url}/v1/completions", content=chunks(), headers=auth)
    for answer in (whole, chunked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_large")
        assert "10000" in answer.json()["error"]["message"]
    huge = (
        f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer first-key\r\ncontent-length: {10**12}\r\n"
    )
    assert b" 400 " in exchange(guarded, huge.encode() + b"\r\n{")
    assert post(guarded).status_code == 200


def exchange(server: Server, head: bytes, then: bytes = b"") -> bytes:
    """What comes back until the server closes the connection; `then` is sent once the first answer has begun."""
    place = urlparse(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=8) as connection:
        connection.sendall(head)
        received = b""
        if then:
            received = connection.recv(65536)
            connection.sendall(then)
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_slow_clients_lose_their_connection(guarded: Server) -> None:
    start_s = time.monotonic()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer first-key\r\ncontent-length: 100\r\n\r\n{"
    )
    assert b" 408 " in exchange(guarded, head)
    assert exchange(guarded, b"POST /v1/comp") == b"", "a head that does not end"
    assert exchange(guarded, b"") == b"", "a connection that says nothing"
    first = b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n"
    assert exchange(guarded, first, b"GET /vers").count(b"HTTP/1.1") == 1, "nor one that was quick before"
    assert time.monotonic() - start_s < 4


def test_a_deadline_cancels(guarded: Server) -> None:
    body = {**ENDLESS, "n": 64}
    worker = guarded.app.state.worker
    late = post(guarded, body)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    streamed = post(guarded, {**body, "stream": True})
    assert streamed.status_code == 200
    assert "deadline_exceeded" in streamed.text and "[DONE]" not in streamed.text
    deadline = time.monotonic() + 10
    while worker.num_running or worker.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_request_ids(guarded: Server) -> None:
    assert post(guarded, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert post(guarded, key="bad", headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"
    own = {post(guarded, headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)}
    assert len(own) == 3 and all(re.fullmatch("[0-9a-f]{32}", each) for each in own)


def test_other_origins_are_named_or_refused(guarded: Server, server: Server) -> None:
    def allowed(url: str, origin: str) -> str | None:
        return httpx.get(f"{url}/version", headers={"origin": origin}).headers.get("access-control-allow-origin")

    assert allowed(guarded.url, "https://page.example") == "https://page.example"
    assert allowed(guarded.url, "https://other.example") is None
    assert allowed(server.url, "https://page.example") is None, "off unless asked for"


def test_a_full_queue_refuses_at_once_and_keeps_its_word(checkpoint: Path) -> None:
    with serving(checkpoint, max_batch=1, max_queue=1) as server:
        results: list[httpx.Response] = []
        running = [
            threading.Thread(target=lambda: results.append(post(server, {**ENDLESS, "max_tokens": 240})))
            for _ in range(2)
        ]
        for thread in running:
            thread.start()
        worker = server.app.state.worker
        deadline = time.monotonic() + 10
        while worker.num_running + worker.num_waiting < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        before = worker.metrics.responses.values.get("503", 0)
        headers = {"x-request-id": "mine"}
        long = json.dumps({**PROMPT, "prompt": "a" * 300_000}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(long)}\r\nconnection: close\r\n\r\n"
        with httpx.Client() as http:  # one connection
            answers = [http.get(f"{server.url}/version")]
            answers += [http.post(f"{server.url}/v1/completions", json=PROMPT, headers=headers) for _ in range(2)]
            answers += [http.post(f"{server.url}/v1/completions", content=long), http.get(f"{server.url}/version")]
            in_chunks = http.post(f"{server.url}/v1/completions", content=iter([b"{", b"}"]))
        closed = exchange(server, head.encode() + long[:9], long[9:])
        if len(results) == 0:  # both still run: the answers are about a full queue
            assert [answer.status_code for answer in answers] == [200, 503, 503, 503, 200]
            assert closed.startswith(b"HTTP/1.1 503 ") and b"connection: close" in closed
            for refused in (*answers[1:4], in_chunks):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
                assert int(refused.headers["retry-after"]) >= 1 and refused.headers["x-request-id"]
            assert answers[1].headers["x-request-id"] == "mine"
            assert worker.metrics.responses.values["503"] - before == 5
        for thread in running:
            thread.join()
        assert [each.status_code for each in results] == [200, 200]
        assert post(server).status_code == 200


class Full:
    """A worker that has no room."""

    full = True
    metrics = ServerMetrics()

    def check_open(self) -> None:
        raise Overloaded("9 requests wait")


def test_only_a_plain_and_whole_head_is_refused_early() -> None:
    """What h11 may end elsewhere than this does is h11's, or a body's end would be read as a request."""
    refusal = EarlyRefusal(ServerOptions(), cast(EngineWorker, Full()))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 12\r\n"
    found = refusal.answer(head + b"\r\n{}")
    assert found is not None and found[0].startswith(b"HTTP/1.1 503 ") and found[1:] == (10, False)
    whole = head + b"x-a: b\r\n\r\n"
    assert all(refusal.answer(whole[:cut]) is None for cut in range(len(whole)))
    for odd in (
        b"transfer-encoding: chunked", b"content-length: 4", b"origin: https://a", b"x-a: b\nx-c: d", b" folded: on",
        b"no colon", b"content-length : 3", b"expect: 100-continue",
    ):  # fmt: skip
        assert refusal.answer(head + odd + b"\r\n\r\n") is None, odd
    assert refusal.answer(head + b"\r\n" + bytes(13)) is None, "the next request has come with this one"


def test_the_cache_is_told_of(server: Server) -> None:
    """A second prompt of the same beginning is found; a request's priority is a field of its own."""
    prompt = "What is 48 plus 24? Ali has 3 apples and buys 5 more. How many? The answer is 72. What is 24 plus 48?"
    for _ in range(2):
        body = {"prompt": prompt, "max_tokens": 2, "priority": -1}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    metrics = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        metrics |= {sample.name: sample.value for sample in family.samples}
    assert metrics["vllm:prefix_cache_queries_total"] > metrics["vllm:prefix_cache_hits_total"] >= 16
    assert metrics["vllm:num_preemptions_total"] == metrics["vllm:kv_cache_usage_perc"] == 0


def test_metrics_are_prometheus_text(server: Server) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels["model_name"] == "tiny-random" for sample in samples)
        return {
            sample.name + str(sorted((k, v) for k, v in sample.labels.items() if k != "model_name")): sample.value
            for sample in samples
        }

    def grown(name: str, labels: str = "[]") -> float:
        return after[name + labels] - before[name + labels]

    before = read()
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "What is", "max_tokens": 7, "ignore_eos": True, "n": 2})
    after = read()
    assert grown("vllm:generation_tokens_total") == 14
    assert grown("vllm:prompt_tokens_total") > 0
    assert grown("tafkir:requests_total") == grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:inter_token_latency_seconds_count") == 12
    assert grown("vllm:request_success_total", "[('finished_reason', 'length')]") == 2
    assert grown("tafkir:http_responses_total", "[('code', '200')]") >= 1
    assert after["vllm:num_requests_running[]"] == after["vllm:num_requests_waiting[]"] == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        buckets = [value for key, value in after.items() if key.startswith(f"vllm:{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == after[f"vllm:{name}_count[]"]


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from tafkir.serve.run import serve
serve(sys.argv[1], port=0, num_threads=1)
"""


def test_sigterm_finishes_what_runs_and_an_idle_server_ends_at_once(checkpoint: Path, cli_env: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(checkpoint)], env=cli_env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "chat at" in line)
        url = re.findall(r"http://[\d.:]+", line)[0]
        body = {**ENDLESS, "stream": True, "n": 4}
        while True:
            try:
                assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.15)
            with pytest.raises(httpx.ConnectError):
                httpx.post(f"{url}/v1/completions", json=PROMPT)
            rest = list(lines)
        assert rest[-2 if rest[-1] == "" else -1] == "data: [DONE]", "what ran came to its end"
        began = time.monotonic()
        assert process.wait(timeout=15) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 2
