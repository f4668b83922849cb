"""What a load test sends and when: lengths like those of chats or of reasoning, arrivals by a clock or by answers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from tafkir.errors import RecipeError

__all__ = ["Lengths", "Load", "Planned", "plan_requests"]

Shape = Literal["fixed", "chat", "reasoning"]

# (mean, sigma of the logarithm) of prompt and answer, in tokens. chat: the means that vLLM's benchmark gets from
# ShareGPT; reasoning: short questions and answers with a long tail, as published rollouts of reasoning models have.
_LOGNORMAL: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "chat": ((220.0, 1.1), (200.0, 0.9)),
    "reasoning": ((150.0, 0.7), (2000.0, 1.0)),
}
_WORDS = (
    "river stone paper light garden window seven market train winter number music bread cloud table green "
    "teacher letter ocean silver morning village bridge summer doctor forest coffee mountain question answer"
).split()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers.

    Attributes:
        shape: fixed, or drawn from one of two distributions.
        prompt, answer: tokens, where they are fixed.
        scale: what drawn lengths are multiplied by, for small contexts.
        max_prompt, max_answer: what they are cut to.
    """

    shape: Shape = "fixed"
    prompt: int = 128
    answer: int = 128
    scale: float = 1.0
    max_prompt: int = 4096
    max_answer: int = 16384

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of one prompt and of its answer."""
        if self.shape == "fixed":
            return self.prompt, self.answer
        (prompt, prompt_sigma), (answer, answer_sigma) = _LOGNORMAL[self.shape]
        drawn = []
        for mean, sigma, most in ((prompt, prompt_sigma, self.max_prompt), (answer, answer_sigma, self.max_answer)):
            # A log-normal's mean is exp(mu + sigma^2 / 2).
            value = rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma) * self.scale
            drawn.append(min(most, max(1, round(value))))
        return drawn[0], drawn[1]


@dataclass(frozen=True, slots=True)
class Load:
    """When requests are sent: `concurrency` at a time (closed loop), or `rate` a second by a Poisson process (open
    loop, whatever the server does), of which `concurrency` then bounds nothing."""

    num_requests: int
    concurrency: int = 8
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.concurrency < 1 or (self.rate is not None and self.rate <= 0):
            raise RecipeError(
                "the load is none", where="bench serve", expected="requests, concurrency and rate above 0"
            )


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: its prompt's words, the answer's tokens, and when to send it (0 in a closed loop)."""

    words: str
    prompt_tokens: int
    answer_tokens: int
    at_s: float


def plan_requests(load: Load, lengths: Lengths, tokens_per_word: float, seed: int) -> list[Planned]:
    """The whole test, a function of its seed. Every prompt begins with words of its own, so that none is a prefix hit.

    Args:
        tokens_per_word: of the server's tokenizer, as measured.
    """
    # Apart, so that lengths and arrivals are the same whatever the server's tokenizer makes of a word.
    rng, words_rng = random.Random(seed), random.Random(~seed)
    planned, at_s = [], 0.0
    for i in range(load.num_requests):
        prompt, answer = lengths.draw(rng)
        count = max(1, round(prompt / tokens_per_word))
        words = [str(i), *words_rng.choices(_WORDS, k=count)][:count]
        if load.rate is not None:
            at_s += rng.expovariate(load.rate)
        planned.append(Planned(" ".join(words), prompt, answer, at_s))
    return planned
