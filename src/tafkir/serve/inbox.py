"""Tokens on their way from the worker's thread to the coroutines that asked: one wake-up of the loop for a step."""

from __future__ import annotations

import asyncio
from collections import deque
from weakref import WeakKeyDictionary

from tafkir.engine.sequence import TokenEvent

__all__ = ["Inbox"]

Delivery = list[TokenEvent] | Exception


class _Mail:
    """What is to be handed to inboxes of one event loop. `put` may be called on any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: deque[tuple[Inbox, Delivery]] = deque()
        self._called = False

    def put(self, inbox: Inbox, what: Delivery) -> None:
        self._pending.append((inbox, what))
        if self._called:  # the call that is on its way finds this, too: it resets the flag before it looks
            return
        self._called = True
        try:
            self._loop.call_soon_threadsafe(self._hand_out)
        except RuntimeError:  # the loop has closed: nobody is left to read
            return

    def _hand_out(self) -> None:
        self._called = False
        while self._pending:
            inbox, what = self._pending.popleft()
            inbox.take(what)


_MAIL: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = WeakKeyDictionary()


class Inbox:
    """Carries events from the worker's thread to one reader on the event loop, which made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._mail = _MAIL.setdefault(self._loop, _Mail(self._loop))
        self._events: list[TokenEvent] = []
        self._end: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def deliver(self, events: Delivery) -> None:
        """Called on the worker's thread."""
        self._mail.put(self, events)

    def take(self, what: Delivery) -> None:
        """Called on the loop: what `get` returns, or raises once all events are read."""
        if isinstance(what, Exception):
            self._end = self._end or what
        else:
            self._events += what
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> list[TokenEvent]:
        """Everything that has come since the last call: several steps, where the reader was slower than the engine."""
        while not self._events:
            if self._end is not None:
                raise self._end
            self._waiting = self._loop.create_future()
            await self._waiting
        events, self._events = self._events, []
        return events
