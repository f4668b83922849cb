"""The JSON that answers a generation request, whole or in chunks, for the chat and the plain API alike."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tafkir.engine.sequence import TokenEvent
from tafkir.serve.stream import ChoiceStream, Delta, TokenText, chat_logprobs, completion_logprobs
from tafkir.serve.tools import join_calls

__all__ = ["ChatFormat", "CompletionFormat", "ResponseFormat", "server_sent_event", "usage_of"]


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def server_sent_event(data: dict[str, Any] | str) -> str:
    """One event of a stream; text stays readable (no ASCII escapes)."""
    return f"data: {data if isinstance(data, str) else _encode(data)}\n\n"


def usage_of(prompt_tokens: int, choices: Sequence[ChoiceStream]) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many choices share it, and a stop token counts as generated."""
    generated = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "completion_tokens_details": {"reasoning_tokens": sum(choice.num_reasoning_tokens for choice in choices)},
    }


class ResponseFormat(ABC):
    """How one of the two APIs spells its answer.

    Args:
        request_id: of the whole answer.
        model: the served model's name.
        tokenizer: shows tokens in log-probabilities.
        logprobs: whether to report them.
    """

    object_name: str
    chunk_name: str

    def __init__(self, request_id: str, model: str, tokenizer: TokenText, *, logprobs: bool) -> None:
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._event_head: str | None = None
        self.prompt_logprobs: list[Any] | None = None
        """Those of each choice's prompt, where they were asked for."""

    def _finish(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return choice if self.prompt_logprobs is None else {**choice, "prompt_logprobs": self.prompt_logprobs[index]}

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The answer; `more` are fields beside OpenAI's, such as `timings`."""
        return {**self._head, "object": self.object_name, "choices": list(choices), "usage": usage, **more}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """A part of the answer, with the same."""
        return {**self._head, "object": self.chunk_name, "choices": list(choices), "usage": usage, **more}

    def event(self, choice: dict[str, Any]) -> str:
        """The event of a chunk with one choice: what is the same in all of them is written once."""
        if self._event_head is None:
            head = _encode({**self._head, "object": self.chunk_name})
            self._event_head = f'data: {head[:-1]},"choices":['
        return f'{self._event_head}{_encode(choice)}],"usage":null}}\n\n'

    def stamp(self, fingerprint: str | None) -> None:
        """Say which weights answer: the first half of the checkpoint's hash, as OpenAI's `system_fingerprint`."""
        self._head["system_fingerprint"] = fingerprint and fingerprint[:32]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk that comes before any token."""
        return None

    @abstractmethod
    def delta(self, index: int, delta: Delta, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any]:
        """The choice of a chunk; `shown` are the tokens since the last one."""

    @abstractmethod
    def choice(self, index: int, deltas: Sequence[Delta], stream: ChoiceStream) -> dict[str, Any]:
        """A finished choice."""


class ChatFormat(ResponseFormat):
    """`chat.completion`; the chain of thought comes as `reasoning_content`."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, tokenizer: TokenText, *, logprobs: bool) -> None:
        super().__init__(request_id, model, tokenizer, logprobs=logprobs)
        self._called: set[int] = set()
        """Choices whose chunks have told of tool calls."""

    def _logprobs_of(self, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, shown) if self._logprobs else None

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, delta: Delta, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any]:
        body: dict[str, Any] = {}
        if delta.reasoning:
            body["reasoning_content"] = delta.reasoning
        if delta.content:
            body["content"] = delta.content
        if delta.tool_calls:
            body["tool_calls"] = [part.as_json() for part in delta.tool_calls]
            self._called.add(index)
        logprobs = self._logprobs_of(shown) if shown else None
        reason = _reason(delta, index in self._called)
        return {"index": index, "delta": body, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, deltas: Sequence[Delta], stream: ChoiceStream) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.content for delta in deltas)}
        if reasoning := "".join(delta.reasoning for delta in deltas):
            message["reasoning_content"] = reasoning
        calls = join_calls(part for delta in deltas for part in delta.tool_calls)
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"].strip() or None
        choice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_of(stream.shown),
            "finish_reason": _reason(deltas[-1], bool(calls)),
        }
        return self._finish(index, choice)


def _reason(last: Delta, called: bool) -> str | None:
    return "tool_calls" if called and last.finish_reason == "stop" else last.finish_reason


class CompletionFormat(ResponseFormat):
    """`text_completion`: the text as it is, `<think>` included.

    Args:
        prompts: the prompt of every choice; given, a choice reports token ids, as vLLM does for `return_token_ids`.
    """

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: TokenText,
        *,
        logprobs: bool,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(request_id, model, tokenizer, logprobs=logprobs)
        self._prompts = prompts

    def _choice(self, index: int, text: str, shown: Sequence[tuple[TokenEvent, int]], reason: Any) -> dict[str, Any]:
        logprobs = completion_logprobs(self._tokenizer, shown) if self._logprobs and shown else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, delta: Delta, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any]:
        return self._choice(index, delta.text, shown, delta.finish_reason)

    def choice(self, index: int, deltas: Sequence[Delta], stream: ChoiceStream) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        if self._prompts is None:
            return self._finish(index, self._choice(index, text, stream.shown, deltas[-1].finish_reason))
        choice = self._choice(index, text, stream.sampled, deltas[-1].finish_reason)
        token_ids = [event.token_id for event, _ in stream.sampled]
        return self._finish(index, choice | {"token_ids": token_ids, "prompt_token_ids": list(self._prompts[index])})
