"""Whatever comes over the wire, the answer is a success or a clear refusal, and the server lives."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Server
from tests.serve.test_api import MESSAGES, MODEL

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize", "/v1/embeddings")
FIELDS = (
    "model prompt messages input tokens n stream stream_options temperature top_p top_k min_p seed stop stop_token_ids "
    "logprobs top_logprobs echo logit_bias presence_penalty frequency_penalty repetition_penalty min_tokens ignore_eos "
    "prompt_logprobs response_format structured_outputs tools tool_choice enable_thinking max_thinking_tokens text "
    "instructions max_output_tokens return_token_ids best_of suffix role content user nonsense"
).split()
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 5), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "\ud800", "\x00", "<|im_end|>", "json_object", "json_schema", "required", "user", MODEL]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=8), st.sampled_from(["type", "json", "regex", "name", *FIELDS[:4]])), inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip
VALID: dict[str, Any] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/v1/embeddings": {"input": "a"},
}


def check(response: httpx.Response) -> None:
    assert response.status_code == 200 or 400 <= response.status_code < 500, (response.status_code, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def http(server: Server) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http
        assert http.get("/health").status_code == 200, "the server lives"


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_valid_requests_with_anything_in_some_fields(http: httpx.Client, path: str, changes: dict[str, Any]) -> None:
    content = json.dumps({**VALID[path], **changes}).encode("utf-8")
    check(http.post(path, content=content, headers={"content-type": "application/json"}))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(PATHS), body=st.one_of(st.binary(max_size=40), VALUES.map(lambda v: json.dumps(v).encode()))
)
def test_any_body(http: httpx.Client, path: str, body: bytes) -> None:
    check(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": ' * 50_000,
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "a", "max_tokens": 1e400}',
        b'{"prompt": "' + b"a " * 1_000_000 + b'"}',
        b'{"prompt": [' + b"5," * 1_000_000 + b"5]}",
        b'{"prompt": "\\ud800"}',
    ],
    ids=lambda body: body[:16].decode("latin-1"),
)
def test_bodies_that_hurt_parsers(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    if b"ud800" not in body:  # a lone surrogate is read as U+FFFD
        assert response.status_code == 400, response.text
    check(response)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"\r\n" * 9,
    ],
)
def test_what_is_no_http(server: Server, http: httpx.Client, raw: bytes) -> None:
    place = urlparse(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
    assert answer == b"" or b" 400 " in answer
    assert http.get("/health").status_code == 200
