"""What a request may ask of the next token beyond temperature, top-k and top-p: penalties, biases, budgets, grammars.

Shape: V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Shaper", "Shaping", "Thinking", "TokenConstraint"]


class TokenConstraint(Protocol):
    """A grammar that follows one sequence."""

    error: str | None
    """Why it cannot go on; None while it can."""

    def allowed(self, vocab_size: int) -> Tensor:
        """bool [V] on the CPU: tokens that may come next."""
        ...

    def push(self, token_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens around a chain of thought, and how long it may be.

    `max_tokens` counts the tokens between the two; once it is reached, the end is drawn whatever the model says.
    """

    start_id: int
    end_id: int
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Shaping:
    """One request's wishes; the defaults ask for nothing.

    Attributes:
        presence_penalty, frequency_penalty: taken off the logits of sampled tokens, once and per occurrence (OpenAI).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer
            (Keskar et al. 2019, CTRL, section 4.1).
        logit_bias: added to the logits.
        min_p: drops tokens less probable than this share of the most probable one (Nguyen et al. 2024).
        min_tokens: the tokens `end_ids` cannot come before so many are sampled; None: never.
        end_ids: what ends a completion.
        thinking: bounds the chain of thought.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float = 0.0
    min_tokens: int | None = 0
    end_ids: tuple[int, ...] = ()
    thinking: Thinking | None = None

    @property
    def is_neutral(self) -> bool:
        """True where nothing is asked for."""
        bounded = self.thinking is not None and self.thinking.max_tokens is not None
        plain = (self.presence_penalty, self.frequency_penalty, self.min_p, self.min_tokens) == (0, 0, 0, 0)
        return plain and self.repetition_penalty == 1 and not self.logit_bias and not bounded


class Shaper:
    """Turns the logits of one sequence into those that its next token is drawn from.

    Args:
        shaping: the wishes.
        prompt_ids: what stands before the answer.
        temperature: of the request; `min_p` is measured after it.
        constraint: a grammar for the answer.
        think_first: the answer opens with a chain of thought, which the grammar does not bind.
    """

    def __init__(
        self,
        shaping: Shaping,
        prompt_ids: Sequence[int],
        temperature: float,
        constraint: TokenConstraint | None = None,
        *,
        think_first: bool = False,
    ) -> None:
        self._shaping, self._temperature, self._constraint = shaping, temperature, constraint
        self._counts: dict[int, int] = {}
        self._prompt = frozenset(prompt_ids) if shaping.repetition_penalty != 1 else frozenset()
        self._num_tokens = 0
        self._thought: int | None = None
        """Tokens of the chain of thought so far; None outside of it."""
        self._forced: deque[int] = deque()
        self._free = think_first
        if think_first and shaping.thinking is not None:
            self._forced.append(shaping.thinking.start_id)
        self.error: str | None = None
        """Why no token is left to draw; the sequence must end."""

    def shape(self, logits_V: Tensor) -> Tensor:
        """float32 [V], a new tensor with at least one finite entry wherever the logits have one."""
        out_V = logits_V.float().clone()
        if self._forced:
            keep = out_V[self._forced[0]].item()
            out_V.fill_(-torch.inf)[self._forced[0]] = keep
            return out_V
        self._penalize(out_V)
        wishes = self._shaping
        for token, bias in wishes.logit_bias.items():
            out_V[token] += bias
        if wishes.end_ids and (wishes.min_tokens is None or self._num_tokens < wishes.min_tokens):
            out_V[list(wishes.end_ids)] = -torch.inf
        if self._constraint is not None and not self._free:
            allowed_V = self._constraint.allowed(len(out_V))
            self.error = self._constraint.error
            out_V.masked_fill_(~allowed_V.to(out_V.device), -torch.inf)
        if wishes.min_p > 0 and self._temperature > 0:
            out_V.masked_fill_(out_V < out_V.max() + self._temperature * math.log(wishes.min_p), -torch.inf)
        if bool(out_V.isneginf().all()):
            self.error = self.error or "nothing that the model can say satisfies the request"
        # A sequence that has to end still takes part in this step's draw.
        return logits_V.float() if self.error else out_V

    def _penalize(self, out_V: Tensor) -> None:
        wishes = self._shaping
        if wishes.repetition_penalty != 1 and (seen := self._prompt | self._counts.keys()):
            ids = torch.tensor(sorted(seen), device=out_V.device)
            values = out_V[ids]
            penalty = wishes.repetition_penalty
            out_V[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (wishes.presence_penalty or wishes.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=out_V.device)
            counts = torch.tensor(list(self._counts.values()), device=out_V.device, dtype=out_V.dtype)
            out_V[ids] -= wishes.presence_penalty + wishes.frequency_penalty * counts

    def push(self, token_id: int) -> None:
        """Note the token that was drawn."""
        self._num_tokens += 1
        self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._constraint is not None and not self._free and self.error is None:
            self._constraint.push(token_id)
            self.error = self._constraint.error
        if self._forced:
            self._forced.popleft()
        thinking = self._shaping.thinking
        if thinking is None:
            return
        if token_id == thinking.end_id:
            self._thought, self._free = None, False
        elif token_id == thinking.start_id and self._num_tokens == 1:
            self._thought = 0
        elif self._thought is not None:
            self._thought += 1
        if self._thought is not None and thinking.max_tokens is not None and self._thought >= thinking.max_tokens:
            self._forced = deque([thinking.end_id])
