"""Another checkpoint takes the place of the first: old requests end on the old weights, new ones see the new."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.records import Request, SamplingParams
from tafkir.serve.app import build_app
from tafkir.serve.loading import build_engine
from tafkir.serve.options import ServerOptions
from tests.serve.conftest import TEXTS, Server, start

# Several blocks long, so that a prefix cache has something to find.
PROMPT = "What is 48 plus 24? Ali has 3 apples and buys 5 more. How many? The answer is 72. What is 24 plus 48?"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, with another width, depth, context and vocabulary."""
    tokenizer = Tokenizer.train(TEXTS * 2, 380)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        num_hidden_layers=1,
        head_dim=16,
        intermediate_size=64,
        num_experts=0,
        max_position_embeddings=192,
    )
    decoder = build_decoder(config, 1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("swap") / "other"
    save_checkpoint(path, decoder, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    options = ServerOptions(admin_key="admin", api_keys=("user",))
    app = build_app(checkpoint, max_batch=4, num_threads=1, options=options)
    server, uvicorn_server, thread = start(app, options)
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


def post(server: Server, path: str, body: Any, key: str = "admin", **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60, **options)


def ids_of(server: Server, max_tokens: int = 24) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = post(server, "/v1/completions", body, "user")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def by_engine(checkpoint: Path, max_tokens: int = 24) -> list[int]:
    """What an engine of its own says, whose cache has seen nothing."""
    tokenizer = Tokenizer.load(checkpoint)
    engine = build_engine(checkpoint, tokenizer, 1, weights="auto")
    engine.eos_ids = ()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    (done,) = engine.complete([Request("a", tuple(tokenizer.encode(PROMPT)), params)])
    return list(done.token_ids)


def card(server: Server) -> dict[str, Any]:
    (found,) = httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer user"}).json()["data"]
    return dict(found)


def test_old_requests_end_on_the_old_weights_and_new_ones_see_the_new(
    server: Server, checkpoint: Path, other: Path
) -> None:
    before, after = by_engine(checkpoint), by_engine(other)
    assert ids_of(server) == ids_of(server) == before != after
    was = card(server)
    old = weakref.ref(server.app.state.live.served.engine)
    body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True, "logprobs": 0}
    headers = {"authorization": "Bearer user"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as running:
        lines = running.iter_lines()
        first = next(lines)
        told = post(server, "/update_weights_from_disk", {"model_path": str(other), "weight_version": "2"}).json()
        assert told["success"] and told["model"] == "other" and told["num_going_on"] <= 1
        # The same beginning: what the old weights have left of it in their cache is not found.
        assert ids_of(server) == ids_of(server) == after
        rest = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in rest)
    alone = Tokenizer.load(checkpoint).decode(by_engine(checkpoint, 100))
    assert text.rstrip("\ufffd") == alone.rstrip("\ufffd"), "half a character at the end is no text"
    assert {event["model"] for event in rest} == {"tiny-random"}
    now = card(server)
    assert (now["id"], now["max_model_len"]) == ("other", 192) and now["fingerprint"] != was["fingerprint"]
    answer = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "model": "other"}, "user").json()
    assert answer["model"] == "other" and now["fingerprint"].startswith(answer["system_fingerprint"])
    gone = post(server, "/v1/completions", {"prompt": "a", "model": "tiny-random"}, "user")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    info = httpx.get(f"{server.url}/get_model_info", headers={"authorization": "Bearer admin"}).json()
    assert (info["model_path"], info["weight_version"]) == (str(other), "2")
    gc.collect()
    assert old() is None, "the old weights are given back"
    assert post(server, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint)}})
    assert ids_of(server) == before


def test_a_broken_checkpoint_is_refused_and_nothing_changes(server: Server, other: Path, tmp_path: Path) -> None:
    before, was = ids_of(server), card(server)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(other, tmp_path / name))

    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = broken("flipped") / "model.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-50] ^= 1
    flipped.write_bytes(bytes(data))
    (broken("mute") / "tokenizer.json").unlink()
    decoder = load_checkpoint(other).decoder
    with torch.no_grad():  # finite weights, infinite products
        decoder.norm.weight.fill_(1e38)
        decoder.head_weight.fill_(1e38)
    save_checkpoint(tmp_path / "hot", decoder, tokenizer=Tokenizer.load(other))
    for name in ("cut", "flipped", "mute", "hot", "nothing"):
        answer = post(server, "/update_weights_from_disk", {"model_path": str(tmp_path / name)})
        assert (answer.status_code, answer.json()["success"]) == (400, False), name
        assert "the model stays as it was" in answer.json()["message"]
    assert (ids_of(server), card(server)) == (before, was)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'tafkir:weight_updates_total{model_name="tiny-random",outcome="refused"} 5' in text


def test_what_runs_may_be_ended(server: Server, checkpoint: Path) -> None:
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "n": 4}
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", body, "user")))
    running.start()
    worker = server.app.state.worker
    while not worker.num_running:
        pass
    told = post(server, "/update_weights_from_disk", {"abort_all_requests": True}).json()
    assert told["success"], "the present folder, read again"
    running.join()
    if told["num_going_on"]:
        assert (answers[0].status_code, answers[0].headers["retry-after"]) == (503, "1")
    deadline = time.monotonic() + 10  # the client hears of it before the engine has let go of its other choices
    while worker.num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.num_running == 0
    assert ids_of(server) == by_engine(checkpoint)


def test_who_may_ask(server: Server, checkpoint: Path) -> None:
    update = "/update_weights_from_disk"
    for key in ("user", "wrong"):
        assert post(server, update, {"model_path": str(checkpoint)}, key).status_code == 401
    assert post(server, update, {"model_pth": "x"}).status_code == 400
    assert post(server, "/reset_prefix_cache", {}).status_code == 200
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1}, "admin").status_code == 200
    plain = build_app(checkpoint, num_threads=1)
    asked = [route.path for route in plain.routes if "weights" in route.path]  # type: ignore[attr-defined]
    plain.state.worker.stop()
    assert asked == [], "without an admin key there is no such path"
    gateway_scope = {"type": "http", "method": "POST", "path": update, "headers": [], "client": ("192.0.2.7", 1)}
    assert _status_of(server, gateway_scope) == 403, "another machine"


def _status_of(server: Server, scope: dict[str, Any]) -> int:
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope |= {"query_string": b"", "raw_path": scope["path"].encode(), "http_version": "1.1", "scheme": "http"}
    asyncio.run(server.app({**scope, "server": ("a", 1), "root_path": "", "asgi": {}}, receive, send))
    return int(sent[0]["status"])
