"""Tool calls in the Hermes form of Qwen's chat template: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

The functions stand in a system turn, results come back as `<tool_response>` in a user turn.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tafkir.records import Message
from tafkir.serve.schema import ChatMessage, FunctionTool

__all__ = ["ToolCall", "ToolCallSplitter", "offer_tools", "to_message", "tool_grammar"]

_START, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def to_message(message: ChatMessage) -> Message:
    """A turn as the chat format has it: calls of the past and their results become text."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    calls = [_render_call(call.function.name, call.function.arguments) for call in message.tool_calls]
    content = "\n".join(part for part in (message.content, *calls) if part)
    role = "system" if message.role == "developer" else message.role
    return Message(role, content, message.reasoning_content)


def offer_tools(messages: Sequence[Message], tools: Sequence[FunctionTool]) -> list[Message]:
    """The conversation with the functions offered at the end of its opening system turn."""
    offer = _render_tools(tools)
    if messages[0].role != "system":
        return [Message("system", offer), *messages]
    text = f"{messages[0].content}\n\n{offer}" if messages[0].content else offer
    return [Message("system", text), *messages[1:]]


def _render_tools(tools: Sequence[FunctionTool]) -> str:
    lines = "\n".join(_compact(tool.model_dump(exclude_none=True)) for tool in tools)
    example = '{"name": <function-name>, "arguments": <args-json-object>}'
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{_START}{_END} XML tags:\n{_START}\n{example}\n{_END}"
    )


def _render_call(name: str, arguments: str) -> str:
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = arguments
    return f"{_START}\n{_compact({'name': name, 'arguments': parsed})}\n{_END}"


def tool_grammar(tools: Sequence[FunctionTool]) -> str:
    """A grammar in llguidance's Lark for exactly one call of one of the functions."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        }
        for tool in tools
    ]
    branches = " | ".join(f"call_{i}" for i in range(len(calls)))
    rules = "\n".join(f"call_{i}: %json {json.dumps(call)}" for i, call in enumerate(calls))
    return f'start: "{_START}\\n" ({branches}) "\\n{_END}"\n{rules}\n'


class ToolCallSplitter:
    """Takes finished calls out of an answer's text while it is still coming.

    What stands between the two marks and is no call (no JSON, no name) stays text, so that nothing is lost.
    """

    def __init__(self) -> None:
        self._held = ""
        self._line_ends = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text that is certain to be no part of a call, and the calls that are whole by now."""
        self._held += text
        out = ""
        calls: list[ToolCall] = []
        while True:
            if self._line_ends and self._held:  # the line break after a call belongs to it
                self._held, self._line_ends = self._held.removeprefix("\n"), False
            before, start, rest = self._held.partition(_START)
            if not start:
                keep = next((n for n in range(len(_START) - 1, 0, -1) if before.endswith(_START[:n])), 0)
                out += before[: len(before) - keep]
                self._held = before[len(before) - keep :]
                return out, calls
            out, self._held = out + before, start + rest
            body, end, after = rest.partition(_END)
            if not end:
                return out, calls
            self._held = after
            if (call := _parse(body)) is None:
                out += start + body + end
            else:
                calls.append(call)
                self._line_ends = True

    def flush(self) -> str:
        """Called at the end: what began like a call and is none."""
        out, self._held = self._held, ""
        return out


def _parse(body: str) -> ToolCall | None:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    text = arguments if isinstance(arguments, str) else _compact(arguments)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, text)
