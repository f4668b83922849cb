"""Structured output through llguidance: JSON schemas, regular expressions, choices and Lark grammars."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafkir.serve.errors import ApiError

if TYPE_CHECKING:
    from tafkir.serve.schema import OutputRules

__all__ = ["Grammar", "GrammarCompiler", "check_schema"]

_MAX_BYTES, _MAX_DEPTH = 64 << 10, 48


class Grammar:
    """A grammar that follows one sequence; implements `engine.shaping.TokenConstraint`."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.error: str | None = None

    def copy(self) -> Grammar:
        """The same grammar for another sequence, at the same place."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self) -> bytes:
        bits: bytes = self._matcher.compute_bitmask()
        self._check()
        return bits

    def push(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.error = f"the output rules became too costly or contradict themselves: {self._matcher.get_error()}"


class GrammarCompiler:
    """Makes grammars for one tokenizer; what it needs is built when the first one is asked for.

    Args:
        folder: a checkpoint folder with tokenizer.json.
        end_id: the token that ends an answer.
    """

    def __init__(self, folder: Path, end_id: int) -> None:
        self._folder, self._end_id = folder, end_id
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, rules: OutputRules) -> Grammar:
        """A fresh grammar. Slow for large ones: call it off the event loop.

        Raises:
            ApiError: 400 for rules that are no grammar, too large, or ask for what is not done; 501 without llguidance.
        """
        llguidance = self._library()
        matcher = llguidance.LLMatcher
        if rules.json_ is not None:
            check_schema(rules.json_)
            if rules.json_ is False:
                raise _refusal("the schema false allows nothing")
            schema = {} if rules.json_ is True else rules.json_
            defaults = {"whitespace_flexible": False}
            return self._build(lambda: matcher.grammar_from_json_schema(schema, defaults=defaults))
        if rules.regex is not None:
            return self._build(lambda: matcher.grammar_from_regex(rules.regex))
        if rules.choice is not None:
            pattern = "|".join(re.escape(choice) for choice in rules.choice)
            return self._build(lambda: matcher.grammar_from_regex(pattern))
        return self.compile_lark(rules.grammar or "")

    def compile_lark(self, grammar: str) -> Grammar:
        """A grammar in llguidance's Lark. Raises as `compile`."""
        llguidance = self._library()
        return self._build(lambda: llguidance.LLMatcher.grammar_from_lark(grammar))

    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError:
            message = 'structured output needs llguidance: pip install "tafkir[serve]"'
            raise ApiError(501, message, param="response_format", code="not_installed") from None
        with self._lock:
            if self._tokenizer is None:
                text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
                self._tokenizer = llguidance.LLTokenizer(text, eos_token=self._end_id)
        return llguidance

    def _build(self, grammar: Any) -> Grammar:
        import llguidance

        try:
            matcher = llguidance.LLMatcher(self._tokenizer, grammar(), log_level=0)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refusal(str(error)) from None
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Grammar(matcher)


def _refusal(reason: str) -> ApiError:
    message = f"the output rules cannot be followed: {' '.join(reason.split())[:500]}"
    return ApiError(400, message, param="response_format", code="invalid_grammar")


def check_schema(schema: Any) -> None:
    """Raises ApiError for a schema that is larger or deeper than any that is meant."""
    todo = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise _refusal(f"the schema is nested more than {_MAX_DEPTH} deep")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(each, depth + 1) for each in inner]
    if (size := len(json.dumps(schema))) > _MAX_BYTES:
        raise _refusal(f"the schema has {size} bytes; at most {_MAX_BYTES} are read")
