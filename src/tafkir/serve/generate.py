"""One HTTP request through the worker: submit its choices, follow their tokens, drop them when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from tafkir.recipe.seeds import derive_seed
from tafkir.records import Request, SamplingParams
from tafkir.serve.errors import ApiError, error_body, error_of
from tafkir.serve.inbox import Inbox
from tafkir.serve.jobs import Job
from tafkir.serve.responses import ResponseFormat, server_sent_event, usage_of
from tafkir.serve.responses_api import ResponseEvents
from tafkir.serve.stream import ChoiceStream, Delta
from tafkir.serve.worker import EngineWorker

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine
    from tafkir.engine.shaping import Shaper

__all__ = ["ClientLeft", "Generation", "Prompt", "choice_seed"]

Prompt = tuple[tuple[int, ...], Sequence[SamplingParams]]
"""Token ids, and how to sample each of the choices that continue them."""

logger = logging.getLogger(__name__)


class ClientLeft(Exception):
    """The client closed the connection."""


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of n choices: the request's own for the first, others made from it."""
    return seed if seed is None or choice == 0 else derive_seed(seed, "choice", choice)


async def _until_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True)
class Generation:
    """A submitted request.

    Attributes:
        prompt_tokens: of all prompts, each counted once.
        choices: one per prompt and sample, in the order of their indices.
        shapers: what bends each choice's logits.
        timeout_s: seconds until what still runs is cancelled; None sets no limit.
        jobs: the worker's record of each choice.
        model: its name.
        began, first_at, last_at: when it was queued, and when its first and its newest token came, in seconds.
    """

    worker: EngineWorker
    http: HttpRequest
    inbox: Inbox
    ids: list[str]
    choices: list[ChoiceStream]
    prompt_tokens: int
    shapers: list[Shaper | None]
    timeout_s: float | None
    jobs: list[Job]
    model: str
    began: float = field(default_factory=time.monotonic)
    first_at: float = 0.0
    last_at: float = 0.0
    _begun: tuple[list[tuple[int, Delta]], AsyncGenerator[list[tuple[int, Delta]], None]] | None = None

    @property
    def timings(self) -> dict[str, float]:
        """What a finished request took, all choices together, under llama.cpp's names where it has them.

        `ttft_ms` runs from the entry into the queue to the first token, `predicted_ms` from there to the last one;
        the rate is that of the tokens after the first. Of `draft_n` drafted tokens `draft_n_accepted` were kept.
        """
        tokens, seconds = sum(choice.num_tokens for choice in self.choices), self.last_at - self.first_at
        return {
            "ttft_ms": round(1000 * (self.first_at - self.began), 3),
            "predicted_n": tokens,
            "predicted_ms": round(1000 * seconds, 3),
            "predicted_per_second": round((tokens - 1) / seconds, 3) if seconds > 0 else 0.0,
            "draft_n": sum(choice.num_drafted for choice in self.choices),
            "draft_n_accepted": sum(choice.num_accepted for choice in self.choices),
        }

    @classmethod
    def submit(
        cls,
        worker: EngineWorker,
        http: HttpRequest,
        prompts: Sequence[Prompt],
        choices: Sequence[ChoiceStream],
        *,
        top_logprobs: int,
        shapers: Sequence[Shaper | None],
        timeout_s: float | None = None,
        priority: int = 0,
        engine: Engine | None = None,
        model: str = "",
    ) -> Generation:
        """Queue every sample of every prompt, for the engine that they were made for.

        Raises:
            RequestError, CapacityError: a request could never run.
            Overloaded, Stopped: the server cannot take it.
        """
        name = uuid.uuid4().hex
        requests: list[Request] = []
        for ids, samples in prompts:
            first = len(requests)
            requests += [Request(f"{name}-{first + j}", ids, s, priority=priority) for j, s in enumerate(samples)]
        inbox = Inbox()
        jobs = worker.submit(requests, inbox, top_logprobs=top_logprobs, shapers=shapers, engine=engine)
        prompt_tokens = sum(len(ids) for ids, _ in prompts)
        names = [request.id for request in requests]
        return cls(worker, http, inbox, names, list(choices), prompt_tokens, list(shapers), timeout_s, jobs, model)

    async def begin(self) -> Generation:
        """Wait for the first tokens, before a byte of a stream is sent: what fails until then has a status of its
        own, and a proxy may still ask another replica.

        Raises: as `deltas`.
        """
        steps = self._steps()
        self._begun = await anext(steps), steps
        return self

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Per engine step or several, (choice index, what a token added). Whatever ends it, nothing keeps running.

        Raises:
            ClientLeft: the connection is closed.
            ApiError: the time is over, or a choice cannot satisfy its request.
            TafkirError, Stopped: the engine failed.
        """
        if self._begun is None:
            await self.begin()
        assert self._begun is not None
        first, steps = self._begun
        async with aclosing(steps):
            yield first
            async for step in steps:
                yield step

    async def _steps(self) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        loop = asyncio.get_running_loop()
        deadline = None if self.timeout_s is None else loop.time() + self.timeout_s
        index_of = {request_id: index for index, request_id in enumerate(self.ids)}
        unfinished = set(self.ids)
        left = asyncio.create_task(_until_disconnect(self.http))
        left.add_done_callback(lambda _: self.inbox.take(ClientLeft()))
        try:
            while unfinished:
                try:
                    async with asyncio.timeout_at(deadline):
                        events = await self.inbox.get()
                except TimeoutError:
                    message = f"the answer took longer than {self.timeout_s:g} s"
                    raise ApiError(504, message, code="deadline_exceeded") from None
                step = []
                self.last_at = time.monotonic()
                self.first_at = self.first_at or self.last_at
                for event in events:
                    index = index_of[event.request_id]
                    if event.finish_reason == "cancelled":
                        unfinished.discard(event.request_id)
                        raise self._unsatisfiable(index)
                    step.append((index, self.choices[index].push(event)))
                    if event.finish_reason:
                        unfinished.discard(event.request_id)
                yield step
        finally:
            left.cancel()
            if unfinished:
                self.worker.cancel(list(unfinished))
            self._trace()

    def _trace(self) -> None:
        if (tracer := self.worker.tracer) is None:
            return
        error = sys.exception()
        # A reader that stops in the middle closes the generator: then the client has left.
        failure = None if error is None else str(error)
        if isinstance(error, ClientLeft | GeneratorExit):
            failure = "the client left"
        operation = "text_completion" if self.http.url.path == "/v1/completions" else "chat"
        request_id = self.http.state.request_id
        tracer.record(operation, self.model, self.jobs, self.http.headers, request_id, self.prompt_tokens, failure)

    def _unsatisfiable(self, index: int) -> ApiError:
        shaper = self.shapers[index]
        reason = shaper.error if shaper is not None and shaper.error else "the choice was cancelled"
        return ApiError(400, f"choice {index} cannot go on: {reason}", code="unsatisfiable")

    async def respond(self, events: ResponseEvents) -> dict[str, Any]:
        """The complete answer of the responses API."""
        async for step in self.deltas():
            for _, delta in step:
                events.push(delta)
        events.close(usage_of(self.prompt_tokens, self.choices))
        return events.response

    async def follow(self, events: ResponseEvents) -> AsyncIterator[str]:
        """The events of the responses API as they come; an error on the way is the last of them."""
        try:
            for event in events.open():
                yield _named_event(event)
            async for step in self.deltas():
                for _, delta in step:
                    for event in events.push(delta):
                        yield _named_event(event)
            for event in events.close(usage_of(self.prompt_tokens, self.choices)):
                yield _named_event(event)
        except ClientLeft:
            return
        except Exception as error:  # the server's edge: the headers are sent, so the stream itself tells of it
            logger.warning("a stream ended early: %s", error)
            yield _named_event(events.failure(error_body(error_of(error))["error"]))

    async def whole(self, format: ResponseFormat) -> dict[str, object]:
        """Wait for every choice; the complete answer."""
        collected: list[list[Delta]] = [[] for _ in self.choices]
        async for step in self.deltas():
            for index, delta in step:
                collected[index].append(delta)
        finished = [
            format.choice(index, deltas, stream)
            for index, (deltas, stream) in enumerate(zip(collected, self.choices, strict=True))
        ]
        return format.whole(finished, usage_of(self.prompt_tokens, self.choices), timings=self.timings)

    async def stream(self, format: ResponseFormat, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; an error on the way is the last of them."""
        reported = [0] * len(self.choices)
        try:
            for index in range(len(self.choices)):
                if (opening := format.opening(index)) is not None:
                    yield server_sent_event(format.chunk([opening]))
            async for step in self.deltas():
                chunks = []
                for index, delta in step:
                    if delta.empty:
                        continue
                    until = delta.num_shown
                    shown = self.choices[index].shown[reported[index] : until]
                    chunks.append(format.event(format.delta(index, delta, shown)))
                    reported[index] = until
                if chunks:
                    yield "".join(chunks)
            if include_usage:
                usage = usage_of(self.prompt_tokens, self.choices)
                yield server_sent_event(format.chunk([], usage, timings=self.timings))
            yield server_sent_event("[DONE]")
        except ClientLeft:
            return
        except Exception as error:  # the server's edge: the headers are sent, so the stream itself tells of it
            logger.warning("a stream ended early: %s", error)
            yield server_sent_event(error_body(error_of(error)))


def _named_event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n{server_sent_event(event)}"
