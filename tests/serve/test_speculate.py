"""A server that drafts gives the answers of one that does not, and counts its drafts under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from tafkir.cli.main import app as cli
from tafkir.serve.app import build_app

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0.9, "seed": 5, "n": 3, "max_tokens": 30, "stop": ["a", "ا"], "logprobs": True, "top_logprobs": 3},
    {"temperature": 1.0, "seed": 6, "max_tokens": 40, "frequency_penalty": 0.7, "min_p": 0.01, "top_p": 0.9},
    {
        "temperature": 0.7,
        "seed": 7,
        "n": 2,
        "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    },
]


@pytest.fixture(scope="module")
def clients(checkpoint: Path) -> Iterator[tuple[TestClient, TestClient]]:
    apps = [build_app(checkpoint, max_batch=3, speculate=speculate) for speculate in (None, "ngram:4")]
    # What is asked here is whether drafts change an answer, not whether they pay.
    apps[1].state.worker.engine.speculation.meter = None
    with TestClient(apps[0]) as plain, TestClient(apps[1]) as drafting:
        yield plain, drafting


def ask(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    question = {"role": "user", "content": "Ali has 3 apples and 3 apples and 3 apples. How many?"}
    response = client.post("/v1/chat/completions", json={"messages": [question], **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def answers(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = ask(client, body)["choices"]
    return choices


def drafts_of(client: TestClient) -> tuple[float, ...]:
    families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    names = ("draft_tokens", "accepted_tokens")
    return tuple(families[f"vllm:spec_decode_num_{name}"].samples[0].value for name in names)


@pytest.mark.parametrize("body", BODIES)
def test_answers_are_the_same(clients: tuple[TestClient, TestClient], body: dict[str, Any]) -> None:
    plain, drafting = clients
    expected, got = answers(plain, body), answers(drafting, body)
    for one, other in zip(expected, got, strict=True):
        found, wanted = other.pop("logprobs", None), one.pop("logprobs", None)
        assert one == other
        if wanted:
            assert [t["token"] for t in found["content"]] == [t["token"] for t in wanted["content"]]
            assert [t["logprob"] for t in found["content"]] == pytest.approx(
                [t["logprob"] for t in wanted["content"]], abs=1e-5
            )


def test_drafts_are_counted(clients: tuple[TestClient, TestClient]) -> None:
    answers(clients[1], BODIES[0])
    families = {f.name: f for f in text_string_to_metric_families(clients[1].get("/metrics").text)}
    drafts, tokens, accepted = (
        families[f"vllm:spec_decode_num_{name}"].samples[0].value
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < drafts <= tokens and accepted <= tokens
    places = families["vllm:spec_decode_num_accepted_tokens_per_pos"].samples
    assert [sample.labels["position"] for sample in places] == ["0", "1", "2", "3"]
    assert sum(sample.value for sample in places) == accepted


def test_an_answer_tells_its_own_drafts_and_times(clients: tuple[TestClient, TestClient]) -> None:
    drafted, kept = drafts_of(clients[1])
    answer = ask(clients[1], BODIES[0])
    timings = answer["timings"]
    now_drafted, now_kept = drafts_of(clients[1])
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (now_drafted - drafted, now_kept - kept)
    assert timings["draft_n"] > 0
    assert timings["predicted_n"] == answer["usage"]["completion_tokens"]
    assert timings["ttft_ms"] > 0 and timings["predicted_ms"] > 0
    rate = (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1000
    assert timings["predicted_per_second"] == pytest.approx(rate, rel=1e-3)
    assert ask(clients[0], BODIES[0])["timings"]["draft_n"] == 0


def test_what_cannot_draft_is_refused_in_words(checkpoint: Path) -> None:
    for speculate, words in (("nextn", "no multi-token-prediction layers"), ("ngram:99", "1 to 16 tokens")):
        result = CliRunner().invoke(cli, ["chat", str(checkpoint), "--speculate", speculate], input="")
        assert result.exit_code != 0
        assert words in " ".join(str(result.exception or result.output).split())
