"""What the OpenAI API lets a client ask for, as far as Tafkir does it. Anything else is refused by name.

A field that would change the output is never ignored: it is either done, or an error, or stands at the value that
means nothing (`tools: []`, `frequency_penalty: 0`). Fields that never change the output are accepted and dropped.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tafkir.records import Message, SamplingParams

__all__ = [
    "MAX_CHOICES",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "GenerationRequest",
    "StreamOptions",
    "TokenizeRequest",
]

MAX_CHOICES = 64
_MAX_STOPS = 16

_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of the OpenAI API that are not done, with the values (beside null) that ask for nothing."""


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 or -1: no cut.")
    seed: int | None = None
    stop: list[str] = Field(default_factory=list, max_length=_MAX_STOPS)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields:
                if value is not None:  # null is OpenAI's way to leave a field out
                    kept[name] = value
            elif name in _NEUTRAL:
                if value is not None and value not in _NEUTRAL[name]:
                    raise PydanticCustomError(
                        "unsupported_parameter", "{param} is not supported by this server", {"param": name}
                    )
            elif name not in _WITHOUT_EFFECT:
                near = difflib.get_close_matches(name, cls.model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PydanticCustomError(
                    "unknown_parameter", "{param} is not a known field{hint}", {"param": name, "hint": hint}
                )
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid_value", "stream_options needs stream=true", {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, seed: int | None) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            max_tokens=max_tokens,
            seed=seed,
            stop=tuple(self.stop),
        )


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation. `content` may be a string or a list of text parts."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str = ""
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        # `name` labels a speaker; the chat format has no place for it, and an answer may not depend on it.
        return {key: value for key, value in body.items() if value is not None and key != "name"}

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "".join(_TextPart.model_validate(part).text for part in value)

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return Message(role, self.content, self.reasoning_content)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; wins over max_tokens.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid_value", "top_logprobs needs logprobs=true", {"param": "top_logprobs"})
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=_MAX_STOPS)
    return_token_ids: bool = Field(False, description="Report token ids, the stop token and its log-probability too.")

    @model_validator(mode="after")
    def _token_ids_come_whole(self) -> CompletionRequest:
        if self.return_token_ids and self.stream:
            raise PydanticCustomError(
                "invalid_value", "return_token_ids needs stream=false", {"param": "return_token_ids"}
            )
        return self

    def sampling(self, max_tokens: int, seed: int | None) -> SamplingParams:
        return replace(super().sampling(max_tokens, seed), stop_token_ids=tuple(self.stop_token_ids))

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize, as vLLM has it. No token is ever added to a text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
