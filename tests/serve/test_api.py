"""The official openai client, and a bare HTTP client, against a live server."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tafkir.checkpoint.fingerprint import checkpoint_fingerprint
from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.chat import encode_prompt
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.records import Request, SamplingParams
from tests.serve.conftest import Server

MODEL = "tiny-random"
MESSAGES: list[Any] = [{"role": "user", "content": "What is 48 plus 24?"}]


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 10
    while server.app.state.worker.num_running or server.app.state.worker.num_waiting:
        assert time.monotonic() < deadline, "requests are still running"
        time.sleep(0.01)


def test_models_health_and_page(server: Server, client: openai.OpenAI, checkpoint: Path) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "tafkir")
    assert model.to_dict()["fingerprint"] == checkpoint_fingerprint(checkpoint)
    assert client.models.retrieve(MODEL).id == MODEL
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace("http://www.w3.org", ""), "nothing is loaded from elsewhere"
    assert "https://" not in page.text


def test_chat_equals_the_engine(client: openai.OpenAI, checkpoint: Path) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0.8, seed=5)
    tokenizer = Tokenizer.load(checkpoint)
    engine = Engine(
        load_checkpoint(checkpoint).decoder, eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id), max_batch=8
    )
    ids = tuple(encode_prompt(tokenizer, "What is 48 plus 24?"))
    (done,) = engine.complete([Request("a", ids, SamplingParams(temperature=0.8, max_tokens=24, seed=5))])
    text = tokenizer.decode(done.token_ids[: -1 if done.finish_reason == "stop" else None])
    (choice,) = answer.choices
    assert (choice.message.content or "").rstrip("\ufffd") == text.rstrip("\ufffd")
    assert (choice.message.role, choice.finish_reason) == ("assistant", done.finish_reason)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(done.token_ids))
    assert answer.usage.total_tokens == len(ids) + len(done.token_ids)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL


def test_chat_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "seed": 11, "n": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts, reasons = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index].append(choice.finish_reason)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == [choice.finish_reason], "exactly one"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_seeds(client: openai.OpenAI) -> None:
    def texts(seed: int | None, n: int = 1) -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, seed=seed, n=n)
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert texts(None) != texts(None)
    three = texts(1, n=3)
    assert three[:1] == texts(1)
    assert len(set(three)) == 3


def test_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    by_text = client.completions.create(prompt="What is 3", **options)
    by_ids = client.completions.create(prompt=Tokenizer.load(checkpoint).encode("What is 3"), **options)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.object == "text_completion"
    assert by_text.usage is not None
    assert by_text.usage.completion_tokens <= 12
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(prompt="What is 3", stream=True, **options)
    )
    assert streamed == by_text.choices[0].text
    several = client.completions.create(prompt=["What is 3", "كم يساوي"], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == by_text.choices[0].text
    assert several.choices[2].text != by_text.choices[0].text


def test_chat_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "seed": 4, "logprobs": True}
    answer = client.chat.completions.create(**options, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    raw = b"".join(bytes(token.bytes or []) for token in content)
    assert raw.decode(errors="ignore") == (choice.message.content or "").replace("\ufffd", "")
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        listed = {tuple(top.bytes or []): top.logprob for top in token.top_logprobs}
        assert listed.get(tuple(token.bytes or []), token.logprob) == pytest.approx(token.logprob, abs=1e-5)
        assert sum(map(math.exp, listed.values())) <= 1.0001
    stream = client.chat.completions.create(**options, top_logprobs=3, stream=True)
    streamed = [
        entry.logprob
        for chunk in stream
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == pytest.approx([token.logprob for token in content], abs=1e-5)
    assert client.chat.completions.create(**{**options, "logprobs": False}).choices[0].logprobs is None


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="What is", max_tokens=8, seed=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_stop_strings(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "What is 3", "max_tokens": 60, "seed": 8}
    free = client.completions.create(**options).choices[0]
    stop = free.text[10:13]
    cut = client.completions.create(**options, stop=[stop, "not there"]).choices[0]
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    streamed = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_message_forms(client: openai.OpenAI) -> None:
    def answer(*messages: Any) -> str | None:
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        return client.chat.completions.create(messages=list(messages), **options).choices[0].message.content

    parts = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "48 plus 24?"}]}
    assert answer(parts) == answer(*MESSAGES)
    system, developer = ({"role": role, "content": "Think."} for role in ("system", "developer"))
    assert answer(system, *MESSAGES) == answer(developer, *MESSAGES)


def test_neutral_fields_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={},
        response_format={"type": "text"}, tools=[], user="someone", metadata={"a": "b"}, store=False,
        extra_body={"top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    )  # fmt: skip
    client.completions.create(model=MODEL, prompt="a", max_tokens=1, best_of=1, echo=False, suffix=None)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"five": 10}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temperatur": 1}, "temperatur"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": "a"}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": None}, "messages"),
    ],
)
def test_bad_chat_requests_are_refused_by_name(server: Server, change: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **change}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").startswith(param), error
    assert param.partition(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"echo": True, "stream": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [100000]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [5] * 256}, "prompt"),
    ],
)
def test_bad_completion_requests(server: Server, change: dict[str, Any], param: str | None) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "a", **change})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["param"] or "").startswith(param or "")


def test_the_nearest_field_is_named(server: Server) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "temprature": 1}
    message = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]["message"]
    assert "temprature" in message
    assert "did you mean temperature?" in message


@pytest.mark.parametrize("body", ["{not json", "[]", '"text"', "null", ""])
def test_bodies_that_are_no_request(server: Server, body: str) -> None:
    headers = {"content-type": "application/json"}
    for path in ("chat/completions", "completions"):
        response = httpx.post(f"{server.url}/v1/{path}", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_errors_as_the_client_sees_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a " * 600}])
    assert too_long.value.code == "context_length_exceeded"
    assert "256" in str(too_long.value)
    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)


def test_the_context_bounds_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=100_000, seed=0, logprobs=True, top_logprobs=0
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens <= 256
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_many_at_once_equal_one_by_one(server: Server, client: openai.OpenAI) -> None:
    def options(i: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"What is {i} plus {i}?"}]
        return {"model": MODEL, "messages": messages, "max_tokens": 10 + i, "seed": i}

    async def all_at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:
            answers = await asyncio.gather(*(many.chat.completions.create(**options(i)) for i in range(10)))
        return [answer.choices[0].message.content for answer in answers]

    together = asyncio.run(all_at_once())
    alone = [client.chat.completions.create(**options(i)).choices[0].message.content for i in range(10)]
    assert together == alone


def test_overload_is_refused_and_passes(server: Server, client: openai.OpenAI) -> None:
    """Eight run and sixteen wait; a request beyond them gets a 503, and the server goes on."""

    async def flood() -> list[int]:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 40, "n": 8}
        async with httpx.AsyncClient(timeout=60) as http:
            posts = [http.post(f"{server.url}/v1/completions", json=body) for _ in range(6)]
            return [response.status_code for response in await asyncio.gather(*posts)]

    codes = asyncio.run(flood())
    assert codes.count(200) >= 3
    assert 503 in codes
    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_request(server: Server, stream: bool) -> None:
    worker = server.app.state.worker
    cancelled = worker.metrics.finished.values["abort"]
    body = {"model": MODEL, "messages": MESSAGES, "stream": stream, "n": 8, "temperature": 2.0}
    with httpx.Client() as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.05)
    wait_until_idle(server)
    assert worker.metrics.finished.values["abort"] > cancelled


def test_an_idle_server_takes_no_cpu_time(server: Server) -> None:
    wait_until_idle(server)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1


def sse(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line.removeprefix("data: ")


def test_wire_format_of_a_stream(server: Server) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3, "stream": True, "seed": 1}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(sse(response))
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])
