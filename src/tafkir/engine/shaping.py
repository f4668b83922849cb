"""What a request may ask of the next token beyond temperature, top-k and top-p: penalties, biases, budgets, grammars.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Shaper", "Shaping", "Thinking", "TokenConstraint", "shape_rows"]


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
        self._seen_ids = dict.fromkeys(prompt_ids) if shaping.repetition_penalty != 1 else {}
        self._seen = array("q", self._seen_ids)
        """What the repetition penalty is for."""
        self._place: dict[int, int] = {}
        self._drawn, self._times = array("q"), array("f")
        """Sampled tokens and how often each one was, at the `_place` of the token."""
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
        return shape_rows([self], logits_V.unsqueeze(0))[0]

    def _narrow(self, out_V: Tensor) -> None:
        """Everything but penalties, in place."""
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

    def push(self, token_id: int) -> None:
        """Note the token that was drawn."""
        self._num_tokens += 1
        place = self._place.setdefault(token_id, len(self._drawn))
        if place == len(self._drawn):
            self._drawn.append(token_id)
            self._times.append(0.0)
        self._times[place] += 1
        if self._shaping.repetition_penalty != 1 and token_id not in self._seen_ids:
            self._seen_ids[token_id] = None
            self._seen.append(token_id)
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


def shape_rows(shapers: Sequence[Shaper], logits_RV: Tensor) -> Tensor:
    """`Shaper.shape` of one row each, float32 [R, V]; penalties are taken off all rows at once."""
    out_RV = logits_RV.float().clone()
    free = [row for row, shaper in enumerate(shapers) if not shaper._forced]
    _penalize([(row, shapers[row]) for row in free], out_RV)
    for row, shaper in enumerate(shapers):
        if shaper._forced:
            token, out_V = shaper._forced[0], out_RV[row]
            keep = out_V[token].item()
            out_V.fill_(-torch.inf)[token] = keep
        else:
            shaper._narrow(out_RV[row])
    for row, closed in enumerate(out_RV.amax(1).isneginf().tolist()):
        if closed and not shapers[row]._forced:
            shapers[row].error = shapers[row].error or "nothing that the model can say satisfies the request"
        if shapers[row].error:
            # A sequence that has to end still takes part in this step's draw.
            out_RV[row] = logits_RV[row]
    return out_RV


def _penalize(rows: Sequence[tuple[int, Shaper]], out_RV: Tensor) -> None:
    repeating = [(row, shaper) for row, shaper in rows if shaper._shaping.repetition_penalty != 1]
    if repeating:
        places, of_N = _places(repeating, [shaper._seen for _, shaper in repeating], out_RV)
        penalty_N = torch.tensor([s._shaping.repetition_penalty for _, s in repeating], device=out_RV.device)[of_N]
        values_N = out_RV.view(-1)[places]
        out_RV.view(-1)[places] = torch.where(values_N > 0, values_N / penalty_N, values_N * penalty_N)
    counting = [
        (row, s) for row, s in rows if s._drawn and (s._shaping.presence_penalty or s._shaping.frequency_penalty)
    ]
    if counting:
        places, of_N = _places(counting, [shaper._drawn for _, shaper in counting], out_RV)
        wishes = [(s._shaping.presence_penalty, s._shaping.frequency_penalty) for _, s in counting]
        presence_N, frequency_N = torch.tensor(wishes, device=out_RV.device)[of_N].unbind(1)
        times_N = _joined([shaper._times for _, shaper in counting], torch.float32).to(out_RV.device)
        out_RV.view(-1)[places] -= presence_N + frequency_N * times_N


def _places(rows: Sequence[tuple[int, Shaper]], ids: Sequence[array[int]], out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows' tokens stand in the flattened logits, and whose of `rows` each one is."""
    device = out_RV.device
    of_N = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(part) for part in ids]))
    starts_N = torch.tensor([row * out_RV.shape[1] for row, _ in rows])[of_N]
    return (_joined(ids, torch.int64) + starts_N).to(device), of_N.to(device)


def _joined(parts: Sequence[array[Any]], dtype: torch.dtype) -> Tensor:
    content = bytearray().join(parts)
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
