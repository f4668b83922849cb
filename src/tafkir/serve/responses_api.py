"""OpenAI's responses API over the same generation as chat: its request, its answer, its events. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tafkir.serve.errors import ApiError
from tafkir.serve.schema import FUNCTION_NAME, HOTTEST, MAX_TOOLS, ChatRequest, Closed, RequestBody
from tafkir.serve.stream import Delta

__all__ = ["PARTS", "ResponseEvents", "ResponsesRequest"]

# Values that ask for nothing, or for what happens anyhow.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "previous_response_id": (),
    "reasoning": ({},),
    "store": (True, False),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_WITHOUT_EFFECT = frozenset({"metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key"})


class _Format(Closed):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _a_schema_where_one_is_named(self) -> _Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("schema comes with type json_schema, and only with it")
        return self


class _Text(Closed):
    format: _Format | None = None


class _Tool(Closed):
    type: Literal["function"]
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _NamedTool(Closed):
    type: Literal["function"]
    name: str


class ResponsesRequest(RequestBody):
    """Body of POST /v1/responses."""

    neutral, without_effect = _NEUTRAL, _WITHOUT_EFFECT

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=HOTTEST, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False
    text: _Text | None = None
    tools: list[_Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | _NamedTool = "auto"
    parallel_tool_calls: bool = True

    def to_chat(self) -> ChatRequest:
        """The same request as a chat.

        Raises:
            ApiError: an item of the input or a tool has no place in a chat.
        """
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [_message(item) for item in self.input]
        body: dict[str, Any] = {"messages": messages, "temperature": self.temperature, "top_p": self.top_p}
        if self.text and (format := self.text.format):
            body["response_format"] = {"type": format.type}
            if format.type == "json_schema":
                body["response_format"]["json_schema"] = {"schema": format.json_schema}
        if self.tools:
            functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools]
            body["tools"] = [{"type": "function", "function": function} for function in functions]
        body |= {"tool_choice": self.tool_choice, "stream": self.stream}
        if isinstance(self.tool_choice, _NamedTool):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]).replace("messages", "input")
            param = (first.get("ctx") or {}).get("param") or place
            raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


PARTS = frozenset({"input_text", "output_text", "text"})


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """A chat message of an input item; what is none is left for the chat's checks to refuse."""
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": str(item.get("call_id", "")), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "content": _text_parts(item.get("output"))}
    if kind != "message":
        raise ApiError(400, f"input: items of type {str(kind)[:50]!r} are not supported", param="input")
    return {"role": item.get("role"), "content": _text_parts(item.get("content"))}


def _text_parts(content: Any) -> Any:
    """Content with its parts of text as a chat spells them; others are left for the chat's checks to refuse."""

    def is_text(part: Any) -> bool:
        return isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in PARTS

    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part.get("text")} if is_text(part) else part for part in content]


class ResponseEvents:
    """Turns the deltas of one choice into the events of a response, and the response that they add up to."""

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        asked, choice = request.text.format if request.text else None, request.tool_choice
        format = asked.model_dump(by_alias=True, exclude_none=True) if asked else None
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "model": model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": format or {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, _NamedTool) else choice,
            "tools": [tool.model_dump() for tool in request.tools],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        self._number = -1
        self._open: dict[str, Any] | None = None
        self._reason: str | None = None

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number, **fields}

    def open(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        response = {**self.response, "output": []}
        return [self._event("created", response=response), self._event("in_progress", response=response)]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """Events of what some tokens added."""
        events = []
        if delta.reasoning:
            events += self._grow("reasoning", delta.reasoning)
        if delta.content:
            events += self._grow("message", delta.content)
        for part in delta.tool_calls:
            if part.name is not None:
                events += self._close_item()
                item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id, "name": part.name}
                events += self._add({**item, "arguments": "", "status": "in_progress"})
            if part.arguments and self._open is not None:
                self._open["arguments"] += part.arguments
                place = {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}
                events.append(self._event("function_call_arguments.delta", **place, delta=part.arguments))
        self._reason = delta.finish_reason or self._reason
        return events

    def _add(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = item
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        return [self._event("output_item.added", output_index=index, item={**item, **_no_content(item)})]

    def _grow(self, kind: str, text: str) -> list[dict[str, Any]]:
        events = []
        if self._open is None or self._open["type"] != kind:
            events += self._close_item()
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {"type": kind, "id": f"rs_{uuid.uuid4().hex}", "summary": []}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                item = {"type": kind, "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
            events += self._add({**item, "status": "in_progress", "content": [part]})
            events.append(self._event("content_part.added", **self._place(), part=dict(part)))
        assert self._open is not None
        self._open["content"][0]["text"] += text
        events.append(self._event(f"{self._open['content'][0]['type']}.delta", **self._place(), delta=text))
        return events

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1, "content_index": 0}

    def _close_item(self, status: str = "completed") -> list[dict[str, Any]]:
        item = self._open
        if item is None:
            return []
        events = []
        if item["type"] == "function_call":
            place = {"item_id": item["id"], "output_index": len(self.response["output"]) - 1}
            events.append(self._event("function_call_arguments.done", **place, arguments=item["arguments"]))
        else:
            part = item["content"][0]
            events.append(self._event(f"{part['type']}.done", **self._place(), text=part["text"]))
            events.append(self._event("content_part.done", **self._place(), part=dict(part)))
        item["status"] = status
        index = len(self.response["output"]) - 1
        events.append(self._event("output_item.done", output_index=index, item=dict(item)))
        self._open = None
        return events

    def close(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The last events; the very last holds the whole response."""
        status = "incomplete" if self._reason == "length" else "completed"
        events = self._close_item(status)
        details = usage["completion_tokens_details"]
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": details["reasoning_tokens"]},
                "total_tokens": usage["total_tokens"],
            },
        }
        return [*events, self._event(status, response=self.response)]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event that ends a stream which went wrong."""
        reason = {"code": error["code"] or "server_error", "message": error["message"]}
        return self._event("failed", response={**self.response, "status": "failed", "error": reason})


def _no_content(item: dict[str, Any]) -> dict[str, Any]:
    return {"content": []} if "content" in item else {}
