"""A sequence on its way through the worker, and who asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tafkir.records import Request
from tafkir.serve.metrics import ServerMetrics

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine
    from tafkir.engine.sequence import TokenEvent
    from tafkir.engine.shaping import Shaper

__all__ = ["Job", "Subscriber"]


class Subscriber(Protocol):
    """Who asked: gets the events of its requests, or the error that ended them. Called on the worker's thread."""

    def deliver(self, events: list[TokenEvent] | Exception) -> None: ...


@dataclass(slots=True)
class Job:
    """A sequence on its way. Times are seconds that never go back; 0 has not come yet."""

    request: Request
    top_logprobs: int
    subscriber: Subscriber
    shaper: Shaper | None
    engine: Engine
    metrics: ServerMetrics
    queued_at: float
    first_at: float = 0.0
    last_at: float = 0.0
    num_tokens: int = 0
    started_at: float = 0.0
    """When it left the engine's queue."""
    finish_reason: str | None = None
