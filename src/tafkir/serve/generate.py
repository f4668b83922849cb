"""One HTTP request through the worker: submit its choices, follow their tokens, drop them when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import Request as HttpRequest

from tafkir.engine.sequence import TokenEvent
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Request, SamplingParams
from tafkir.serve.errors import error_body, error_of
from tafkir.serve.responses import ResponseFormat, server_sent_event, usage_of
from tafkir.serve.stream import ChoiceStream, Delta
from tafkir.serve.worker import EngineWorker

__all__ = ["ClientLeft", "Generation", "Inbox", "choice_seed"]


logger = logging.getLogger(__name__)


class ClientLeft(Exception):
    """The client closed the connection."""


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of n choices: the request's own for the first, others made from it."""
    return seed if seed is None or choice == 0 else derive_seed(seed, "choice", choice)


class Inbox:
    """Carries events from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[TokenEvent] | Exception] = asyncio.Queue()

    def deliver(self, events: list[TokenEvent] | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)
        except RuntimeError:  # the loop has closed: nobody is left to read
            return

    async def get(self) -> list[TokenEvent]:
        events = await self._queue.get()
        if isinstance(events, Exception):
            raise events
        return events


async def _until_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True)
class Generation:
    """A submitted request.

    Attributes:
        prompt_tokens: of all prompts, each counted once.
        choices: one per prompt and sample, in the order of their indices.
    """

    worker: EngineWorker
    http: HttpRequest
    inbox: Inbox
    ids: list[str]
    choices: list[ChoiceStream]
    prompt_tokens: int

    @classmethod
    def submit(
        cls,
        worker: EngineWorker,
        http: HttpRequest,
        prompts: Sequence[tuple[tuple[int, ...], Sequence[SamplingParams]]],
        choices: Sequence[ChoiceStream],
        *,
        top_logprobs: int,
    ) -> Generation:
        """Queue every sample of every prompt.

        Raises:
            RequestError, CapacityError: a request could never run.
            Overloaded, Stopped: the server cannot take it.
        """
        name = uuid.uuid4().hex
        requests: list[Request] = []
        for ids, samples in prompts:
            requests += [Request(f"{name}-{len(requests) + j}", ids, params) for j, params in enumerate(samples)]
        inbox = Inbox()
        worker.submit(requests, inbox, top_logprobs=top_logprobs)
        prompt_tokens = sum(len(ids) for ids, _ in prompts)
        return cls(worker, http, inbox, [request.id for request in requests], list(choices), prompt_tokens)

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Per engine step, (choice index, what its token added). Whatever ends the loop, nothing keeps running.

        Raises:
            ClientLeft: the connection is closed.
            TafkirError, Stopped: the engine failed.
        """
        index_of = {request_id: index for index, request_id in enumerate(self.ids)}
        unfinished = set(self.ids)
        left = asyncio.create_task(_until_disconnect(self.http))
        try:
            while unfinished:
                got = asyncio.create_task(self.inbox.get())
                await asyncio.wait({got, left}, return_when=asyncio.FIRST_COMPLETED)
                if not got.done():
                    got.cancel()
                    raise ClientLeft
                step = []
                for event in got.result():
                    index = index_of[event.request_id]
                    step.append((index, self.choices[index].push(event)))
                    if event.finish_reason:
                        unfinished.discard(event.request_id)
                yield step
        finally:
            left.cancel()
            if unfinished:
                self.worker.cancel(list(unfinished))

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
        return format.whole(finished, usage_of(self.prompt_tokens, self.choices))

    async def stream(self, format: ResponseFormat, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; an error on the way is the last of them."""
        reported = [0] * len(self.choices)
        try:
            for index in range(len(self.choices)):
                if (opening := format.opening(index)) is not None:
                    yield server_sent_event(format.chunk([opening]))
            async for step in self.deltas():
                for index, delta in step:
                    if delta.empty:
                        continue
                    shown = self.choices[index].shown
                    yield server_sent_event(format.chunk([format.delta(index, delta, shown[reported[index] :])]))
                    reported[index] = len(shown)
            if include_usage:
                yield server_sent_event(format.chunk([], usage_of(self.prompt_tokens, self.choices)))
            yield server_sent_event("[DONE]")
        except ClientLeft:
            return
        except Exception as error:  # the server's edge: the headers are sent, so the stream itself tells of it
            logger.warning("a stream ended early: %s", error)
            yield server_sent_event(error_body(error_of(error)))
