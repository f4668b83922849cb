"""What an evaluation asks of a model, and what comes back: one seam for checkpoints and for endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from tafkir.records import Message, SamplingParams

__all__ = ["Answerer", "Ask", "RemoteAnswerer", "Reply", "Watch", "split_thinking"]

_THINK_START, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted. `prompt` is what `Answerer.read` made of the messages."""

    key: str
    prompt: Any
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or why there is none.

    Attributes:
        text: without the thinking, where the model keeps it apart.
        reasoning: the thinking; empty where it stands in `text`.
        tokens, prompt_tokens: 0 where the endpoint does not say.
        failure: "error" or "timeout" where there is no answer; `reason` says why.
        retries: attempts that failed before this one.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str = "stop"
    latency_s: float = 0.0
    failure: Literal["", "error", "timeout"] = ""
    reason: str = ""
    retries: int = 0


class Watch(Protocol):
    """Who keeps what is sent and what comes back; see `tafkir.eval.journal.Journal`."""

    def asked(self, request_id: str, key: str) -> None: ...

    def received(self, request_id: str, key: str, reply: Reply) -> None: ...

    def reply_to(self, request_id: str) -> Reply | None: ...


class Answerer(Protocol):
    """A model under evaluation.

    `name` is what tables call it; `fingerprint` hashes all that its answers depend on but the request itself.
    """

    name: str
    fingerprint: str

    def read(self, messages: Sequence[Message]) -> Any:
        """The prompt as the model gets it, as plain JSON: token ids, or messages."""
        ...

    def answers(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Yield every answer as it comes. `asks` is drawn from as the model can take more, from one thread at a time.

        Raises:
            RolloutError: the endpoint is gone, or refuses the key or the model; what came before stands.
        """
        ...

    def score(self, text: str) -> tuple[float, int]:
        """The sum of the log-probabilities of a text's tokens, without a chat template, and how many they are.

        Raises:
            RequestError: the model only answers.
        """
        ...

    def close(self) -> None:
        """Let go of memory and connections."""
        ...


@runtime_checkable
class RemoteAnswerer(Answerer, Protocol):
    """A model elsewhere, to which a request that was sent is sent: asking again costs somebody something.

    One in this process needs no such care: with the same seed it gives the same answer.
    """

    def watch(self, watch: Watch) -> None:
        """Tell this one of every request and answer, at once, and ask it first."""
        ...


def split_thinking(text: str) -> tuple[str, str]:
    """The thinking, and what follows the last `</think>`; a chain of thought that never ends leaves no answer."""
    head, mark, tail = text.rpartition(_THINK_END)
    if not mark:
        before, opened, rest = text.partition(_THINK_START)
        return (rest, before) if opened else ("", text)
    return head.replace(_THINK_START, "", 1).strip("\n"), tail.lstrip("\n")
