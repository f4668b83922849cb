"""What the OpenAI API lets a client ask for, as far as Tafkir does it. Anything else is refused by name.

A field that would change the output is never ignored: it is either done, or an error, or stands at the value that
means nothing (`tools: []`, `frequency_penalty: 0`). Fields that never change the output are accepted and dropped.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tafkir.records import SamplingParams

__all__ = [
    "COLDEST",
    "FUNCTION_NAME",
    "HOTTEST",
    "MAX_CHOICES",
    "MAX_STOPS",
    "MAX_TOOLS",
    "ChatMessage",
    "ChatRequest",
    "Closed",
    "CompletionRequest",
    "DetokenizeRequest",
    "FunctionTool",
    "GenerationRequest",
    "OutputRules",
    "RequestBody",
    "ResponseFormatRequest",
    "StreamOptions",
    "TokenizeRequest",
]

MAX_CHOICES = 64
MAX_STOPS = 16
_MAX_BIASES = 1024
MAX_TOOLS = 128
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
# Below it, logits divided by the temperature leave what float32 holds.
COLDEST, HOTTEST = 1e-3, 100

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# The first bad item ends the check: a million of them would each become an error to report.
TokenIds = Annotated[list[int], FailFast()]

_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}


def _integers(value: Any, depth: int = 2) -> Any:
    """JSON's 5.0 as 5, which fields of both kinds of number take; also in a list, or a list of lists."""
    if type(value) is float and value.is_integer():
        return int(value)
    if depth and type(value) is list and not {int, str}.issuperset(map(type, value)):
        return [_integers(each, depth - 1) for each in value]
    return value


class Closed(BaseModel):
    """A part of a request: no field but its own, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, body: Any) -> Any:
        return {name: _integers(value) for name, value in body.items()} if isinstance(body, Mapping) else body


class RequestBody(Closed):
    """A body in which null leaves a field out, and a field that is not done is refused by name.

    Attributes:
        neutral: fields that are not done, with the values (beside null) that ask for nothing.
        without_effect: fields that may hold anything, since no answer depends on them.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]]
    without_effect: ClassVar[frozenset[str]]

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
            elif name in cls.neutral:
                if value is not None and not any(
                    type(value) is type(idle) and value == idle for idle in cls.neutral[name]
                ):
                    raise PydanticCustomError(
                        "unsupported_parameter", "{param} is not supported by this server", {"param": name}
                    )
            elif name not in cls.without_effect:
                near = difflib.get_close_matches(name, cls.model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PydanticCustomError(
                    "unknown_parameter", "{param} is not a known field{hint}", {"param": name, "hint": hint}
                )
        return kept


class StreamOptions(Closed):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _JsonSchema(Closed):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormatRequest(Closed):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_where_one_is_named(self) -> ResponseFormatRequest:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type json_schema, and only with it")
        return self


class OutputRules(Closed):
    """What an answer must look like, in vLLM's spelling (`structured_outputs`): exactly one of the four."""

    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=10_000)
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)
    grammar: str | None = Field(None, max_length=100_000)

    @model_validator(mode="after")
    def _exactly_one(self) -> OutputRules:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("exactly one of json, regex, choice and grammar must be given")
        return self


class GenerationRequest(RequestBody):
    """What chat and plain completions share."""

    neutral, without_effect = _NEUTRAL, _WITHOUT_EFFECT

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=HOTTEST, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=1 << 31, description="0 or -1: no cut.")
    seed: int | None = None
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31, description="Where requests wait, lower ones go first.")
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOPS)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=_MAX_BIASES)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities of the prompt, as vLLM's.")
    response_format: ResponseFormatRequest | None = None
    structured_outputs: OutputRules | None = None

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

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"{value} is neither 0 (greedy) nor at least {COLDEST}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biases_of_tokens(cls, value: dict[str, float]) -> dict[str, float]:
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and str(int(token)) == token):
                raise ValueError(f"{token[:20]!r} is no token id")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} is {bias}; expected -100 to 100")
        return value

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> GenerationRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "invalid_value", "prompt_logprobs needs stream=false", {"param": "prompt_logprobs"}
            )
        return self

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
            stop_token_ids=tuple(self.stop_token_ids),
        )

    @property
    def rules(self) -> OutputRules | None:
        """What binds the answer, by either of its names."""
        if self.structured_outputs is not None or self.response_format is None:
            return self.structured_outputs
        if self.response_format.json_schema is not None:
            return OutputRules(json=self.response_format.json_schema.json_schema)
        return OutputRules(json={"type": "object"}) if self.response_format.type == "json_object" else None


class _TextPart(Closed):
    type: Literal["text"]
    text: str


class _FunctionCall(Closed):
    name: str
    arguments: str


class _ToolCall(Closed):
    id: str = ""
    type: Literal["function"] = "function"
    function: _FunctionCall


class _Function(Closed):
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class FunctionTool(Closed):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function


class _FunctionName(Closed):
    name: str


class _NamedTool(Closed):
    type: Literal["function"]
    function: _FunctionName


class _TemplateOptions(Closed):
    enable_thinking: bool | None = None


class ChatMessage(Closed):
    """One turn of a conversation. `content` may be a string or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

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


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; wins over max_tokens.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    enable_thinking: bool | None = Field(None, description="False: answer at once. True: think, then answer.")
    max_thinking_tokens: int | None = Field(None, ge=0)
    chat_template_kwargs: _TemplateOptions | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | _NamedTool = "auto"
    parallel_tool_calls: bool = True

    @property
    def thinking(self) -> bool | None:
        """`enable_thinking`, by either of its names."""
        if self.enable_thinking is None and self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.enable_thinking

    @property
    def forced_tools(self) -> list[FunctionTool]:
        """The tools of which one must be called; none where the model may choose."""
        if isinstance(self.tool_choice, _NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @model_validator(mode="after")
    def _tools_to_choose_from(self) -> ChatRequest:
        forced = isinstance(self.tool_choice, _NamedTool) or self.tool_choice == "required"
        if forced and not self.forced_tools:
            raise PydanticCustomError("invalid_value", "tool_choice names no tool of tools", {"param": "tool_choice"})
        if forced and self.rules is not None:
            message = "response_format and a forced tool_choice exclude each other"
            raise PydanticCustomError("invalid_value", message, {"param": "response_format"})
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid_value", "top_logprobs needs logprobs=true", {"param": "top_logprobs"})
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0, description="0 only with echo: nothing is generated.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = Field(False, description="Show the prompt before the answer, with logprobs its own as well.")
    return_token_ids: bool = Field(False, description="Report token ids, the stop token and its log-probability too.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts_or_ids(cls, value: Any) -> Any:
        """Refuse a mixed list at its first odd item: a million of them would each become an error to report."""
        if isinstance(value, list) and value:
            kind = type(value[0])
            flat = kind in (int, str) and all(type(item) is kind for item in value)
            if not flat and not all(type(ids) is list and all(type(id) is int for id in ids) for ids in value):
                raise ValueError("expected a text, token ids, or a list of either")
        return value

    @model_validator(mode="after")
    def _token_ids_come_whole(self) -> CompletionRequest:
        if self.return_token_ids and self.stream:
            raise PydanticCustomError(
                "invalid_value", "return_token_ids needs stream=false", {"param": "return_token_ids"}
            )
        return self

    @model_validator(mode="after")
    def _echo_comes_whole(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("invalid_value", "max_tokens=0 needs echo=true", {"param": "max_tokens"})
        if self.echo and (self.stream or self.return_token_ids):
            raise PydanticCustomError(
                "invalid_value", "echo needs stream=false and return_token_ids=false", {"param": "echo"}
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(Closed):
    """Body of POST /tokenize, as vLLM has it: a text, to which nothing is added, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("invalid_value", "one of prompt and messages is needed", {"param": "prompt"})
        return self


class DetokenizeRequest(Closed):
    """Body of POST /detokenize, as vLLM has it. Special tokens are shown."""

    model: str | None = None
    tokens: TokenIds = Field(max_length=1_000_000)
