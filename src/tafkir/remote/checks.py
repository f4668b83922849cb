"""What is checked before an answer is believed: the tokenizer, every log-probability, and that nothing is missing."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

from tafkir.errors import RolloutError
from tafkir.records import Completion, FinishReason, Request
from tafkir.remote.connection import TransientError
from tafkir.remote.dialect import Sampled, ServerFacts

__all__ = ["PROBES", "EncodesText", "check_logprobs", "check_sampled", "check_spread", "check_tokenizer"]

PROBES = (
    "Each digit of 3,141 and 59.26% counts, 1/2 as well.",
    "<|im_start|>user\nHow many are left?<|im_end|>\n<|im_start|>assistant\n<think>\n12-5=7\n</think>\n",
    "def f(x):\n    return {'a': [x ** 2, -x]}  # \\frac{1}{2}",
    "تفكير ۱۲۳ — naïve Überprüfung, 思考, 🧠",
)
"""Texts on which tokenizers differ: digits, control tokens, code, other scripts."""

# Servers write "minus infinity" as a number that JSON can hold.
_NO_LOGPROB = -9999.0
_ROUNDING = 1e-3
# SGLang keeps a few positions of its context to itself.
_CONTEXT_SLACK = 8


class EncodesText(Protocol):
    """What is needed of the trainer's tokenizer."""

    def encode(self, text: str, /) -> list[int]: ...


def check_tokenizer(own: Sequence[int], theirs: Sequence[int], text: str, where: str) -> None:
    """Raises RolloutError when a server encodes a probe in another way than the trainer's tokenizer."""
    if list(own) == list(theirs):
        return
    at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
    raise RolloutError(
        f"the server has another tokenizer: it encodes {text[:24]!r} as {list(theirs[at : at + 4])} from token {at} on",
        where=where,
        expected=f"{list(own[at : at + 4])}",
        fix="start the server from the checkpoint that the stage starts from",
    )


def check_sampled(
    sampled: Sampled,
    request: Request,
    facts: ServerFacts,
    *,
    stop_ids: Collection[int],
    vocab_size: int,
    version: int,
    told: bool,
    where: str,
) -> Completion:
    """The completion that an answer holds, once nothing speaks against it.

    Args:
        version: the weights that the server should have.
        told: whether it was told that version; a fresh server calls its weights what it likes.

    Raises:
        TransientError: the server gave the request up, or has other weights.
        RolloutError: tokens, log-probabilities or their number cannot be right; the message says which.
    """
    where = f"{where}: request {request.id!r}"
    if sampled.reason not in ("stop", "length"):
        raise TransientError("aborted", f"the server ended the request with {sampled.reason!r}", where=where)
    if told and sampled.version is not None and sampled.version != str(version):
        raise TransientError("down", f"sampled with weights of version {sampled.version}, not {version}", where=where)
    prompt = (*request.prompt_ids, *request.prefix_ids)
    if sampled.prompt_ids is not None and sampled.prompt_ids != prompt:
        raise RolloutError(
            f"the server answered another prompt, of {len(sampled.prompt_ids)} tokens",
            where=where,
            expected=f"the {len(prompt)} that it was sent",
        )
    tokens = sampled.token_ids
    if not tokens:
        raise RolloutError("an empty completion", where=where, expected="at least the stop token")
    if sampled.counted is not None and sampled.counted != len(tokens):
        raise RolloutError(
            f"{len(tokens)} tokens came of {sampled.counted} that the server sampled",
            where=where,
            expected="all of them",
        )
    if not all(0 <= token < vocab_size for token in tokens):
        outside = next(token for token in tokens if not 0 <= token < vocab_size)
        raise RolloutError(f"token id {outside}", where=where, expected=f"0 to {vocab_size - 1}")
    logprobs = check_logprobs(sampled.logprobs, len(tokens), where)
    reason: FinishReason = "stop" if sampled.reason == "stop" else "length"
    _check_end(tokens, reason, request, facts, stop_ids, where)
    return Completion(request.id, tokens, logprobs, reason, version)


def check_logprobs(values: Sequence[float | None], num_tokens: int, where: str) -> tuple[float, ...]:
    """Raises RolloutError when a log-probability is missing or is none."""
    present = tuple(value for value in values if value is not None)
    if len(values) != num_tokens or len(present) != num_tokens:
        raise RolloutError(
            f"{len(present)} log-probabilities for {num_tokens} tokens",
            where=where,
            expected="one for each: training cannot tell how far the server's model is from its own without them",
        )
    wrong = [value for value in present if not _NO_LOGPROB < value <= _ROUNDING]
    if wrong:
        raise RolloutError(f"a log-probability of {wrong[0]}", where=where, expected="a finite number, 0 or less")
    return tuple(min(float(value), 0.0) for value in present)


def _check_end(
    tokens: Sequence[int],
    reason: FinishReason,
    request: Request,
    facts: ServerFacts,
    stop_ids: Collection[int],
    where: str,
) -> None:
    """A completion ends with a stop token, or at a limit: anything else lacks tokens at its end."""
    params = request.params
    room = params.max_tokens - len(request.prefix_ids)
    if len(tokens) > room:
        raise RolloutError(f"{len(tokens)} tokens", where=where, expected=f"at most {room}")
    if reason == "stop":
        if not params.stop and tokens[-1] not in stop_ids:
            raise RolloutError(
                f"it stopped at token {tokens[-1]}, which is no stop token",
                where=where,
                expected=f"one of {sorted(stop_ids)} at the end",
                fix="the server may leave the stop token out, or know other end tokens (generation_config.json)",
            )
        return
    total = len(request.prompt_ids) + len(request.prefix_ids) + len(tokens)
    full = facts.max_context is not None and total >= facts.max_context - _CONTEXT_SLACK
    if len(tokens) < room and not full:
        raise RolloutError(
            f"cut off after {len(tokens)} tokens",
            where=where,
            expected=f"{room} tokens, or a full context of {facts.max_context}",
        )


def check_spread(at_one: Sequence[float], at_own: Sequence[float], temperature: float, where: str) -> None:
    """Raises RolloutError when log-probabilities are not those at the temperature of sampling.

    The gap between two tokens' log-probabilities is the gap of their logits divided by the temperature.

    Args:
        at_one: of the most probable tokens at one position, asked for at temperature 1.
        at_own: the same, asked for at `temperature`.
    """
    one, own = (max(values) - min(sorted(values)[-5:]) for values in (at_one, at_own))
    wanted = one / temperature
    # Nearly even distributions tell nothing, and lose nothing.
    if abs(own - wanted) <= 0.25 * abs(one - wanted) + 1e-3:
        return
    if not math.isfinite(own) or one > 1e-2:
        raise RolloutError(
            f"log-probabilities are not those at temperature {temperature:g}: two tokens are {own:.4f} apart",
            where=where,
            expected=f"{wanted:.4f}",
            fix="start vLLM with --logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB",
        )
