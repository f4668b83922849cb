"""The model behind the routes: its name, its tokenizer, the thread that runs it, and what a request means for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from tafkir.checkpoint.fingerprint import checkpoint_fingerprint
from tafkir.checkpoint.manifest import MANIFEST_NAME
from tafkir.serve.errors import ApiError
from tafkir.serve.grammar import Grammar, GrammarCompiler, check_schema
from tafkir.serve.options import ServerOptions
from tafkir.serve.schema import ChatMessage, ChatRequest, GenerationRequest
from tafkir.serve.tools import ToolForm, form_of, offer_tools, to_message, tool_grammar
from tafkir.serve.worker import EngineWorker

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.engine.shaping import Shaper, Shaping, Thinking
    from tafkir.records import Message

__all__ = ["Served"]

# Shorter texts are tokenized at once: a thread costs more.
_LONG_TEXT = 20_000
_NO_THOUGHT = "<think>\n\n</think>\n"


@dataclass(frozen=True)
class Served:
    """What the routes need; another model is another one of these (`Live`)."""

    name: str
    path: Path
    created: int
    tokenizer: Tokenizer
    engine: Engine
    worker: EngineWorker
    options: ServerOptions

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Hash of the checkpoint, for clients that keep answers; None without a manifest, where it would take long."""
        return checkpoint_fingerprint(self.path) if (self.path / MANIFEST_NAME).exists() else None

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.path, self.tokenizer.turn_end_id)

    @functools.cached_property
    def tool_form(self) -> ToolForm:
        """How its chat template spells tool calls."""
        return form_of(getattr(self.tokenizer, "template", None))

    def messages(self, turns: Sequence[ChatMessage]) -> list[Message]:
        """A conversation as the chat format has it."""
        return [to_message(turn, self.tool_form) for turn in turns]

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(len(self.tokenizer.token_bytes(id)) for id in range(self.tokenizer.vocab_size))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any other model."""
        if name is not None and name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def room(self, ids: Sequence[int], param: str = "prompt") -> int:
        """Tokens that the context leaves for an answer. Raises ApiError 400 where it leaves none."""
        context = self.engine.max_context
        if len(ids) >= context:
            message = f"the prompt has {len(ids)} tokens; the context of {context} must leave room for an answer"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return context - len(ids)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ApiError 400 for one that cannot fit, before it costs anything."""
        if len(text) <= _LONG_TEXT:
            return self.tokenizer.encode(text)
        self._check_length(len(text))
        return await run_in_threadpool(self.tokenizer.encode, text)

    def _check_length(self, size: int) -> None:
        fewest, context = size // self._longest_token, self.engine.max_context
        if fewest >= context:
            message = f"the prompt has {fewest} tokens or more; the context of {context} must leave room for an answer"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")

    async def encode_chat(self, body: ChatRequest) -> list[int]:
        """Token ids of a conversation up to where the answer begins, tools and an empty chain of thought included."""
        messages = self.messages(body.messages)
        if body.tools and body.tool_choice != "none":
            messages = offer_tools(messages, body.tools, self.tool_form)
        size = sum(len(message.content) + len(message.reasoning or "") for message in messages)
        if size > _LONG_TEXT:
            self._check_length(size)
            return await run_in_threadpool(self.chat_ids, messages, body.thinking)
        return self.chat_ids(messages, body.thinking)

    def chat_ids(self, messages: Sequence[Message], thinking: bool | None) -> list[int]:
        """The same of a conversation as it stands; `thinking` False: with an empty chain of thought."""
        from tafkir.data.chat import encode_chat
        from tafkir.data.published_tokenizer import PublishedTokenizer

        if not isinstance(self.tokenizer, PublishedTokenizer):
            ids = encode_chat(self.tokenizer, messages)
            return ids + self.tokenizer.encode(_NO_THOUGHT) if thinking is False else ids
        if thinking and not self.tokenizer.can_think:
            raise ApiError(
                400, "this model's chat template knows no thinking", param="enable_thinking", code="invalid_value"
            )
        return self.tokenizer.encode_chat(messages, thinking=thinking)

    async def shapers(self, body: GenerationRequest, prompts: Sequence[tuple[int, ...]]) -> list[Shaper | None]:
        """What each choice's logits go through, n for each prompt.

        Raises:
            ApiError: a bias names no token, or the output rules cannot be followed.
        """
        from tafkir.engine.shaping import Shaper

        shaping = self._shaping(body)
        forced = body.forced_tools if isinstance(body, ChatRequest) else []
        bound = bool(forced) or body.rules is not None
        if shaping.is_neutral and not bound:
            return [None] * (len(prompts) * body.n)
        think_first = bound and isinstance(body, ChatRequest) and body.thinking is True
        grammar: Grammar | None = None
        if forced:
            for tool in forced:
                check_schema(tool.function.parameters)
            grammar = await run_in_threadpool(self.grammars.compile_lark, tool_grammar(forced, self.tool_form))
        elif body.rules is not None:
            grammar = await run_in_threadpool(self.grammars.compile, body.rules)
        return [
            Shaper(shaping, prompt, body.temperature, grammar and grammar.copy(), think_first=think_first)
            for prompt in prompts
            for _ in range(body.n)
        ]

    def _shaping(self, body: GenerationRequest) -> Shaping:
        from tafkir.engine.shaping import Shaping

        vocab = self.engine.decoder.config.vocab_size
        bias = {int(token): value for token, value in body.logit_bias.items()}
        if outside := [token for token in bias if token >= vocab]:
            message = f"logit_bias: token {outside[0]} does not exist; expected 0 to {vocab - 1}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        return Shaping(
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=bias,
            min_p=body.min_p,
            min_tokens=None if body.ignore_eos else body.min_tokens,
            end_ids=tuple(id for id in (*self.engine.eos_ids, *body.stop_token_ids) if id < vocab),
            thinking=self._thinking(body) if isinstance(body, ChatRequest) else None,
        )

    def _thinking(self, body: ChatRequest) -> Thinking | None:
        """What bounds the chain of thought; None for a model without the tokens that open and close one."""
        from tafkir.engine.shaping import Thinking

        try:
            start, end = (self.tokenizer.special_id(token) for token in ("<think>", "</think>"))
        except KeyError:
            if body.max_thinking_tokens is None:
                return None
            message = "this model has no tokens that open and close a chain of thought"
            raise ApiError(400, message, param="max_thinking_tokens", code="invalid_value") from None
        return Thinking(start, end, body.max_thinking_tokens)
