"""One HTTP request through the worker: submit its choices, follow their tokens, drop them when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
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
    _unfinished: dict[str, int] = field(init=False)
    _first: list[tuple[int, Delta]] | None = None
    _watch: asyncio.Task[None] | None = None
    _deadline: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self._unfinished = {request_id: index for index, request_id in enumerate(self.ids)}

    @property
    def timings(self) -> dict[str, float]:
        """What a finished request took, all choices together, under llama.cpp's names where it has them.

        `ttft_ms` runs from the entry into the queue to the first token, `predicted_ms` from there to the last one;
        the rate is that of the tokens after the first. Of `draft_n` drafted tokens `draft_n_accepted` were kept.
        """
        tokens, first_at = sum(choice.num_tokens for choice in self.choices), min(job.first_at for job in self.jobs)
        seconds = max(job.last_at for job in self.jobs) - first_at
        return {
            "ttft_ms": round(1000 * (first_at - self.jobs[0].queued_at), 3),
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
        whole: bool = False,
    ) -> Generation:
        """Queue every sample of every prompt, for the engine that they were made for; `whole` if nobody streams.

        Raises:
            RequestError, CapacityError: a request could never run.
            Overloaded, Stopped: the server cannot take it.
        """
        name = uuid.uuid4().hex
        requests: list[Request] = []
        for ids, samples in prompts:
            first = len(requests)
            requests += [Request(f"{name}-{first + j}", ids, s, priority=priority) for j, s in enumerate(samples)]
        inbox = Inbox(whole=whole)
        jobs = worker.submit(requests, inbox, top_logprobs=top_logprobs, shapers=shapers, engine=engine)
        prompt_tokens = sum(len(ids) for ids, _ in prompts)
        names = [request.id for request in requests]
        return cls(worker, http, inbox, names, list(choices), prompt_tokens, list(shapers), timeout_s, jobs, model)

    async def begin(self) -> Generation:
        """Wait for the first tokens, before a byte of a stream is sent: what fails until then has a status of its
        own, and a proxy may still ask another replica.

        Raises: as `deltas`.
        """
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(_until_disconnect(self.http))
        self._watch.add_done_callback(lambda _: self.inbox.stop(ClientLeft()))
        if self.timeout_s is not None:
            late = ApiError(504, f"the answer took longer than {self.timeout_s:g} s", code="deadline_exceeded")
            self._deadline = loop.call_later(self.timeout_s, self.inbox.stop, late)
        try:
            self._first = await self._step()
        except BaseException:
            self._close()
            raise
        return self

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Per engine step or several, (choice index, what a token added). Whatever ends it, nothing keeps running.

        Raises:
            ClientLeft: the connection is closed.
            ApiError: the time is over, or a choice cannot satisfy its request.
            TafkirError, Stopped: the engine failed.
        """
        if self._first is None:
            await self.begin()
        assert self._first is not None
        try:
            yield self._first
            while self._unfinished:
                yield await self._step()
        finally:
            self._close()

    async def _step(self) -> list[tuple[int, Delta]]:
        step = []
        for event in await self.inbox.get():
            index = self._unfinished[event.request_id]
            if event.finish_reason is not None:
                del self._unfinished[event.request_id]
                if event.finish_reason == "cancelled":
                    raise self._unsatisfiable(index)
            step.append((index, self.choices[index].push(event)))
        return step

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._unfinished:
            self.worker.cancel(list(self._unfinished))
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
                for index, delta in _joined(step):
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


def _joined(step: list[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """One delta a choice, where a step or several brought more."""
    if len(step) == 1:
        return step
    of_choice: dict[int, list[Delta]] = {}
    for index, delta in step:
        of_choice.setdefault(index, []).append(delta)
    return [(index, Delta.join(deltas)) for index, deltas in of_choice.items()]


def _named_event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n{server_sent_event(event)}"
