"""What users meet on a loaded server in the mean: time to the first token, time per token, tokens a second."""

from __future__ import annotations

from dataclasses import dataclass

from tafkir.plan.serving import Deployment, Term, decode_step, prefill, total

__all__ = ["CHUNK_TOKENS", "Fleet", "Point", "predict_point"]

CHUNK_TOKENS = 8192
"""Prompt tokens that an engine puts into one pass."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who serves: workers that do both, or workers for prompts beside workers for answers.

    Attributes:
        decode: the deployment that answers. num_decode: how many of it.
        prompts: the deployment of workers that only prefill; None where the same workers do.
        num_prefill: how many of those.
    """

    decode: Deployment
    num_decode: int = 1
    prompts: Deployment | None = None
    num_prefill: int = 0

    @property
    def chips(self) -> int:
        own = self.decode.layout.chips * self.num_decode
        return own + (self.prompts.layout.chips * self.num_prefill if self.prompts else 0)


@dataclass(frozen=True, slots=True)
class Point:
    """One operating point in the mean; each time comes with the terms that add up to it.

    Attributes:
        ttft_s: from the request to its first token. tpot_s: between tokens after that.
        tokens_per_s: output of all chips together. concurrency: requests in the system.
        busy: prefill work over decoding time of one round; above 1 prompts queue without end.
    """

    concurrency: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    busy: float
    ttft: tuple[Term, ...]
    tpot: tuple[Term, ...]


def predict_point(
    fleet: Fleet,
    batch: float,
    prompt_tokens: float,
    output_tokens: float,
    *,
    cached: float = 0.0,
    passes: dict[int, tuple[list[Term], float]] | None = None,
) -> Point:
    """A fixed number of users, each with one request at a time (closed loop), as serving benchmarks run.

    Args:
        fleet: who serves.
        batch: requests of one data-parallel group of a decoding worker.
        prompt_tokens: of a request. output_tokens: of its answer.
        cached: share of a prompt that the prefix cache holds.
        passes: what prefill took in earlier calls for the same fleet and lengths, to be read and filled.
    """
    decode = fleet.decode
    c = decode.coefficients
    users = batch * decode.layout.dp * fleet.num_decode
    step = decode_step(decode, batch, prompt_tokens + output_tokens / 2)
    yields = decode.speculation.yields
    pace = total(step) / yields
    packed = max(1, int(min(batch, CHUNK_TOKENS // max(1.0, prompt_tokens * (1 - cached)))))
    known = {} if passes is None else passes
    if packed not in known:
        known[packed] = _prefill_pass(fleet, packed, prompt_tokens, cached)
    pass_terms, prompt_s = known[packed]
    round_s = users * prompt_s
    busy = round_s / (output_tokens * pace)
    others = (users - 1) / users * round_s
    if fleet.prompts is None:
        # Where prompts take as long as answers, requests bunch up and wait for each other.
        share = max(c.burst, min(1.0, busy))
        queue = share / 2 * others
        wait = (1 - share / 2) * others / output_tokens
    else:
        # Prompts that come faster than they are worked on pile up until decoding has to wait for them.
        share = c.burst
        queue = max(share / 2 * others, round_s - output_tokens * pace)
        wait = 0.0
    tpot = [Term(t.name, t.seconds / yields, t.formula, t.source) for t in step]
    if wait:
        tpot.append(Term("prompts of others", wait, f"{users - 1:g} prompts in {output_tokens:g} steps", c.source))
    ttft = [*pass_terms]
    ttft.append(Term("queue", queue, f"{share:.2f} / 2 x {users - 1:g} x {prompt_s * 1e3:.3g} ms", c.source))
    if fleet.prompts is not None:
        size = decode.shape.sequence_bytes(prompt_tokens, decode.cache_dtype_bytes)
        moved = size / (decode.chip.network * c.network_share)
        ttft.append(Term("moving the cache", moved, f"{size / 1e9:.3g} GB", decode.chip.source))
    # A request meets the middle of a polling interval, and its first token waits for the others of its group.
    together = decode.stream_steps - 1
    steps = c.first_token_steps[decode.engine] + (decode.poll_steps - 1) / 2 + together
    if together:
        share = min(1.0, together / max(1.0, output_tokens - 1))
        tpot.append(
            Term("came with the first", -share * total(tpot), f"{together} of {output_tokens:g} tokens", "given")
        )
    ttft.append(Term("admission", steps * total(step), f"{steps:.1f} steps of {decode.engine}", c.source))
    ttft.append(Term("request", c.request_s, "network, tokenizer, scheduling", c.source))
    ttft_s, tpot_s = total(ttft), total(tpot)
    rate = users * output_tokens / (ttft_s + output_tokens * tpot_s)
    return Point(users, ttft_s, tpot_s, rate, busy, tuple(ttft), tuple(tpot))


def _prefill_pass(fleet: Fleet, packed: int, tokens: float, cached: float) -> tuple[list[Term], float]:
    """The terms of a pass over one prompt, and the fleet's time for each of many prompts, `packed` in a pass."""
    worker, count = (fleet.prompts, fleet.num_prefill) if fleet.prompts else (fleet.decode, fleet.num_decode)
    whole = total(prefill(worker, tokens, cached=cached, prompts=packed))
    return prefill(worker, tokens, cached=cached), whole / (packed * worker.layout.dp * count)
