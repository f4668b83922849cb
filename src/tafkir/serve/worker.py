"""The one thread that owns the engine. Requests queue to it; the tokens of a step go back to who asked.

The model is built and run on this thread alone, because PyTorch keeps a pool of OpenMP workers per calling thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tafkir.records import Request

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine
    from tafkir.engine.sequence import TokenEvent

__all__ = ["EngineWorker", "Overloaded", "Stopped", "Subscriber", "WorkerStats"]

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """Too many requests wait already."""


class Stopped(Exception):
    """The worker has ended, or its engine has failed."""


class Subscriber(Protocol):
    """Who asked: gets the events of its requests, or the error that ended them. Called on the worker's thread."""

    def deliver(self, events: list[TokenEvent] | Exception) -> None: ...


@dataclass(slots=True)
class WorkerStats:
    """Counters for the metrics page. Seconds are wall time."""

    requests: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0})
    prompt_tokens: int = 0
    generation_tokens: int = 0
    first_tokens: int = 0
    time_to_first_token_s: float = 0.0


@dataclass(slots=True)
class _Job:
    request: Request
    top_logprobs: int
    subscriber: Subscriber
    queued_at: float
    started: bool = False


class EngineWorker:
    """Runs an engine on a thread of its own.

    Args:
        build: makes the engine; called on the worker's thread.
        max_queue: most requests that may wait beyond those that run.
    """

    def __init__(self, build: Callable[[], Engine], *, max_queue: int) -> None:
        self._build, self._max_queue = build, max_queue
        self._wake = threading.Condition()
        self._inbox: list[_Job] = []
        self._cancelled: list[str] = []
        self._jobs: dict[str, _Job] = {}
        self._stopping = False
        self.failure: Exception | None = None
        """What ended the engine."""
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._main, name="tafkir-engine", daemon=True)
        self.stats = WorkerStats()

    def start(self) -> None:
        """Build the engine and start to serve; raises what building it raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the thread; requests that still run are told so."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def engine(self) -> Engine:
        """For facts that never change and for `Engine.check`; everything else belongs to the worker's thread."""
        assert self._engine is not None, "start() comes first"
        return self._engine

    @property
    def healthy(self) -> bool:
        return self._ready.is_set() and self.failure is None and self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return self._engine.num_running if self._engine else 0

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._jobs) - self.num_running)

    def submit(self, requests: Sequence[Request], subscriber: Subscriber, *, top_logprobs: int = 0) -> None:
        """Queue requests whose ids are fresh, all or none.

        Raises:
            RequestError, CapacityError: one of them could never run.
            Overloaded: the queue is full.
            Stopped: nobody will serve them.
        """
        for request in requests:
            self.engine.check(request, top_logprobs=top_logprobs)
        now = time.monotonic()
        with self._wake:
            if self._stopping or self.failure is not None:
                raise Stopped("the engine has stopped")
            if len(self._jobs) + len(requests) > self.engine.max_batch + self._max_queue:
                self.stats.refused += len(requests)
                raise Overloaded(f"{len(self._jobs)} requests are being served already")
            for request in requests:
                job = _Job(request, top_logprobs, subscriber, now)
                self._jobs[request.id] = job
                self._inbox.append(job)
            self.stats.requests += len(requests)
            self._wake.notify()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests; those that have finished are no error."""
        with self._wake:
            self._cancelled += [request_id for request_id in request_ids if request_id in self._jobs]
            self._wake.notify()

    # --- the worker's thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._engine = self._build()
        except Exception as error:  # handed to start(), which raises it
            self.failure = error
            return
        finally:
            self._ready.set()
        try:
            while self._take_orders():
                self._deliver(self._engine.step())
            self._end_all(Stopped("the server is shutting down"))
        except Exception as error:  # the server's edge: recorded, told to every client, and shown by /health
            logger.exception("the engine failed")
            with self._wake:
                self.failure = error
            self._end_all(error)

    def _take_orders(self) -> bool:
        """Wait until there is work; False when it is time to stop. An idle engine takes no CPU time."""
        engine = self.engine
        with self._wake:
            while not (self._inbox or self._cancelled or self._stopping or engine.has_work):
                self._wake.wait()
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            if self._stopping:
                return False
        for job in inbox:
            engine.add_request(job.request, top_logprobs=job.top_logprobs)
        for request_id in cancelled:
            if engine.cancel(request_id) is not None:
                self._forget(request_id, "cancelled")
        return True

    def _deliver(self, events: list[TokenEvent]) -> None:
        batches: dict[int, tuple[Subscriber, list[TokenEvent]]] = {}
        now = time.monotonic()
        self.stats.generation_tokens += len(events)
        for event in events:
            job = self._jobs[event.request_id]
            if not job.started:
                job.started = True
                self.stats.prompt_tokens += len(job.request.prompt_ids)
                self.stats.first_tokens += 1
                self.stats.time_to_first_token_s += now - job.queued_at
            batches.setdefault(id(job.subscriber), (job.subscriber, []))[1].append(event)
            if event.finish_reason:
                self._forget(event.request_id, event.finish_reason)
        for subscriber, batch in batches.values():
            subscriber.deliver(batch)

    def _forget(self, request_id: str, reason: str) -> None:
        with self._wake:
            del self._jobs[request_id]
        self.stats.finished[reason] += 1

    def _end_all(self, error: Exception) -> None:
        with self._wake:
            jobs, self._jobs, self._inbox = list(self._jobs.values()), {}, []
        for subscriber in {id(job.subscriber): job.subscriber for job in jobs}.values():
            subscriber.deliver(error)
