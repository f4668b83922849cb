"""The one thread that owns the engine. Requests queue to it; the tokens of a step go back to who asked.

The model is built and run on this thread alone, because PyTorch keeps a pool of OpenMP workers per calling thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tafkir.errors import CapacityError, TafkirError
from tafkir.records import Request
from tafkir.serve.jobs import Job, Subscriber
from tafkir.serve.metrics import ServerMetrics

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine
    from tafkir.engine.prompt_scores import PromptScores
    from tafkir.engine.sequence import TokenEvent
    from tafkir.engine.shaping import Shaper
    from tafkir.serve.tracing import Tracer

__all__ = ["EngineWorker", "Overloaded", "Stopped"]

logger = logging.getLogger(__name__)

# Prompts that are scored between two steps of those that generate.
_SCORE_TOKENS = 4096
# An idle engine waits so long for another request after the first, longer after several, and so long in all: who comes
# together begins together, in one pass over all prompts, which would be read in pieces beside the first one's tokens.
_APART_S, _FAR_APART_S, _GATHER_S = 0.001, 0.005, 0.1


class Overloaded(Exception):
    """Too many requests wait already. `retry_after_s` is when a place may be free."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Stopped(Exception):
    """The worker has ended or is about to, or its engine has failed."""


@dataclass(slots=True)
class _Scoring:
    token_ids: tuple[int, ...]
    count: int
    engine: Engine
    future: Future[PromptScores]


class EngineWorker:
    """Runs an engine on a thread of its own, and beside it those that it has taken the place of, to their last request.

    Args:
        build: makes the engine; called on the worker's thread.
        max_queue: most requests that may wait beyond those that run.
    """

    def __init__(self, build: Callable[[], Engine], *, max_queue: int) -> None:
        self._build, self._max_queue = build, max_queue
        self._wake = threading.Condition()
        self._inbox: list[Job] = []
        self._scorings: deque[_Scoring] = deque()
        self._cancelled: list[str] = []
        self._jobs: dict[str, Job] = {}
        self._queued: dict[str, Job] = {}  # with an engine that has not begun with them
        self._stopping = self._draining = False
        self._beat = time.monotonic()
        self.failure: Exception | None = None
        """What ended the engine."""
        self._ready = threading.Event()
        self._engine: Engine | None = None
        # Engines that were replaced, or that a request was made for just before, and when they must have ended.
        self._leaving: dict[Engine, float] = {}
        self._orders: list[tuple[Callable[[], None], Future[None]]] = []
        self._thread = threading.Thread(target=self._main, name="tafkir-engine", daemon=True)
        self.metrics = ServerMetrics()
        self.tracer: Tracer | None = None
        """Where requests that have ended are told of."""
        self.settle: Callable[[float], None] | None = None
        """Waits at most so many seconds for whoever reads requests to be done with those that are there."""

    def start(self) -> None:
        """Build the engine and start to serve; raises what building it raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        """Let /ready say that the end is near. Whoever holds a connection until it is closed is still answered."""
        self._draining = True

    def stop(self) -> None:
        """End the thread; requests that still run are told so."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def engine(self) -> Engine:
        """Who takes new requests. For facts that never change and for `check`; the rest is the worker's thread's."""
        assert self._engine is not None, "start() comes first"
        return self._engine

    @property
    def healthy(self) -> bool:
        return self._ready.is_set() and self.failure is None and self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining or self._stopping

    @property
    def stalled_s(self) -> float:
        """Seconds since the engine's last step while there is work; 0 where there is none."""
        return time.monotonic() - self._beat if self._jobs or self._scorings else 0.0

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._jobs) - self.num_running) + len(self._scorings)

    @property
    def _engines(self) -> list[Engine]:
        return [*self._leaving, self._engine] if self._engine else []

    @property
    def _num_served(self) -> int:
        return len(self._jobs) + len(self._scorings)

    @property
    def full(self) -> bool:
        """Whether the next request would be refused."""
        return self._num_served >= self.engine.max_batch + self._max_queue

    def check_open(self, count: int = 1) -> None:
        """Raises Stopped or Overloaded where so many more requests would not be taken, CapacityError where never."""
        if self._stopping or self.failure is not None:
            raise Stopped("the server is shutting down" if self.failure is None else "the engine has stopped")
        if count > (most := self.engine.max_batch + self._max_queue):
            what = f"the request asks for {count} sequences at once"
            raise CapacityError(what, expected=f"at most {most}", fix="lower n, or send fewer prompts at a time")
        if self._num_served + count > self.engine.max_batch + self._max_queue:
            self.metrics.refused.add(amount=count)
            latency = self.metrics.latency
            mean_s = latency.sum / latency.count if latency.count else 1.0
            wait_s = min(60.0, max(1.0, mean_s * self.num_waiting / self.engine.max_batch))
            raise Overloaded(f"{self._num_served} requests are being served already", wait_s)

    def submit(
        self,
        requests: Sequence[Request],
        subscriber: Subscriber,
        *,
        top_logprobs: int = 0,
        shapers: Sequence[Shaper | None] = (),
        engine: Engine | None = None,
        metrics: ServerMetrics | None = None,
    ) -> list[Job]:
        """Queue requests whose ids are fresh, all or none; `shapers` are theirs, one each where any are given.

        `engine` is the one that they were made for; None takes the present one. `metrics` counts them; None: the
        server's own.

        Raises:
            RequestError, CapacityError: one of them could never run.
            Overloaded: the queue is full.
            Stopped: nobody will serve them.
        """
        engine, metrics = engine or self.engine, metrics or self.metrics
        for request in requests:
            engine.check(request, top_logprobs=top_logprobs)
        now = time.monotonic()
        with self._wake:
            self.check_open(len(requests))
            for request, shaper in zip(requests, shapers or [None] * len(requests), strict=True):
                job = Job(request, top_logprobs, subscriber, shaper, engine, metrics, now)
                self._jobs[request.id] = job
                self._inbox.append(job)
            metrics.accepted.add(amount=len(requests))
            self._wake.notify()
            return [self._jobs[request.id] for request in requests]

    def score(
        self, token_ids: Sequence[tuple[int, ...]], count: int, engine: Engine | None = None
    ) -> list[Future[PromptScores]]:
        """Queue prompts to be scored, each with the `count` most probable tokens; a cancelled future is not run.

        Raises:
            Overloaded, Stopped: as `submit`.
        """
        with self._wake:
            self.check_open(len(token_ids))
            jobs = [_Scoring(ids, count, engine or self.engine, Future()) for ids in token_ids]
            self._scorings.extend(jobs)
            self._wake.notify()
        return [job.future for job in jobs]

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests; those that have finished are no error."""
        with self._wake:
            self._cancelled += [request_id for request_id in request_ids if request_id in self._jobs]
            self._wake.notify()

    def replace(self, engine: Engine, drain_s: float = math.inf) -> int:
        """Let another engine take what comes from now on; how many requests go on with the one before.

        Those that have not ended after `drain_s` seconds are told `Stopped`.

        Raises:
            Stopped: the server is about to end, or has failed.
        """
        with self._wake:
            self.check_open()
            old, self._engine = self.engine, engine
            self._leaving[old] = time.monotonic() + drain_s
            self._wake.notify()
            return sum(job.engine is old for job in self._jobs.values())

    def between_steps(self, act: Callable[[], None]) -> Future[None]:
        """Have something done on the worker's thread while no step runs."""
        future: Future[None] = Future()
        with self._wake:
            self._orders.append((act, future))
            self._wake.notify()
        return future

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
                self._beat = time.monotonic()
                if self._scorings:
                    self._score_some()
                for engine in self._engines:
                    if engine.has_work:
                        events = engine.step()
                        self._note_started()
                        self._deliver(events)
            self._end_all(Stopped("the server is shutting down"))
        except Exception as error:  # the server's edge: recorded, told to every client, and shown by /health
            logger.exception("the engine failed")
            with self._wake:
                self.failure = error
            self._end_all(error)

    def _take_orders(self) -> bool:
        """Wait until there is work; False when it is time to stop. An idle engine takes no CPU time."""
        with self._wake:
            while not (self._inbox or self._cancelled or self._scorings or self._orders or self._stopping):
                if self._leaving or self.engine.has_work:
                    break
                self._wake.wait()
        if self._inbox and self.settle is not None and not self.engine.has_work:
            self._gather(self.settle)
        with self._wake:
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            orders, self._orders = self._orders, []
            if self._stopping:
                return False
        for job in inbox:
            if job.engine is not self._engine:  # made for it just before it was replaced
                self._leaving.setdefault(job.engine, math.inf)
            job.engine.add_request(job.request, top_logprobs=job.top_logprobs, shaper=job.shaper)
            self._queued[job.request.id] = job
        for request_id in cancelled:
            if (found := self._jobs.get(request_id)) and found.engine.cancel(request_id) is not None:
                self._forget(found, "abort")
        for act, future in orders:
            act()
            future.set_result(None)
        self._let_go()
        return True

    def _gather(self, settle: Callable[[float], None]) -> None:
        """Wait for those that come together with the first request."""
        until = time.monotonic() + _GATHER_S
        while (left_s := until - time.monotonic()) > 0 and len(self._inbox) < self.engine.max_batch:
            count = len(self._inbox)
            settle(left_s)
            with self._wake:
                if len(self._inbox) == count:
                    self._wake.wait(min(count * _APART_S, _FAR_APART_S))
                if len(self._inbox) == count or self._stopping:
                    return

    def _note_started(self) -> None:
        """Remember of requests that have left the queue that they did so in this step."""
        if self._queued:
            waiting = {request_id for engine in self._engines for request_id in engine.waiting_ids}
            for request_id in self._queued.keys() - waiting:
                self._queued.pop(request_id).started_at = self._beat

    def _let_go(self) -> None:
        """Forget engines that were replaced and have nothing more to do, or no more time to do it in."""
        now = time.monotonic()
        for engine, until in list(self._leaving.items()):
            late = [job for job in list(self._jobs.values()) if job.engine is engine] if now >= until else []
            for job in late:
                if engine.cancel(job.request.id) is not None:
                    self._forget(job, "abort")
                    job.subscriber.deliver(Stopped("the model was replaced before the answer ended"))
            if not engine.has_work:
                with self._wake:
                    del self._leaving[engine]

    def _score_some(self) -> None:
        """Score waiting prompts up to a number of tokens, so that those that generate are not held up for long."""
        from tafkir.engine.prompt_scores import score_prompts

        taken: list[_Scoring] = []
        size = 0
        # Alone, where the company must make no difference.
        most = 0 if self.engine.batch_invariant else _SCORE_TOKENS
        engine = self._scorings[0].engine
        while self._scorings and self._scorings[0].engine is engine:
            if taken and size + len(self._scorings[0].token_ids) > most:
                break
            job = self._scorings.popleft()
            if job.future.set_running_or_notify_cancel():
                taken.append(job)
                size += len(job.token_ids)
        if not taken:
            return
        try:
            found = score_prompts(engine.decoder, [job.token_ids for job in taken], max(j.count for j in taken))
        except TafkirError as error:
            for job in taken:
                job.future.set_exception(error)
            return
        for job, scores in zip(taken, found, strict=True):
            job.future.set_result(scores)
            self.metrics.prompt_tokens.add(amount=len(job.token_ids))

    def _deliver(self, events: list[TokenEvent]) -> None:
        batches: dict[int, tuple[Subscriber, list[TokenEvent]]] = {}
        now = time.monotonic()
        if events:
            self.metrics.generation_tokens.add(amount=len(events))
            self.metrics.iteration.observe(len(events))
        for event in events:
            job = self._jobs[event.request_id]
            job.num_tokens += 1
            if job.num_tokens == 1:
                job.first_at = now
                job.metrics.prompt_tokens.add(amount=len(job.request.prompt_ids))
                job.metrics.ttft.observe(now - job.queued_at)
            else:
                job.metrics.inter_token.observe(now - job.last_at)
            job.last_at = now
            batches.setdefault(id(job.subscriber), (job.subscriber, []))[1].append(event)
            if event.finish_reason:
                self._forget(job, "abort" if event.finish_reason == "cancelled" else event.finish_reason)
        for subscriber, batch in batches.values():
            subscriber.deliver(batch)

    def _forget(self, job: Job, reason: str) -> None:
        with self._wake:
            del self._jobs[job.request.id]
        job.finish_reason = reason
        metrics = job.metrics
        metrics.finished.add(reason)
        metrics.request_prompt.observe(len(job.request.prompt_ids))
        metrics.request_generated.observe(job.num_tokens)
        if reason != "abort":
            metrics.latency.observe(job.last_at - job.queued_at)
            if job.num_tokens > 1:
                metrics.per_token.observe((job.last_at - job.first_at) / (job.num_tokens - 1))

    def _end_all(self, error: Exception) -> None:
        with self._wake:
            jobs, self._jobs, self._inbox = list(self._jobs.values()), {}, []
            scorings, self._scorings = list(self._scorings), deque()
        for subscriber in {id(job.subscriber): job.subscriber for job in jobs}.values():
            subscriber.deliver(error)
        for scoring in scorings:
            if scoring.future.set_running_or_notify_cancel():
                scoring.future.set_exception(error)
