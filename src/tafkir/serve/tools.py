"""Tool calls as chat templates spell them: how functions are offered, called and answered, and calls told from text.

Hermes' form, which is Qwen's: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, with results in a user turn
as `<tool_response>`; and DeepSeek's, between tokens of its own, with fences (V3, R1) or without (V3.1).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tafkir.records import Message
from tafkir.serve.schema import ChatMessage, FunctionTool

__all__ = [
    "HERMES",
    "CallPart",
    "ToolCallSplitter",
    "ToolForm",
    "form_of",
    "join_calls",
    "offer_tools",
    "to_message",
    "tool_grammar",
]


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a template spells a call: `start opening NAME middle ARGUMENTS closing end`, all calls between `around`.

    Attributes:
        head: matches from behind `start` to the arguments' brace, with the name as its group.
        result: what stands around a result, in a user turn.
    """

    start: str
    opening: str
    middle: str
    closing: str
    end: str
    head: re.Pattern[str]
    around: tuple[str, str] = ("", "")
    result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")

    def spell(self, name: str, arguments: str) -> str:
        """The text of one call; `arguments` is JSON."""
        return f"{self.start}{self.opening}{name}{self.middle}{arguments}{self.closing}{self.end}"


_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
HERMES = ToolForm("<tool_call>", '\n{"name": "', '", "arguments": ', "}\n", "</tool_call>", _JSON_HEAD)
_DEEPSEEK_HEAD = re.compile(r"(?:function<｜tool▁sep｜>)?([\w.-]+)(?:<｜tool▁sep｜>)?\s*(?:```json\s*)?(?=\{)")
_DEEPSEEK_MARKS = {
    "around": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "result": ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
}
_BEGIN, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_FENCED = ToolForm(
    _BEGIN, f"function{_SEPARATOR}", "\n```json\n", "\n```", _CALL_END, _DEEPSEEK_HEAD, **_DEEPSEEK_MARKS
)
_DEEPSEEK = ToolForm(_BEGIN, "", _SEPARATOR, "", _CALL_END, _DEEPSEEK_HEAD, **_DEEPSEEK_MARKS)


def form_of(template: str | None) -> ToolForm:
    """The form that a chat template speaks; Hermes' where it names none, or where there is no template."""
    if template is None or _BEGIN not in template:
        return HERMES
    return _DEEPSEEK_FENCED if "```json" in template else _DEEPSEEK


@dataclass(frozen=True, slots=True)
class CallPart:
    """What comes of a call at a time: its id and the function's name with the first part, then more of its arguments.

    `index` counts the calls of a choice; the arguments of all parts together are JSON text.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def as_json(self) -> dict[str, Any]:
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


def join_calls(parts: Iterable[CallPart]) -> list[dict[str, Any]]:
    """The whole calls, as a finished message has them."""
    calls: dict[int, list[CallPart]] = {}
    for part in parts:
        calls.setdefault(part.index, []).append(part)
    whole = []
    for own in calls.values():
        function = {"name": own[0].name, "arguments": "".join(part.arguments for part in own)}
        whole.append({"id": own[0].id, "type": "function", "function": function})
    return whole


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def to_message(message: ChatMessage, form: ToolForm = HERMES) -> Message:
    """A turn as the chat format has it: calls of the past and their results become text."""
    if message.role == "tool":
        before, after = form.result
        return Message("user", f"{before}{message.content}{after}")
    called = ((_compact(call.function.name)[1:-1], call.function.arguments) for call in message.tool_calls)
    calls = "\n".join(form.spell(name, _tidy(arguments)) for name, arguments in called)
    if calls:
        calls = calls.join(form.around)
    content = "\n".join(part for part in (message.content, calls) if part)
    role = "system" if message.role == "developer" else message.role
    return Message(role, content, message.reasoning_content)


def offer_tools(messages: Sequence[Message], tools: Sequence[FunctionTool], form: ToolForm = HERMES) -> list[Message]:
    """The conversation with the functions offered at the end of its opening system turn."""
    offer = _render_tools(tools, form)
    if messages[0].role != "system":
        return [Message("system", offer), *messages]
    text = f"{messages[0].content}\n\n{offer}" if messages[0].content else offer
    return [Message("system", text), *messages[1:]]


def _render_tools(tools: Sequence[FunctionTool], form: ToolForm) -> str:
    lines = "\n".join(_compact(tool.model_dump(exclude_none=True)) for tool in tools)
    opening = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
    )
    if form is HERMES:
        example = '{"name": <function-name>, "arguments": <args-json-object>}'
        return (
            f"{opening}For each function call, return a json object with function name and arguments within "
            f"{form.start}{form.end} XML tags:\n{form.start}\n{example}\n{form.end}"
        )
    example = form.spell("<function-name>", "<args-json-object>").join(form.around)
    return f"{opening}For each function call, return its name and a json object of its arguments:\n{example}"


def _tidy(arguments: str) -> str:
    """JSON text in one spelling; what is none becomes a string."""
    try:
        return _compact(json.loads(arguments or "{}"))
    except ValueError:
        return _compact(arguments)


def tool_grammar(tools: Sequence[FunctionTool], form: ToolForm = HERMES) -> str:
    """A grammar in llguidance's Lark for exactly one call of one of the functions."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    names = " | ".join(f"call_{i}" for i in range(len(tools)))
    before, after = form.around
    rules = [f"start: {quoted(before + form.start + form.opening)} ({names}) {quoted(form.closing + form.end + after)}"]
    for i, tool in enumerate(tools):
        schema = {**tool.function.parameters, "x-guidance": {"whitespace_flexible": False}}
        rules.append(f"call_{i}: {quoted(tool.function.name + form.middle)} arguments_{i}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"


class _Object:
    """Follows a JSON object's text to its last brace."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def feed(self, text: str) -> tuple[int, bool]:
        """How many characters belong to it, and whether it ends with them, or breaks off at what cannot be JSON."""
        for i, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return i + 1, True
            elif character in "<`":
                return i, True
        return len(text), False


class ToolCallSplitter:
    """Takes calls out of an answer's text while it is still coming, their arguments as they come.

    What begins like a call and turns out to be none before its arguments begin stays text, so that nothing is lost.

    Args:
        form: of the calls.
    """

    def __init__(self, form: ToolForm = HERMES) -> None:
        self._form, self._held, self._state = form, "", "text"
        self._object = _Object()
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """Text that is certain to be no part of a call, and what has come of calls."""
        self._held += text
        out = ""
        parts: list[CallPart] = []
        while True:
            before = self._state, self._held
            if self._state in ("text", "after"):
                out += self._read_text()
            elif self._state == "head":
                out += self._read_head(parts)
            elif self._state == "arguments":
                self._read_arguments(parts)
            else:
                self._read_tail()
            if before == (self._state, self._held):
                return out, parts

    def _read_text(self) -> str:
        if self._state == "after" and self._held:  # the line break after a call belongs to it
            self._held, self._state = self._held.removeprefix("\n"), "text"
        marks = [mark for mark in (self._form.start, *self._form.around) if mark]
        found = min(((at, mark) for mark in marks if (at := self._held.find(mark)) >= 0), default=None)
        if found is None:
            longest = max(map(len, marks)) - 1
            ends = range(min(longest, len(self._held)), 0, -1)
            keep = next((n for n in ends if any(mark.startswith(self._held[-n:]) for mark in marks)), 0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            return out
        at, mark = found
        out, self._held = self._held[:at], self._held[at + len(mark) :]
        if mark == self._form.start:
            self._state = "head"
        return out

    def _read_head(self, parts: list[CallPart]) -> str:
        form = self._form
        if head := form.head.match(self._held):
            parts.append(self._begin(head[1], ""))
            self._held, self._state, self._object = self._held[head.end() :], "arguments", _Object()
            return ""
        body, end, after = self._held.partition(form.end)
        if not end:
            return ""
        self._held, self._state = after, "text"
        if (call := _parse(body)) is None:
            return form.start + body + end
        parts.append(self._begin(*call))
        self.num_calls, self._state = self.num_calls + 1, "after"
        return ""

    def _begin(self, name: str, arguments: str) -> CallPart:
        return CallPart(self.num_calls, arguments, f"call_{uuid.uuid4().hex[:24]}", name)

    def _read_arguments(self, parts: list[CallPart]) -> None:
        size, ended = self._object.feed(self._held)
        if size:
            parts.append(CallPart(self.num_calls, self._held[:size]))
        self._held = self._held[size:]
        if ended:
            self._state, self.num_calls = "tail", self.num_calls + 1

    def _read_tail(self) -> None:
        start, end = self._form.start, self._form.end
        before, found, after = self._held.partition(end)
        if (at := before.find(start)) >= 0:  # the next call begins: this one's end was left out
            self._held, self._state = self._held[at:], "text"
        elif found:
            self._held, self._state = after, "after"
        else:
            self._held = self._held[1 - max(len(start), len(end)) :]

    def flush(self) -> str:
        """Called at the end: what began like a call and is none."""
        out = {"text": self._held, "after": self._held, "head": self._form.start + self._held}.get(self._state, "")
        self._held, self._state = "", "text"
        return out


def _parse(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call in JSON whose parts come in another order, or whose arguments are a string."""
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    return name, arguments if isinstance(arguments, str) else _compact(arguments)
