"""Perplexity as a task: a text is scored token by token, nothing is sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tafkir.eval.answers import Answerer
from tafkir.eval.samples import Sample

__all__ = ["PERPLEXITY", "measure_text", "perplexity_of"]

PERPLEXITY = "perplexity"
"""The metric on the cards of such tasks."""


def measure_text(model: Answerer, blank: Sample) -> Sample:
    """The sample of a text: `extracted` is the sum of log-probabilities, `reward` a token's probability in the mean.

    Raises:
        RequestError: the model cannot score texts.
    """
    logprob, tokens = model.score(blank.question)
    return replace(
        blank,
        outcome="graded",
        reward=math.exp(logprob / tokens),
        extracted=f"{logprob:.6f}",
        tokens=tokens,
        finish_reason="stop",
    )


def perplexity_of(samples: Iterable[Sample]) -> dict[str, Any]:
    """`perplexity`, exp(-mean log-probability of a token), and `bits_per_byte`, which compares across tokenizers."""
    scored = [sample for sample in samples if not sample.failed]
    nats = -sum(float(sample.extracted or 0.0) for sample in scored)
    tokens = sum(sample.tokens for sample in scored)
    size = sum(len(sample.question.encode("utf-8")) for sample in scored)
    return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size} if tokens else {}
