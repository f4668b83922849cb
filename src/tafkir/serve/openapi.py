"""What /openapi.json says beyond the types: statuses, rules that bind two fields, and the limits of this model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tafkir.serve.live import Live
from tafkir.serve.responses_api import PARTS, ResponsesRequest
from tafkir.serve.schema import COLDEST, HOTTEST, MAX_STOPS, ChatRequest, CompletionRequest, RequestBody
from tafkir.serve.served import Served

__all__ = ["describe_api"]

Schema = dict[str, Any]

_STATUSES = {
    400: "The request is not valid; the message names the field. Beside the schema's rules: the prompt must leave room "
    "in the context, output rules must be ones that can be followed, a named tool must be among the tools, and all "
    "choices of all prompts must fit the queue.",
    401: "No known API key.",
    404: "There is no such model or path.",
    408: "The body did not come in time.",
    429: "Too many requests of this caller; Retry-After says when to try again.",
    500: "The engine failed.",
    501: "Structured output is not installed.",
    503: "Too many requests wait, or the server stops; Retry-After says when to try again.",
    504: "The answer took longer than the server allows.",
}
_ALWAYS, _POSTED = (400, 408, 500), (404, 429, 501, 503, 504)
_NULL: Schema = {"type": "null"}
_GIVEN: Schema = {"not": _NULL}
_TEXT: Schema = {"type": "string", "minLength": 1}
_EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_STREAM: Schema = {"text/event-stream": {"schema": _EVENT}}
_NUMBER: Schema = {"type": "integer"}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe_api(app: FastAPI, live: Live) -> None:
    """Make the app's OpenAPI text say what this server does with this model."""

    def openapi() -> Schema:
        served = live.served
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        parts = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        parts["Error"] = _ERROR
        _describe_bodies(parts, served)
        if served.options.api_keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _describe_operation(operation, path, method == "post", bool(served.options.api_keys))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_operation(operation: Schema, path: str, posted: bool, keys: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path == "/v1/embeddings":
        del responses["200"]
    elif path in _ANSWERS:
        responses["200"]["content"] = _ANSWERS[path]
    guarded = keys and path.startswith(("/v1", "/tokenize", "/detokenize"))
    if guarded:
        operation["security"] = [{"key": []}]
    named = (404,) if "{name}" in path else ()
    for status in (*_ALWAYS, *((401,) if guarded else ()), *(_POSTED if posted else named)):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        answer: Schema = {"description": _STATUSES[status], "content": content}
        if status in (429, 503):
            answer["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
        responses.setdefault(str(status), answer)


def _answer(kind: str, *fields: str) -> Schema:
    required = ["id", "object", *fields]
    schema = {"type": "object", "required": required, "properties": {"object": {"const": kind}}}
    return {"application/json": {"schema": schema}, **_STREAM}


_ANSWERS = {
    "/v1/chat/completions": _answer("chat.completion", "created", "model", "choices", "usage"),
    "/v1/completions": _answer("text_completion", "created", "model", "choices", "usage"),
    "/v1/responses": _answer("response", "created_at", "model", "status", "output", "usage"),
}


# --- bodies ----------------------------------------------------------------------------------------------------


def _array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _any(*choices: Schema) -> Schema:
    return {"anyOf": list(choices)}


def _object(required: Sequence[str] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required)}


def _is(field: str, *values: Any) -> Schema:
    """The field stands at one of the values; where null is one, it may be left out."""
    rule: Schema = {"properties": {field: {"enum": list(values)}}}
    return rule if None in values else {**rule, "required": [field]}


_WHOLE = _is("stream", None, False)
_UNBOUND = {
    "properties": {
        "structured_outputs": _NULL,
        "response_format": _any(_NULL, {"properties": {"type": {"const": "text"}}, "required": ["type"]}),
    }
}
_SOME_TOOLS = {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]}
_FREE_TOOLS = _is("tool_choice", None, "none", "auto")
# A schema comes with the type that announces it, and only with it.
_SCHEMA_AS_ANNOUNCED = {
    name: _any(
        {"required": ["type", name], "properties": {"type": {"const": "json_schema"}, name: _GIVEN}},
        {"properties": {"type": {"enum": ["text", "json_object"]}, name: _NULL}},
    )
    for name in ("json_schema", "schema")
}
_GENERATION_RULES = [
    _any(_is("stream_options", None), _is("stream", True)),
    _any(_is("prompt_logprobs", None), _WHOLE),
]
_CHAT_RULES = [
    *_GENERATION_RULES,
    _any(_is("top_logprobs", None, 0), _is("logprobs", True)),
    _any(_FREE_TOOLS, {"allOf": [_SOME_TOOLS, _UNBOUND]}),
]
_COMPLETION_RULES = [
    *_GENERATION_RULES,
    _any(_is("return_token_ids", None, False), _WHOLE),
    _any(_is("echo", None, False), {"allOf": [_WHOLE, _is("return_token_ids", None, False)]}),
    _any({"properties": {"max_tokens": _any(_NULL, {"minimum": 1})}}, _is("echo", True)),
]


def _describe_bodies(parts: dict[str, Schema], served: Served) -> None:
    vocab = served.engine.decoder.config.vocab_size
    model = {"enum": [served.name, None]}
    temperature = _any({"const": 0}, {"type": "number", "minimum": COLDEST, "maximum": HOTTEST})
    ids = _array({**_NUMBER, "minimum": 0, "maximum": vocab - 1}, minItems=1, maxItems=served.engine.max_context - 1)
    shared = {
        "model": model,
        "temperature": temperature,
        "stop": _any(_TEXT, _array(_TEXT, maxItems=MAX_STOPS)),
        "logit_bias": _biases(vocab),
    }
    prompt = _any(_TEXT, ids, _array(_TEXT, minItems=1), _array(ids, minItems=1))
    _describe(parts["ChatRequest"], ChatRequest, shared, _CHAT_RULES)
    _describe(parts["CompletionRequest"], CompletionRequest, {**shared, "prompt": prompt}, _COMPLETION_RULES)
    own = {"model": model, "temperature": temperature, "input": _input()}
    _describe(parts["ResponsesRequest"], ResponsesRequest, own, [_any(_FREE_TOOLS, _SOME_TOOLS)])
    part = _object(["type", "text"], type={"const": "text"}, text={"type": "string"})
    message = parts["ChatMessage"]
    message["properties"]["content"] = _any({"type": "string"}, _array({**part, "additionalProperties": False}))
    _nullable(message)
    message["properties"]["name"] = {}
    for name, rule in (("ResponseFormatRequest", "json_schema"), ("_Format", "schema")):
        parts[name]["allOf"] = [_SCHEMA_AS_ANNOUNCED[rule]]
    rules = parts["OutputRules"]
    rules["properties"]["regex"]["format"] = "regex"
    rules["oneOf"] = [_only_one(name, rules["properties"]) for name in rules["properties"]]
    text = parts["TokenizeRequest"]
    text["properties"]["model"] = model
    text["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": _GIVEN, "messages": {"maxItems": 0}}},
        {"required": ["messages"], "properties": {"prompt": _NULL, "messages": {"minItems": 1}}},
    ]
    tokens = _array({**_NUMBER, "minimum": 0, "maximum": served.tokenizer.vocab_size - 1})
    parts["DetokenizeRequest"]["properties"] |= {"model": model, "tokens": tokens}


def _only_one(name: str, fields: Mapping[str, Schema]) -> Schema:
    """That field is given, and none of the others."""
    return {"required": [name], "properties": {**dict.fromkeys(fields, _NULL), name: _GIVEN}}


def _describe(schema: Schema, body: type[RequestBody], own: Mapping[str, Schema], rules: Sequence[Schema]) -> None:
    fields = schema["properties"]
    for name, described in own.items():
        kept = {key: fields[name][key] for key in ("title", "description") if key in fields[name]}
        fields[name] = kept | described
    _nullable(schema)
    fields |= {name: {} for name in sorted(body.without_effect)}
    fields |= {name: {"enum": [None, *values]} for name, values in body.neutral.items()}
    schema["allOf"] = list(rules)


def _nullable(schema: Schema) -> None:
    """Null leaves a field out, where it is not required."""
    fields = schema["properties"]
    for name in fields.keys() - set(schema.get("required", ())):
        if _NULL not in fields[name].get("anyOf", ()) and None not in fields[name].get("enum", ()):
            fields[name] = _any(fields[name], _NULL)


def _input() -> Schema:
    """What may stand in a conversation of the responses API; items carry more, which is not read."""
    part = _object(["type", "text"], type={"enum": sorted(PARTS)}, text={"type": "string"})
    content = _any({"type": "string"}, _array(part), _NULL)
    roles = {"enum": ["system", "developer", "user", "assistant", "tool"]}
    items = (
        _object(["role"], type={"const": "message"}, role=roles, content=content),
        _object(
            ["type", "name", "arguments"],
            type={"const": "function_call"},
            name={"type": "string"},
            arguments={"type": "string"},
        ),
        _object(["type"], type={"const": "function_call_output"}, output=content),
    )
    return _any({"type": "string"}, _array(_any(*items), minItems=1))


def _biases(vocab: int) -> Schema:
    """Biases by token id; a pattern says which numbers are below the vocabulary's size."""
    last = str(vocab - 1)
    same_length = [
        f"{last[:i]}[{1 if i == 0 else 0}-{int(last[i]) - 1}][0-9]{{{len(last) - i - 1}}}"
        for i in range(len(last))
        if int(last[i]) > (1 if i == 0 else 0)
    ]
    shorter = [f"[1-9][0-9]{{0,{len(last) - 2}}}"] if len(last) > 1 else []
    pattern = "^(0|" + "|".join([*shorter, *same_length, last]) + ")$"
    return {
        "type": "object",
        "propertyNames": {"pattern": pattern},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
    }
