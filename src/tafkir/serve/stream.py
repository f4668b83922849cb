"""From an engine's token events to what a client reads: text, reasoning apart from the answer, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tafkir.engine.sequence import TokenEvent
from tafkir.engine.text import StopBuffer, TextStream
from tafkir.records import FinishReason
from tafkir.serve.tools import HERMES, CallPart, ToolCallSplitter, ToolForm

__all__ = [
    "ChoiceStream",
    "Delta",
    "ReasoningSplitter",
    "TokenText",
    "chat_logprobs",
    "completion_logprobs",
    "token_name",
]

_START, _END = "<think>", "</think>"


class TokenText(Protocol):
    """What the server needs of a tokenizer to show tokens."""

    def decode(self, ids: Sequence[int], /) -> str: ...

    def token_bytes(self, id: int, /) -> bytes: ...


class ReasoningSplitter:
    """Tells the chain of thought from the answer while the text is still coming.

    Reasoning is what stands between a `<think>` at the very start and the first `</think>`; the line breaks that
    set the two apart belong to neither.
    """

    def __init__(self) -> None:
        self._state = "start"
        self._held = ""

    @property
    def reasoning(self) -> bool:
        """True while the chain of thought runs."""
        return self._state in ("thought_start", "thought")

    def push(self, text: str) -> tuple[str, str]:
        """The new reasoning and the new answer text that are certain by now."""
        self._held += text
        reasoning = answer = ""
        while True:
            state = self._state
            if state == "start":
                self._open()
            elif state == "thought_start":
                self._skip_newline("thought")
            elif state == "thought":
                reasoning += self._thought()
            elif state == "answer_start":
                self._skip_newline("answer")
            else:
                answer, self._held = answer + self._held, ""
            if self._state == state:
                return reasoning, answer

    def _open(self) -> None:
        text = self._held.lstrip()
        if text.startswith(_START):
            self._state, self._held = "thought_start", text[len(_START) :]
        elif not _START.startswith(text):
            self._state = "answer"

    def _skip_newline(self, following: str) -> None:
        if self._held:
            self._held = self._held.removeprefix("\n")
            self._state = following

    def _thought(self) -> str:
        thought, end, rest = self._held.partition(_END)
        if end:
            self._state, self._held = "answer_start", rest
            return thought.removesuffix("\n")
        # What may turn out to be the line break and the marker that end the thought is not shown yet.
        marker = "\n" + _END
        keep = 0
        for size in range(min(len(self._held), len(marker)), 0, -1):
            tail = self._held[-size:]
            if marker.startswith(tail) or _END.startswith(tail):
                keep = size
                break
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        return out

    def flush(self) -> tuple[str, str]:
        """Called at the end: what was held back, which did not become a marker."""
        out, self._held = self._held, ""
        return (out, "") if self._state == "thought" else ("", out)


class Delta(NamedTuple):
    """What one or several tokens add to a choice, which has shown so many tokens with them."""

    text: str = ""
    reasoning: str = ""
    content: str = ""
    finish_reason: FinishReason | None = None
    tool_calls: tuple[CallPart, ...] = ()
    num_shown: int = 0

    @property
    def empty(self) -> bool:
        return not (self.text or self.finish_reason)

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Delta:
        """What tokens that came one after another add together."""
        last = deltas[-1]
        return cls(
            "".join(delta.text for delta in deltas),
            "".join(delta.reasoning for delta in deltas),
            "".join(delta.content for delta in deltas),
            last.finish_reason,
            tuple(call for delta in deltas for call in delta.tool_calls),
            last.num_shown,
        )


class ChoiceStream:
    """The text of one choice as its tokens come.

    Args:
        tokenizer: decodes tokens.
        stop_ids: tokens that end a completion and are no part of its text.
        stops: stop strings; neither they nor what follows is shown.
        split_reasoning: whether to tell the chain of thought from the answer.
        split_tools: whether to take tool calls out of the answer.
        tool_form: how they are spelled.
    """

    def __init__(
        self,
        tokenizer: TokenText,
        stop_ids: Sequence[int],
        stops: Sequence[str],
        *,
        split_reasoning: bool,
        split_tools: bool = False,
        tool_form: ToolForm = HERMES,
    ) -> None:
        self._stream, self._buffer = TextStream(tokenizer.decode), StopBuffer(stops)
        self._stop_ids = frozenset(stop_ids)
        self._splitter = ReasoningSplitter() if split_reasoning else None
        self._tools = ToolCallSplitter(tool_form) if split_tools else None
        self._decoded = 0
        self.num_tokens = self.num_reasoning_tokens = 0
        self.num_drafted = self.num_accepted = 0
        self.shown: list[tuple[TokenEvent, int]] = []
        """Tokens that belong to the text, each with the offset of its first character."""
        self.sampled: list[tuple[TokenEvent, int]] = []
        """The same with the token that ended the text."""

    def push(self, event: TokenEvent) -> Delta:
        self.num_tokens += 1
        self.num_drafted += event.num_drafted
        self.num_accepted += event.num_accepted
        self.sampled.append((event, self._decoded))
        text = ""
        if not (event.finish_reason == "stop" and event.token_id in self._stop_ids):
            self.shown.append((event, self._decoded))
            new = self._stream.push(event.token_id)
            self._decoded += len(new)
            text = self._buffer.push(new)
        if event.finish_reason:
            text += self._buffer.flush()
        if self._splitter is None:
            return Delta(text, content=text, finish_reason=event.finish_reason, num_shown=len(self.shown))
        reasoning, content = self._splitter.push(text)
        self.num_reasoning_tokens += self._splitter.reasoning
        if event.finish_reason:
            last_reasoning, last_content = self._splitter.flush()
            reasoning, content = reasoning + last_reasoning, content + last_content
        if self._tools is None:
            return Delta(text, reasoning, content, event.finish_reason, num_shown=len(self.shown))
        content, calls = self._tools.push(content)
        if event.finish_reason:
            content += self._tools.flush()
        return Delta(text, reasoning, content, event.finish_reason, tuple(calls), len(self.shown))


def _token_entry(tokenizer: TokenText, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.decode([token_id]),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def chat_logprobs(tokenizer: TokenText, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = [
        {
            **_token_entry(tokenizer, event.token_id, event.logprob),
            "top_logprobs": [_token_entry(tokenizer, *pair) for pair in event.top],
        }
        for event, _ in shown
    ]
    return {"content": content, "refusal": None}


def token_name(tokenizer: TokenText, token_id: int) -> str:
    """A token's text, or its bytes as OpenAI spells them where it is no whole character: `bytes:\\xd9`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(tokenizer: TokenText, shown: Sequence[tuple[TokenEvent, int]]) -> dict[str, Any]:
    """The `logprobs` object of a plain completion's choice."""

    def name(token_id: int) -> str:
        return token_name(tokenizer, token_id)

    return {
        "tokens": [name(event.token_id) for event, _ in shown],
        "token_logprobs": [event.logprob for event, _ in shown],
        "top_logprobs": [{token_name(tokenizer, token): logprob for token, logprob in event.top} for event, _ in shown],
        "text_offset": [offset for _, offset in shown],
    }
