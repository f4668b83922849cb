"""Checks a request before any of it runs, so that a bad one never disturbs the others."""

from __future__ import annotations

import math

from tafkir.errors import RequestError
from tafkir.records import Request, SamplingParams

__all__ = ["MAX_TOP_LOGPROBS", "check_params", "check_request"]

MAX_TOP_LOGPROBS = 20


def _fail(what: str, where: str, expected: str, fix: str | None = None) -> None:
    raise RequestError(what, where=where, expected=expected, fix=fix)


def check_params(params: SamplingParams, where: str = "params") -> None:
    """Raises RequestError that names the first parameter out of range."""
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        _fail(f"temperature={params.temperature}", where, "a finite number, 0 (greedy) or larger")
    if not 0 < params.top_p <= 1:
        _fail(f"top_p={params.top_p}", where, "more than 0, at most 1", "leave it at 1 for no cut")
    if params.top_k < 0:
        _fail(f"top_k={params.top_k}", where, "0 (no cut) or larger")
    if params.max_tokens < 1:
        _fail(f"max_tokens={params.max_tokens}", where, "1 or larger")
    if not all(params.stop):
        _fail("an empty stop string", where, "at least one character")


def check_request(
    request: Request, *, vocab_size: int, max_context: int, can_decode: bool, top_logprobs: int = 0
) -> None:
    """Raises RequestError when the request cannot run.

    Args:
        vocab_size: token ids must lie below it.
        max_context: the prompt and one sampled token must fit in it.
        can_decode: whether stop strings can be looked for.
        top_logprobs: alternatives to report with each token, at most `MAX_TOP_LOGPROBS`.
    """
    where = f"request {request.id!r}"
    check_params(request.params, where)
    if not request.prompt_ids:
        _fail("the prompt is empty", where, "at least one token")
    if len(request.prefix_ids) >= request.params.max_tokens:
        _fail(
            f"{len(request.prefix_ids)} tokens are sampled already",
            where,
            f"fewer than max_tokens={request.params.max_tokens}",
        )
    ids = request.prompt_ids + request.prefix_ids
    if len(ids) >= max_context:
        _fail(
            f"the prompt has {len(ids)} tokens",
            where,
            f"at most {max_context - 1}: the context of {max_context} must leave room for an answer",
            "shorten the prompt",
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        _fail(f"token id {outside} in the prompt", where, f"0 to {vocab_size - 1}", "use the model's own tokenizer")
    if request.params.stop and not can_decode:
        _fail("stop strings need a tokenizer", where, "an engine with a tokenizer", "use stop_token_ids")
    if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
        _fail(f"top_logprobs={top_logprobs}", where, f"0 to {MAX_TOP_LOGPROBS}")
