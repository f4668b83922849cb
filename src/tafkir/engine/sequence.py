"""One request on its way through the engine, and the prompt that it shares with others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tafkir.engine.text import StopBuffer, TextStream
from tafkir.records import FinishReason, Request

if TYPE_CHECKING:
    from torch import Tensor

    from tafkir.engine.shaping import Shaper

__all__ = ["Prompt", "Sequence", "StopWatch", "TokenEvent"]


@dataclass(slots=True, eq=False)
class Prompt:
    """A distinct prompt in the cache: its row, the last token's hidden state, and how many sequences read it.

    `expert_ids` is what its tokens went to, int16 [P, MoE layers, active experts], where the engine records that;
    `state_PD` the hidden states of all its tokens, where a drafter wants them.
    """

    ids: tuple[int, ...]
    row: int
    users: int = 0
    hidden_D: Tensor | None = None
    expert_ids: Tensor | None = None
    state_PD: Tensor | None = None


class StopWatch:
    """Looks for stop strings in a sequence's text as its tokens come."""

    def __init__(self, stream: TextStream, stops: tuple[str, ...]) -> None:
        self._stream, self._buffer = stream, StopBuffer(stops)

    def push(self, token_id: int) -> bool:
        """True once the text holds a stop string."""
        self._buffer.push(self._stream.push(token_id))
        return self._buffer.matched is not None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with what the engine works out for it.

    Attributes:
        key: start of its random stream.
        limit: most tokens it may sample: max_tokens, or what the context leaves.
        stop_ids: token ids that end it.
        top_logprobs: how many alternatives to report with each token.
        watch: looks for stop strings; None without any.
        prompt: its row in the prompt store, once it runs.
        shaper: changes its logits before each draw.
        arrival: its place among all requests that the engine was given.
        kept_ids, kept_logprobs: what it had sampled before it had to give its room back; `key` and `limit` go on from
            there.
        blocks: of a paged cache, in the order of its tokens.
    """

    request: Request
    key: int
    limit: int
    stop_ids: tuple[int, ...]
    top_logprobs: int = 0
    watch: StopWatch | None = None
    prompt: Prompt | None = field(default=None, repr=False)
    shaper: Shaper | None = field(default=None, repr=False)
    arrival: int = 0
    kept_ids: tuple[int, ...] = ()
    kept_logprobs: tuple[float, ...] = ()
    blocks: list[int] = field(default_factory=list, repr=False)

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What the cache holds before the first token that is sampled here."""
        return self.request.prompt_ids + self.request.prefix_ids + self.kept_ids

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: priority, then arrival."""
        return self.request.priority, self.arrival


class TokenEvent(NamedTuple):
    """One sampled token of one request. `top` holds (token, logprob) pairs, the most probable first.

    The last token of a step that checked a draft says how many tokens were drafted, and how many of them were kept.
    """

    request_id: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    top: tuple[tuple[int, float], ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
