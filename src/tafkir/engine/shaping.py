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

import numpy as np
import torch
from torch import Tensor

__all__ = ["Shaper", "Shaping", "Thinking", "TokenConstraint", "shape_rows"]


class TokenConstraint(Protocol):
    """A grammar that follows one sequence."""

    error: str | None
    """Why it cannot go on; None while it can."""

    def allowed(self) -> bytes:
        """A bit a token, the lowest of a byte first: those that may come next. Tokens beyond are not allowed."""
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
        self._cuts_tail = shaping.min_p > 0 and temperature > 0
        self.error: str | None = None
        """Why no token is left to draw; the sequence must end."""

    def shape(self, logits_V: Tensor) -> Tensor:
        """float32 [V], a new tensor with at least one finite entry wherever the logits have one."""
        return shape_rows([self], logits_V.unsqueeze(0))[0]

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


Rows = Sequence[tuple[int, Shaper]]


def shape_rows(shapers: Sequence[Shaper], logits_RV: Tensor) -> Tensor:
    """`Shaper.shape` of one row each, float32 [R, V]; every kind of wish is met for all rows at once."""
    out_RV = logits_RV.float().clone()
    free = [(row, shaper) for row, shaper in enumerate(shapers) if not shaper._forced]
    _penalize(free, out_RV)
    _add_biases(free, out_RV)
    _forbid(free, out_RV)
    _cut_tails(free, out_RV)
    for row, shaper in enumerate(shapers):
        if shaper._forced:
            token, out_V = shaper._forced[0], out_RV[row]
            keep = out_V[token].item()
            out_V.fill_(-torch.inf)[token] = keep
    for row, closed in enumerate(out_RV.amax(1).isneginf().tolist()):
        if closed and not shapers[row]._forced:
            shapers[row].error = shapers[row].error or "nothing that the model can say satisfies the request"
        if shapers[row].error:
            # A sequence that has to end still takes part in this step's draw.
            out_RV[row] = logits_RV[row]
    return out_RV


def _add_biases(rows: Rows, out_RV: Tensor) -> None:
    biased = [(row, shaper._shaping.logit_bias) for row, shaper in rows if shaper._shaping.logit_bias]
    if biased:
        places = [row * out_RV.shape[1] + token for row, biases in biased for token in biases]
        values = [float(bias) for _, biases in biased for bias in biases.values()]
        out_RV.view(-1)[torch.tensor(places, device=out_RV.device)] += torch.tensor(values, device=out_RV.device)


def _forbid(rows: Rows, out_RV: Tensor) -> None:
    """Ends that come too early, and what a grammar has no room for."""
    vocab = out_RV.shape[1]
    early = [(row, s) for row, s in rows if s._shaping.min_tokens is None or s._num_tokens < s._shaping.min_tokens]
    if places := [row * vocab + token for row, shaper in early for token in shaper._shaping.end_ids]:
        out_RV.view(-1)[torch.tensor(places, device=out_RV.device)] = -torch.inf
    bound = [(row, s, s._constraint) for row, s in rows if s._constraint is not None and not s._free]
    if not bound:
        return
    bits = np.zeros((len(bound), -(-vocab // 8)), dtype=np.uint8)
    for own, (_, shaper, constraint) in zip(bits, bound, strict=True):
        allowed = np.frombuffer(constraint.allowed(), dtype=np.uint8)[: len(own)]
        own[: len(allowed)] = allowed
        shaper.error = constraint.error
    forbidden_RV = torch.from_numpy(np.unpackbits(~bits, axis=1, count=vocab, bitorder="little")).to(out_RV.device)
    if len(bound) == len(out_RV):
        out_RV.masked_fill_(forbidden_RV.bool(), -torch.inf)
    else:
        rows_R = torch.tensor([row for row, _, _ in bound], device=out_RV.device)
        out_RV[rows_R] = out_RV[rows_R].masked_fill(forbidden_RV.bool(), -torch.inf)


def _cut_tails(rows: Rows, out_RV: Tensor) -> None:
    """`min_p`."""
    cut = [(row, s._temperature * math.log(s._shaping.min_p)) for row, s in rows if s._cuts_tail]
    if cut:
        rows_R = torch.tensor([row for row, _ in cut], device=out_RV.device)
        below_R1 = torch.tensor([[below] for _, below in cut], device=out_RV.device)
        own_RV = out_RV[rows_R]
        out_RV[rows_R] = own_RV.masked_fill_(own_RV < own_RV.amax(1, True) + below_R1, -torch.inf)


def _penalize(rows: Rows, out_RV: Tensor) -> None:
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


def _places(rows: Rows, ids: Sequence[array[int]], out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows' tokens stand in the flattened logits, and whose of `rows` each one is."""
    device = out_RV.device
    of_N = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(part) for part in ids]))
    starts_N = torch.tensor([row * out_RV.shape[1] for row, _ in rows])[of_N]
    return (_joined(ids, torch.int64) + starts_N).to(device), of_N.to(device)


def _joined(parts: Sequence[array[Any]], dtype: torch.dtype) -> Tensor:
    content = bytearray().join(parts)
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
