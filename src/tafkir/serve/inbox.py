"""Tokens on their way from the worker's thread to the coroutines that asked: few wake-ups of the loop for many."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

from tafkir.engine.sequence import TokenEvent

__all__ = ["Inbox", "waits_for"]

Delivery = list[TokenEvent] | Exception

# Rest after a hand-out, in seconds for each reader that it woke. What a piece of a stream costs, it costs the thread
# that steps the engine: 32 streams get one every 64 ms at most, however short a step is, and one alone gets its own.
_REST_S = 0.002
# Events that a reader of the whole answer lets come together before it looks at them.
_MANY = 256


class _Mail:
    """What is to be handed to inboxes of one event loop. `put` may be called on any thread.

    Attributes:
        _called: a look at what has come is on its way.
        _resting: a timer will hand out what has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: deque[tuple[Inbox, Delivery]] = deque()
        self._called = self._resting = self._urgent = False
        self._rest_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, inbox: Inbox, what: Delivery, urgent: bool) -> None:
        self._pending.append((inbox, what))
        if urgent:
            self._urgent = True
        # Whoever is on the way finds this, too: flags are reset before the look.
        if self._called or (self._resting and not urgent):
            return
        self._called = True
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop has closed: nobody is left to read
            return

    def _look(self) -> None:
        self._called = False
        if self._urgent or self._loop.time() >= self._rest_until:
            self._hand_out()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._rest_until, self._hand_out)
            self._resting = True

    def _hand_out(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._resting = self._urgent = False
        woken = 0
        while self._pending:
            inbox, what = self._pending.popleft()
            woken += inbox.take(what)
        self._rest_until = self._loop.time() + woken * _REST_S


_MAIL: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = WeakKeyDictionary()


def waits_for(loop: asyncio.AbstractEventLoop) -> Callable[[float], None]:
    """What waits, on another thread, until the loop has done what is ready now, at most so many seconds."""

    def wait(seconds: float) -> None:
        done = threading.Event()
        try:
            loop.call_soon_threadsafe(done.set)
        except RuntimeError:  # the loop has closed
            return
        done.wait(seconds)

    return wait


class Inbox:
    """Carries events from the worker's thread to one reader on the event loop, which made it.

    Args:
        whole: the reader wants the end of an answer, and is not woken for every token before.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._mail = _MAIL.setdefault(self._loop, _Mail(self._loop))
        self._whole, self._begun = whole, False
        self._kept: list[TokenEvent] = []
        self._events: list[TokenEvent] = []
        self._end: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def deliver(self, events: Delivery) -> None:
        """Called on the worker's thread. A first token, an end and an error are handed over at once."""
        urgent = isinstance(events, Exception) or any(event.finish_reason for event in events)
        if self._whole and not isinstance(events, Exception):
            self._kept += events
            if not urgent and len(self._kept) < _MANY:
                return
            events, self._kept = self._kept, []
        self._mail.put(self, events, urgent or not self._begun)
        self._begun = True

    def take(self, what: Delivery) -> bool:
        """Called on the loop: what `get` returns, or raises once all events are read. True where that wakes `get`."""
        if self._end is not None:
            return False
        if isinstance(what, Exception):
            self._end = what
        else:
            self._events += what
        return self._wake()

    def stop(self, why: Exception) -> None:
        """Called on the loop: let `get` raise at once, whatever has come."""
        self._events, self._end = [], why
        self._wake()

    def _wake(self) -> bool:
        if self._waiting is None or self._waiting.done():
            return False
        self._waiting.set_result(None)
        return True

    async def get(self) -> list[TokenEvent]:
        """Everything that has come since the last call: of several steps, where the reader is slower than the engine.

        Raises: what `take` or `stop` was given.
        """
        while not self._events:
            if self._end is not None:
                raise self._end
            self._waiting = self._loop.create_future()
            await self._waiting
        events, self._events = self._events, []
        return events
