"""Rollouts from servers that speak as vLLM and SGLang do: the tokens of the engine behind them, or a named error."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError, RequestError, RolloutError
from tafkir.protocols import Completer
from tafkir.records import Completion, Request, SamplingParams
from tafkir.remote.connection import TransientError
from tafkir.remote.pool import Limits
from tafkir.remote.vllm import VllmDialect
from tests.remote.conftest import KINDS, LIMITS, MakePool
from tests.remote.servers import Answer, ProtocolServer, SglangServer, Silence, VllmServer

GENERATES = ("/v1/completions", "/generate")


def by_id(completions: Any) -> dict[str, Completion]:
    found = {done.request_id: done for done in completions}
    return found


def is_sampling(path: str, body: Answer) -> bool:
    """Not one of the exchanges that connect, check or score."""
    return path in GENERATES and ("return_token_ids" in body or "stop_token_ids" in body.get("sampling_params", {}))


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> type[ProtocolServer]:
    server: type[ProtocolServer] = KINDS[request.param][0]
    return server


def test_completions_are_those_of_the_engine_behind_the_server(
    kind: type[ProtocolServer], checkpoint: Path, make_pool: MakePool, engine: Engine, requests: list[Request]
) -> None:
    with kind(checkpoint) as server:
        pool = make_pool(server)
        assert isinstance(pool, Completer)
        pool.load_weights(engine.decoder.state_dict().items(), 5)
        found = by_id(pool.complete(requests))
    for request in requests:
        (expected,) = engine.complete([request])
        assert found[request.id] == replace(expected, policy_version=5)
    assert {done.finish_reason for done in found.values()} == {"stop", "length"}
    assert pool.metrics() == {"engine/servers_alive": 1.0}


def test_scores_are_teacher_forced_logprobs_at_temperature_one(
    kind: type[ProtocolServer], checkpoint: Path, make_pool: MakePool, engine: Engine, requests: list[Request]
) -> None:
    sequences = [list(request.prompt_ids) for request in requests[:2]]
    with kind(checkpoint) as server:
        pool = make_pool(server)
        scored = pool.score(sequences)
        with pytest.raises(RequestError, match="sequence 0: 1 tokens"):
            pool.score([[5]])
    for ours, theirs in zip(engine.score(sequences), scored, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_new_weights_reach_the_server_with_their_version(
    kind: type[ProtocolServer],
    checkpoint: Path,
    other_checkpoint: Path,
    make_pool: MakePool,
    engine: Engine,
    requests: list[Request],
) -> None:
    new = load_checkpoint(other_checkpoint).decoder.state_dict()
    with kind(checkpoint) as server:
        pool = make_pool(server)
        before = by_id(pool.complete(requests)) if kind is VllmServer else {}
        for version in (1, 2, 3):
            pool.load_weights(new.items(), version)
        after = by_id(pool.complete(requests))
        assert server.version == "3"
    folder = Path(server.folder or "")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version-00000002", "version-00000003"]
    assert (folder / "tokenizer.json").is_file()
    engine.load_weights(new.items(), 3)
    for request in requests:
        (expected,) = engine.complete([request])
        assert after[request.id] == expected
    assert before != after


def test_vllm_without_the_disk_backend_reloads_by_its_worker_method(
    checkpoint: Path, make_pool: MakePool, engine: Engine
) -> None:
    with VllmServer(checkpoint) as server:
        pool = make_pool(server, dialect=VllmDialect("reload"))
        pool.load_weights(engine.decoder.state_dict().items(), 1)
        assert server.paths()[-2:] == ["/collective_rpc", "/reset_prefix_cache"]


def test_weights_of_another_model_are_refused(checkpoint: Path, make_pool: MakePool, engine: Engine) -> None:
    weights = dict(engine.decoder.state_dict())
    with VllmServer(checkpoint) as server:
        pool = make_pool(server)
        name = min(weights)
        with pytest.raises(CheckpointError, match="1 missing weights"):
            pool.load_weights([pair for pair in weights.items() if pair[0] != name], 1)
        with pytest.raises(CheckpointError, match="shape"):
            pool.load_weights((weights | {name: torch.zeros(1)}).items(), 1)
        assert "/update_weights" not in server.paths()


def test_a_continuation_is_a_longer_prompt_with_draws_of_its_own(checkpoint: Path, make_pool: MakePool) -> None:
    params = SamplingParams(max_tokens=10, seed=3)
    with VllmServer(checkpoint) as server:
        (done,) = make_pool(server).complete([Request("a", (40, 41), params, prefix_ids=(50, 51, 52))])
        (body,) = [body for path, body in server.seen if is_sampling(path, body)]
    assert body["prompt"] == [40, 41, 50, 51, 52] and body["max_tokens"] == 7 and body["seed"] != 3
    assert len(done.token_ids) <= 7


# --- several servers --------------------------------------------------------------------------------------------------


def test_the_least_loaded_server_is_asked_and_no_server_gets_too_much(
    checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    running: dict[str, list[int]] = {}
    lock = threading.Lock()
    four_at_once = threading.Barrier(4)

    def watch(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            with lock:
                now, most = running.get(server.url, [0, 0])
                running[server.url] = [now + 1, max(most, now + 1)]
            four_at_once.wait(20)
            with lock:
                running[server.url][0] -= 1
        return answer

    with VllmServer(checkpoint, watch) as one, VllmServer(checkpoint, watch) as two:
        pool = make_pool(one, two, limits=replace(LIMITS, max_concurrency=2))
        assert len(by_id(pool.complete(requests))) == 8
        shares = [sum(is_sampling(*seen) for seen in server.seen) for server in (one, two)]
    assert [most for _, most in running.values()] == [2, 2]
    assert sum(shares) == 8 and min(shares) >= 3
    assert not four_at_once.broken


def test_a_server_that_dies_is_named_and_its_requests_go_to_the_others(
    kind: type[ProtocolServer],
    checkpoint: Path,
    make_pool: MakePool,
    engine: Engine,
    requests: list[Request],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            raise Silence
        return answer

    with kind(checkpoint, die) as bad, kind(checkpoint) as good, caplog.at_level(logging.WARNING):
        pool = make_pool(bad, good)
        pool.load_weights(engine.decoder.state_dict().items(), 1)
        found = by_id(pool.complete(requests))
        metrics = pool.metrics()
        assert metrics["engine/servers_alive"] == 1 and metrics["engine/servers_lost"] == 1
        assert metrics["engine/down"] >= 1 and metrics["engine/retries"] == metrics["engine/down"]
        assert f"rollout server {bad.url} is lost" in caplog.text and "1 left" in caplog.text
        bad.damage = None
        pool.load_weights(engine.decoder.state_dict().items(), 2)
        metrics = pool.metrics()
        assert metrics["engine/servers_alive"] == 2 and metrics["engine/servers_back"] == 1
        assert bad.version == "2"
    for request in requests:
        (expected,) = engine.complete([request])
        assert found[request.id] == replace(expected, policy_version=1)


def test_a_lone_server_that_comes_back_takes_the_present_weights_first(
    checkpoint: Path, make_pool: MakePool, engine: Engine, requests: list[Request]
) -> None:
    fallen = threading.Event()

    def restart(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body) and not fallen.is_set():
            fallen.set()
            server.version = "default"
            raise Silence
        return answer

    with VllmServer(checkpoint, restart) as server:
        pool = make_pool(server, limits=replace(LIMITS, max_concurrency=1))
        pool.load_weights(engine.decoder.state_dict().items(), 4)
        assert len(by_id(pool.complete(requests))) == 8
        assert server.version == "4" and server.paths().count("/update_weights") == 2


def test_no_server_left_is_an_error_that_names_them_all(
    checkpoint: Path, make_pool: MakePool, engine: Engine, requests: list[Request]
) -> None:
    one, two = VllmServer(checkpoint), VllmServer(checkpoint)
    with one, two:
        pool = make_pool(one, two)
        pool.load_weights(engine.decoder.state_dict().items(), 1)
        stopped = [server.url for server in (one, two)]

        def gone(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
            raise Silence

        one.damage = two.damage = gone
        with pytest.raises(RolloutError, match="no rollout server is left") as caught:
            list(pool.complete(requests))
    assert all(url in str(caught.value) for url in stopped)


# --- bad servers ------------------------------------------------------------------------------------------------------


def test_a_late_server_is_not_waited_for(
    kind: type[ProtocolServer], checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    hurry = threading.Event()

    def stall(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            hurry.wait(20)
        return answer

    with kind(checkpoint, stall) as bad, kind(checkpoint) as good:
        pool = make_pool(bad, good, limits=Limits(1.5, 5.0, max_concurrency=4, max_retries=2, backoff_s=0.0))
        began = time.monotonic()
        assert len(by_id(pool.complete(requests[:3]))) == 3
        assert time.monotonic() - began < 15
        metrics = pool.metrics()
        hurry.set()
    assert metrics["engine/late"] >= 1


def test_a_server_that_trickles_is_late_as_well() -> None:
    import socket

    from tafkir.remote.connection import Connection

    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        peer, _ = listener.accept()
        peer.recv(4096)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        try:
            for _ in range(100):
                peer.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            return

    threading.Thread(target=trickle, daemon=True).start()
    connection = Connection(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"no answer within 0\.3 s") as caught:
        connection.get("/slow")
    assert caught.value.kind == "late" and time.monotonic() - began < 2
    listener.close()


def test_a_busy_server_is_asked_again_and_counted(
    kind: type[ProtocolServer], checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    seen = []

    def busy(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer | int:
        if is_sampling(path, body):
            seen.append(path)
            return 503 if len(seen) <= 2 else answer
        return answer

    with kind(checkpoint, busy) as server:
        pool = make_pool(server, limits=replace(LIMITS, max_concurrency=1))
        assert len(by_id(pool.complete(requests))) == 8
    assert len(seen) == 10
    assert pool.metrics() == {"engine/servers_alive": 1.0, "engine/busy": 2.0, "engine/retries": 2.0}


def test_a_request_that_never_succeeds_is_named(checkpoint: Path, make_pool: MakePool, requests: list[Request]) -> None:
    def busy(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer | int:
        return 503 if is_sampling(path, body) else answer

    with (
        VllmServer(checkpoint, busy) as server,
        pytest.raises(RolloutError, match=r"request '0' failed 3 times.*status 503: out of order"),
    ):
        list(make_pool(server).complete(requests[:1]))


def test_a_server_with_another_tokenizer_is_refused_at_once(
    kind: type[ProtocolServer], other_checkpoint: Path, make_pool: MakePool
) -> None:
    with kind(other_checkpoint) as server, pytest.raises(RolloutError, match="another tokenizer") as caught:
        make_pool(server)
    assert server.url in str(caught.value)


def test_a_wrong_address_is_a_named_error(checkpoint: Path, make_pool: MakePool) -> None:
    with VllmServer(checkpoint) as vllm, SglangServer(checkpoint) as sglang:
        with pytest.raises(RolloutError, match=r"/v1/models: status 404: Not Found.*docs/scale-out.md"):
            make_pool(sglang, dialect=VllmDialect())
        url = vllm.url
    vllm.url = url
    with pytest.raises(TransientError, match="the connection failed"):
        make_pool(vllm)


def _choice(answer: Answer) -> Answer:
    choice: Answer = answer["choices"][0]
    return choice


def _drop_last(answer: Answer) -> None:
    choice = _choice(answer)
    choice["token_ids"] = choice["token_ids"][:-1]
    choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-1]


def _cut(answer: Answer) -> None:
    _drop_last(answer)
    answer["usage"]["completion_tokens"] -= 1
    _choice(answer)["finish_reason"] = "length"


def _empty(answer: Answer) -> None:
    choice = _choice(answer)
    choice["token_ids"], choice["logprobs"]["token_logprobs"] = [], []
    answer["usage"]["completion_tokens"] = 0


DAMAGES: dict[str, tuple[Any, str]] = {
    "no logprobs": (lambda a: _choice(a).update(logprobs=None), "0 log-probabilities for .* tokens"),
    "one logprob missing": (
        lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, None),
        "log-probabilities for .* tokens",
    ),
    "a logprob of minus infinity": (
        lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, -9999.0),
        "a log-probability of -9999",
    ),
    "a logprob that is a probability": (
        lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, 0.4),
        "a log-probability of 0.4",
    ),
    "a logprob that is no number": (
        lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, math.nan),
        "a log-probability of nan",
    ),
    "no token ids": (lambda a: _choice(a).pop("token_ids"), "no token ids.*return_token_ids"),
    "fewer tokens than sampled": (_drop_last, "tokens came of .* that the server sampled"),
    "cut short": (_cut, "cut off after .* tokens"),
    "nothing at all": (_empty, "an empty completion"),
    "a token out of the vocabulary": (lambda a: _choice(a)["token_ids"].__setitem__(0, 99999), "token id 99999"),
    "another prompt": (lambda a: _choice(a).update(prompt_token_ids=[1, 2]), "answered another prompt, of 2 tokens"),
    "no choices": (lambda a: a.pop("choices"), r"the answer has no choices\.0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_answer_that_cannot_be_trained_on_is_a_named_error(
    name: str, checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    change, message = DAMAGES[name]

    def damage(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            change(answer)
        return answer

    with VllmServer(checkpoint, damage) as server:
        pool = make_pool(server)
        with pytest.raises(RolloutError, match=message) as caught:
            list(pool.complete(requests[:1]))
        assert server.url in str(caught.value)


def test_a_stop_token_that_the_server_kept_to_itself_is_noticed(
    checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    def keep(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            _choice(answer)["finish_reason"] = "stop"
            _choice(answer)["token_ids"][-1] = 7
        return answer

    with (
        VllmServer(checkpoint, keep) as server,
        pytest.raises(RolloutError, match="stopped at token 7, which is no stop token"),
    ):
        list(make_pool(server).complete(requests[:1]))


def test_sglang_that_drops_logprobs_or_has_other_weights_is_named(
    checkpoint: Path, make_pool: MakePool, engine: Engine, requests: list[Request]
) -> None:
    def drop(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if is_sampling(path, body):
            del answer["meta_info"]["output_token_logprobs"]
        return answer

    with SglangServer(checkpoint) as server:
        pool = make_pool(server)
        pool.load_weights(engine.decoder.state_dict().items(), 1)
        server.damage = drop
        with pytest.raises(RolloutError, match="0 log-probabilities for"):
            list(pool.complete(requests[:1]))
        server.damage = None
        # Someone else changed its weights: they are loaded again before anything is sampled with them.
        server.version = "7"
        assert len(by_id(pool.complete(requests))) == 8
        assert server.version == "1" and pool.metrics()["engine/servers_back"] == 1


def test_a_server_that_keeps_its_old_weights_is_an_error(
    kind: type[ProtocolServer], checkpoint: Path, make_pool: MakePool, engine: Engine
) -> None:
    def refuse(server: ProtocolServer, path: str, body: Answer, answer: Answer) -> Answer:
        if path == "/update_weights_from_disk":
            return {"success": False, "message": "wrong shape"}
        return {"weight_version": "0"} if path == "/weight_info" else answer

    with kind(checkpoint, refuse) as server:
        pool = make_pool(server)
        with pytest.raises(RolloutError, match=r"kept its weights: wrong shape|weights of version 0; expected 9"):
            pool.load_weights(engine.decoder.state_dict().items(), 9)


def test_logprobs_at_another_temperature_than_that_of_sampling_are_refused(
    checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    asked = [replace(request, params=replace(request.params, temperature=0.6)) for request in requests]
    with VllmServer(checkpoint) as server:
        assert len(by_id(make_pool(server).complete(asked))) == 8
        assert sum(body.get("logprobs") == 5 for _, body in server.seen) in (2, 4, 6, 8)
        server.raw_logprobs = True  # type: ignore[attr-defined]
        with pytest.raises(RolloutError, match=r"not those at temperature 0\.6.*processed_logprobs"):
            list(make_pool(server).complete(asked))


def test_requests_that_a_server_cannot_do_are_refused_before_any_is_sent(
    checkpoint: Path, make_pool: MakePool, requests: list[Request]
) -> None:
    cut = replace(requests[1], params=replace(requests[1].params, top_p=0.9))
    with VllmServer(checkpoint) as server:
        pool = make_pool(server)
        with pytest.raises(RequestError, match="top_p = 1 and top_k = 0"):
            list(pool.complete([requests[0], cut]))
        with pytest.raises(RequestError, match="same id"):
            list(pool.complete([requests[0], requests[0]]))
        assert not any(is_sampling(*seen) for seen in server.seen)
