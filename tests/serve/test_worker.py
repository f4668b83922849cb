"""The engine's thread: errors reach every client, the queue is bounded, and nothing is lost at the end."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
import torch

from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.engine.sequence import TokenEvent
from tafkir.errors import CapacityError, CheckpointError, RequestError, SamplingError
from tafkir.records import FinishReason, Request, SamplingParams
from tafkir.serve.app import build_app
from tafkir.serve.inbox import Inbox
from tafkir.serve.loading import build_engine, name_of
from tafkir.serve.worker import EngineWorker, Overloaded, Stopped
from tests.serve.conftest import start


class Collector:
    """Keeps what it is told, and says when its requests have ended."""

    def __init__(self, count: int = 1) -> None:
        self.events: list[TokenEvent] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._left = count

    def deliver(self, events: list[TokenEvent] | Exception) -> None:
        if isinstance(events, Exception):
            self.error = events
            self.ended.set()
            return
        self.events += events
        self._left -= sum(event.finish_reason is not None for event in events)
        if self._left == 0:
            self.ended.set()


@pytest.fixture
def build(checkpoint: Path) -> Engine:
    return build_engine(checkpoint, Tokenizer.load(checkpoint), 1, max_batch=2)


def request(id: str, max_tokens: int = 5) -> Request:
    return Request(id, (5, 6), SamplingParams(max_tokens=max_tokens, seed=1))


def test_tokens_reach_who_asked(build: Engine) -> None:
    worker = EngineWorker(lambda: build, max_queue=4)
    worker.start()
    first, second = Collector(2), Collector()
    worker.submit([request("a"), request("b")], first)
    worker.submit([request("c")], second)
    assert first.ended.wait(10)
    assert second.ended.wait(10)
    assert {event.request_id for event in first.events} == {"a", "b"}
    assert {event.request_id for event in second.events} == {"c"}
    assert [e.token_id for e in first.events if e.request_id == "a"] == [e.token_id for e in second.events]
    worker.stop()


def test_a_full_queue_refuses_all_or_none(build: Engine) -> None:
    worker = EngineWorker(lambda: build, max_queue=1)
    worker.start()
    collector = Collector()
    with pytest.raises(CapacityError, match="4 sequences at once"):  # more than ever fit
        worker.submit([request(str(i)) for i in range(4)], collector)
    with pytest.raises(RequestError):
        worker.submit([request("good"), Request("bad", (), SamplingParams())], collector)
    assert (worker.num_running, worker.num_waiting, worker.metrics.refused.values[""]) == (0, 0, 0)
    worker.submit([request(str(i), max_tokens=200) for i in range(2)], collector)
    with pytest.raises(Overloaded):
        worker.submit([request("c"), request("d")], collector)
    assert (worker.num_running + worker.num_waiting, worker.metrics.refused.values[""]) == (2, 2)
    worker.stop()


def test_stopping_tells_the_clients_and_refuses_more(build: Engine) -> None:
    worker = EngineWorker(lambda: build, max_queue=4)
    worker.start()
    collector = Collector()
    worker.submit([request("a", max_tokens=200)], collector)
    worker.stop()
    assert collector.ended.wait(5)
    assert not worker.healthy
    with pytest.raises(Stopped):
        worker.submit([request("b")], Collector())


def test_a_failed_start_is_raised_where_the_worker_is_started(tmp_path: Path) -> None:
    def fail() -> Engine:
        raise CheckpointError("damaged", where="model.safetensors")

    with pytest.raises(CheckpointError, match="damaged"):
        EngineWorker(fail, max_queue=1).start()
    with pytest.raises(CheckpointError, match="nowhere"):
        build_app(tmp_path / "nowhere")


def test_a_broken_model_is_an_error_everywhere_and_shows_in_health(checkpoint: Path) -> None:
    app = build_app(checkpoint, num_threads=1)
    server, uvicorn_server, thread = start(app)
    with torch.no_grad():
        app.state.worker.engine.decoder.norm.weight[0] = torch.nan
    body = {"prompt": "a", "max_tokens": 3}
    whole = httpx.post(f"{server.url}/v1/completions", json=body)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "engine_error"
    assert "nan" in whole.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    later = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": True})
    assert later.status_code == 503
    assert isinstance(app.state.worker.failure, SamplingError)
    uvicorn_server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/tiny", "tiny"),
        ("runs/wordmath/stages/03-rlvr/checkpoint", "wordmath-rlvr"),
        ("somewhere/checkpoint", "checkpoint"),
    ],
)
def test_model_names(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder) == name


def test_requests_that_come_together_begin_together(build: Engine) -> None:
    """While the first one's reader still reads another, an idle engine waits for it: both take the same steps."""
    worker = EngineWorker(lambda: build, max_queue=4)
    worker.start()
    collector, late = Collector(2), [request("b")]

    def settle(_: float) -> None:
        if late:
            worker.submit([late.pop()], collector)

    worker.settle = settle
    worker.submit([request("a")], collector)
    assert collector.ended.wait(10)
    assert (len(collector.events), worker.metrics.iteration.count) == (10, 5)
    worker.stop()


def test_readers_are_woken_seldom_and_miss_nothing() -> None:
    """Many streams share few wake-ups; who wants the whole answer has one for its end, and an error ends it at once."""
    tokens, streams, begun = 400, 16, threading.Semaphore(0)

    async def read(inbox: Inbox, woken: list[int]) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += [event.token_id for event in await inbox.get()]
            woken.append(len(ids))
            begun.release()
        return ids

    async def main() -> None:
        inboxes = [Inbox(whole=i == 0) for i in range(streams)]

        def send() -> None:
            for number in range(tokens):
                reason: FinishReason | None = "length" if number == tokens - 1 else None
                for inbox in inboxes:
                    inbox.deliver([TokenEvent("a", number, 0.0, reason)])
                if number == 0:  # a first token comes without those behind it
                    assert all(begun.acquire(timeout=10) for _ in inboxes[1:])

        woken: list[list[int]] = [[] for _ in inboxes]
        readers = [asyncio.create_task(read(*pair)) for pair in zip(inboxes, woken, strict=True)]
        thread = threading.Thread(target=send)
        thread.start()
        assert await asyncio.wait_for(asyncio.gather(*readers), 30) == [list(range(tokens))] * streams
        thread.join()
        assert all(each[0] == 1 for each in woken[1:])
        assert len(woken[0]) <= 2 and all(len(each) < tokens / 2 for each in woken)
        inboxes[0].deliver([TokenEvent("a", 0, 0.0, None)])
        inboxes[0].stop(ValueError("late"))
        with pytest.raises(ValueError, match="late"):
            await inboxes[0].get()

    asyncio.run(main())
