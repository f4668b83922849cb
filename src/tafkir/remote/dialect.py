"""What a kind of server must be told and how its answers are read: the part of a client that knows a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tafkir.errors import RolloutError
from tafkir.records import Request
from tafkir.remote.connection import Connection

__all__ = ["Body", "Dialect", "Sampled", "ServerFacts", "field_of", "stream_seed", "whole_prompt"]

Body = tuple[str, dict[str, Any]]
"""A path and what is posted to it."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself: the name that it serves its model by, and its context length, where it tells."""

    model: str
    max_context: int | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer as it came, before anything of it is believed.

    Attributes:
        logprobs: one per token, None where the server left it out.
        reason: the server's word for why the completion ended.
        counted: tokens that the server says it sampled.
        prompt_ids: the prompt as the server saw it.
        version: the weights that the server says it used.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    reason: str
    counted: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    version: str | None = None


class Dialect(Protocol):
    """One protocol. Reading raises RolloutError for an answer that lacks what was asked for."""

    def connect(self, connection: Connection) -> ServerFacts:
        """Ask who is there."""
        ...

    def encode(self, connection: Connection, facts: ServerFacts, text: str) -> list[int]:
        """The server's token ids of a text, without anything added."""
        ...

    def check(self, request: Request) -> None:
        """Raises RequestError for what the server cannot do with the log-probabilities that training needs."""
        ...

    def generation(self, request: Request, facts: ServerFacts, stop_ids: Sequence[int]) -> Body: ...

    def read(self, answer: Any, where: str) -> Sampled: ...

    def spread(self, facts: ServerFacts, prompt_ids: Sequence[int], temperature: float) -> Body:
        """One token with the log-probabilities of the most probable ones, to be read by `read_spread`."""
        ...

    def read_spread(self, answer: Any, where: str) -> list[float]: ...

    def scoring(self, token_ids: Sequence[int], facts: ServerFacts) -> Body: ...

    def read_scores(self, answer: Any, token_ids: Sequence[int], where: str) -> list[float | None]:
        """Log-probabilities of all tokens but the first."""
        ...

    def refresh(self, connection: Connection, folder: Path, version: int, timeout_s: float) -> None:
        """Let the server take the weights of a checkpoint folder; on return it samples with them. May be repeated."""
        ...


def field_of(answer: Any, path: Sequence[str | int], where: str) -> Any:
    """The value at a path of a JSON answer.

    Raises:
        RolloutError: it is not there; the message names the path.
    """
    value = answer
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            shown = ".".join(map(str, path))
            found = ", ".join(sorted(value)) if isinstance(value, Mapping) else type(value).__name__
            raise RolloutError(
                f"the answer has no {shown}", where=where, expected=f"{part!r} beside {found or 'nothing'}"
            ) from None
    return value


def whole_prompt(request: Request) -> tuple[list[int], int]:
    """The tokens to go on after, and how many more may be sampled."""
    ids = [*request.prompt_ids, *request.prefix_ids]
    return ids, request.params.max_tokens - len(request.prefix_ids)


def stream_seed(request: Request, bits: int) -> int | None:
    """The request's seed for a server that starts a stream at every request.

    A continuation takes another stream than its beginning: the server would repeat the draws otherwise.
    """
    seed = request.params.seed
    if seed is None:
        return None
    # An odd constant spreads the position over all bits (Knuth's multiplicative hash).
    return (seed ^ (len(request.prefix_ids) * 0x9E3779B97F4A7C15)) % (1 << bits)
