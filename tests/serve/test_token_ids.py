"""`tafkir serve` as a rollout server: token ids both ways, in vLLM's spelling, read by the client for vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tafkir.checkpoint.load import load_checkpoint, load_config
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.errors import RolloutError
from tafkir.records import Request, SamplingParams
from tafkir.remote.pool import Limits, ServerPool
from tafkir.remote.vllm import VllmDialect
from tafkir.remote.weights import WeightFolders
from tests.serve.conftest import Server

LIMITS = Limits(timeout_s=30, max_concurrency=4, max_retries=1, backoff_s=0.01)


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture
def pool(server: Server, checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[ServerPool]:
    pool = ServerPool(
        [server.url],
        VllmDialect(),
        tokenizer,
        eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
        vocab_size=load_config(checkpoint).vocab_size,
        folders=WeightFolders(tmp_path, checkpoint),
        limits=LIMITS,
    )
    yield pool
    pool.close()


def test_the_client_for_vllm_samples_from_our_own_server(
    pool: ServerPool, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    prompt = tuple(tokenizer.encode("What is 48 plus 24?"))
    # A common token as stop token, so that some completions end by it and not by their length.
    (often,) = tokenizer.encode(" ")[:1]
    requests = [
        Request(
            str(i), prompt[: 4 + i % 3], SamplingParams(0.8, max_tokens=24, seed=50 + i, stop_token_ids=(often, 70))
        )
        for i in range(12)
    ]
    found = {done.request_id: done for done in pool.complete(requests)}
    engine = Engine(
        load_checkpoint(checkpoint).decoder,
        eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
        max_batch=1,
    )
    for request in requests:
        (expected,) = engine.complete([request])
        done = found[request.id]
        assert (done.token_ids, done.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert done.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
    assert pool.metrics() == {"engine/servers_alive": 1.0}


def test_a_server_whose_weights_cannot_be_changed_says_so(pool: ServerPool, checkpoint: Path) -> None:
    weights = load_checkpoint(checkpoint).decoder.state_dict()
    with pytest.raises(RolloutError, match=r"/pause.*status 404.*docs/scale-out.md"):
        pool.load_weights(weights.items(), 1)


def test_token_ids_hold_the_stop_token_and_every_logprob(server: Server, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("How many?")
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1, "logprobs": 0, "n": 2, "return_token_ids": True}
    body["stop_token_ids"] = list(range(16))
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == prompt
        assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"])
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    refused = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60)
    assert refused.status_code == 400 and "return_token_ids needs stream=false" in refused.text
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "<|im_start|>How many?"}, timeout=60).json()
    assert tokens["tokens"] == [tokenizer.special_id("<|im_start|>"), *prompt] and tokens["count"] == len(prompt) + 1
