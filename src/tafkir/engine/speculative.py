"""Speculative decoding: tokens are drafted cheaply and checked by the model several at a time.

A drafted token is kept where it is the very token that the model draws there: the most probable one of a greedy
request, else the one that the request's own random number (seed, position) picks. So a text is the one that plain
decoding gives, token by token, whatever drafts it and however much of it is accepted ("drafter-invariant", Daliri,
Musco and Suresh, arXiv 2408.07978), while speculation switches itself on and off by the clock. A draft that is certain
of its token is accepted as often as rejection sampling would (Leviathan, Kalman and Matias, arXiv 2211.17192); one that
is drawn is drawn by the same random number, so that alike distributions give alike tokens.

Shapes: B sequences, K drafted tokens, W = K + 1 tokens that one step checks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from tafkir.engine.batch import Column, RunningBatch
from tafkir.engine.drafters import Drafter, Row
from tafkir.engine.sequence import Sequence, TokenEvent
from tafkir.errors import RecipeError
from tafkir.models.decoder import DecoderOutput
from tafkir.ops.sampling import top_logprobs
from tafkir.records import FinishReason

__all__ = ["Acceptance", "GainMeter", "Kept", "Speculation", "parse_speculate"]


@dataclass(slots=True)
class Acceptance:
    """What became of the drafts so far; the names are vLLM's metrics'."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_per_pos: list[int] = field(default_factory=list)
    accepted_per_pos: list[int] = field(default_factory=list)

    def note(self, drafted: int, accepted: int) -> None:
        """One draft of so many tokens, and how many of them were kept."""
        if not drafted:
            return
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        for counts, number in ((self.drafted_per_pos, drafted), (self.accepted_per_pos, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(number):
                counts[i] += 1


class _Cost:
    """Seconds a token, over the last steps: a median of times, for a step may be held up, over a mean of tokens."""

    def __init__(self, window: int) -> None:
        self._seconds: deque[float] = deque(maxlen=window)
        self._tokens: deque[float] = deque(maxlen=window)

    def note(self, seconds: float, tokens: float) -> None:
        self._seconds.append(seconds)
        self._tokens.append(tokens)

    @property
    def known(self) -> bool:
        return len(self._seconds) == self._seconds.maxlen

    @property
    def seconds_per_token(self) -> float:
        return median(self._seconds) * len(self._tokens) / sum(self._tokens)


class _Load:
    """What is known of one size of batch."""

    def __init__(self, window: int) -> None:
        self.plain, self.speculative = _Cost(window), _Cost(window)
        self.steps = 0
        self.trial = 0


class GainMeter:
    """Says before each step whether drafting pays, by what both ways cost at this size of batch.

    Both are measured over `window` steps at first. Then the cheaper one goes on, and the other one is tried for
    `window` steps after every `patience` ones, for texts and machines change.

    Args:
        window: steps that a cost is taken over.
        patience: steps between two trials.
    """

    def __init__(self, window: int = 12, patience: int = 500) -> None:
        self._window, self._patience = window, patience
        self._loads: dict[int, _Load] = {}

    def _load(self, batch: int) -> _Load:
        return self._loads.setdefault(batch.bit_length(), _Load(self._window))

    def gain(self, batch: int) -> float | None:
        """How many times faster speculation is with so many sequences; None while that is not known."""
        load = self._load(batch)
        if not (load.plain.known and load.speculative.known):
            return None
        return load.plain.seconds_per_token / load.speculative.seconds_per_token

    def choose(self, batch: int) -> bool:
        """Whether the next step, of so many sequences, should speculate."""
        load, gain = self._load(batch), self.gain(batch)
        if gain is None:
            return load.plain.known
        load.steps += 1
        trial = load.steps % (self._patience + self._window) >= self._patience
        return (gain > 1) != trial

    def note(self, batch: int, speculated: bool, tokens: int, seconds: float) -> None:
        """What a step gave and took."""
        load = self._load(batch)
        (load.speculative if speculated else load.plain).note(seconds, tokens / batch)


@dataclass(slots=True)
class Kept:
    """What a step gave one sequence: tokens, their log-probabilities by the model, alternatives where asked for."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    reason: FinishReason | None = None
    num_drafted: int = 0
    num_accepted: int = 0

    def events(self, request_id: str) -> list[TokenEvent]:
        *before, last = zip(self.tokens, self.logprobs, self.tops, strict=True)
        events = [TokenEvent(request_id, token, logprob, None, top) for token, logprob, top in before]
        token, logprob, top = last
        counts = (self.num_drafted, self.num_accepted)
        return [*events, TokenEvent(request_id, token, logprob, self.reason, top, *counts)]


class Speculation:
    """Drafts for the running sequences, what came of them, and when to do without.

    Args:
        drafter: what drafts.
        adaptive: do without it while it costs more than it gains; else it always drafts.
        clock: seconds.
    """

    def __init__(
        self, drafter: Drafter, *, adaptive: bool = True, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.drafter, self.acceptance, self.clock = drafter, Acceptance(), clock
        self.meter = GainMeter() if adaptive else None

    def wanted(self, batch: int) -> bool:
        """Whether the next step, of so many sequences, should have drafts."""
        return self.meter is None or self.meter.choose(batch)

    def note_step(self, batch: int, speculated: bool, tokens: int, seconds: float) -> None:
        """What a step gave and took."""
        if self.meter is not None:
            self.meter.note(batch, speculated, tokens, seconds)

    def start(self, sequences: Iterable[Sequence]) -> None:
        """Sequences whose prompts are in the cache."""
        for seq in sequences:
            if seq.prompt is not None and seq.prompt.state_PD is not None:
                self.drafter.observe(seq, 0, seq.prompt.state_PD)

    def draft(self, batch: RunningBatch) -> list[list[int]]:
        """A draft for every row, all of them alive; none reaches beyond what its sequence may still say."""
        rows = [
            Row(seq, tokens) for seq, tokens in zip(batch.sequences, batch.tokens(), strict=True) if seq is not None
        ]
        limit = int(batch.column(Column.LIMIT).max())
        drafts = self.drafter.draft(rows, max(0, min(self.drafter.max_tokens, limit - batch.longest)))
        return [draft[: row.seq.limit - len(row.tokens) - 1] for row, draft in zip(rows, drafts, strict=True)]

    @staticmethod
    def fed(batch: RunningBatch, drafts: SequenceOf[SequenceOf[int]]) -> Tensor:
        """int64 [B, W]: the newest token of each row with its draft behind it, and any token behind a shorter one."""
        width = max(map(len, drafts))
        device = batch.column(Column.TOKEN).device
        padded = [[*draft, *[0] * (width - len(draft))] for draft in drafts]
        drafted_BK = torch.tensor(padded, dtype=torch.int64, device=device).view(len(drafts), width)
        return torch.cat((batch.column(Column.TOKEN).unsqueeze(1), drafted_BK), dim=1)

    def check(self, batch: RunningBatch, drafts: SequenceOf[SequenceOf[int]], logits_NV: Tensor) -> list[Kept]:
        """What every row keeps: the tokens that the model draws, up to the first that was not drafted, and that one.

        Args:
            logits_NV: of what `fed` gives, row after row.
        """
        width = len(logits_NV) // len(drafts)
        drawn_BW, logprob_BW = (x.tolist() for x in batch.draw(logits_NV, width))
        logits_BWV, kept = logits_NV.unflatten(0, (len(drafts), width)), []
        counts = batch.column(Column.COUNT).tolist()
        for row, (seq, draft) in enumerate(zip(batch.sequences, drafts, strict=True)):
            assert seq is not None
            found = Kept(num_drafted=len(draft))
            for ahead in range(len(draft) + 1):
                token, logprob = drawn_BW[row][ahead], logprob_BW[row][ahead]
                if seq.shaper is not None:
                    logits_V = logits_BWV[row, ahead]
                    token, logprob = batch.draw_shaped(row, ahead, logits_V, seq.shaper.shape(logits_V))
                _note(found, seq, token, logprob, logits_BWV[row, ahead], counts[row] + ahead + 1)
                hit = ahead < len(draft) and token == draft[ahead]
                found.num_accepted += hit
                if found.reason is not None or not hit:
                    break
            self.acceptance.note(found.num_drafted, found.num_accepted)
            kept.append(found)
        return kept

    def observe(self, batch: RunningBatch, kept: SequenceOf[Kept], output: DecoderOutput) -> None:
        """Show the drafter the states of the tokens that stay in the cache, once the batch counts them."""
        if self.drafter.state is None:
            return
        state_BWD = getattr(output, self.drafter.state).unflatten(0, (len(kept), -1))
        counts = batch.column(Column.COUNT).tolist()
        for row, (seq, found) in enumerate(zip(batch.sequences, kept, strict=True)):
            if seq is not None and found.reason is None:
                size = len(found.tokens)
                position = len(seq.context_ids) + counts[row] - 1 - size
                self.drafter.observe(seq, position, state_BWD[row, :size])


def _note(found: Kept, seq: Sequence, token: int, logprob: float, logits_V: Tensor, count: int) -> None:
    """Add a sampled token, the sequence's `count`-th, and say whether it ends there."""
    found.tokens.append(token)
    found.logprobs.append(logprob)
    found.tops.append(())
    if seq.top_logprobs:
        temperature = torch.tensor([seq.request.params.temperature], device=logits_V.device)
        ids, values = top_logprobs(logits_V[None], temperature, seq.top_logprobs)
        found.tops[-1] = tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True))
    # A stop token ends the text; what it would decode to is not part of it.
    if token in seq.stop_ids or (seq.watch is not None and seq.watch.push(token)):
        found.reason = "stop"
    elif count >= seq.limit:
        found.reason = "length"
    if seq.shaper is not None:
        seq.shaper.push(token)
        if seq.shaper.error is not None:
            found.reason = "cancelled"


def parse_speculate(text: str) -> tuple[str, int | None]:
    """`ngram`, `nextn` or a path, and the number of tokens behind a colon where there is one.

    Raises:
        RecipeError: nothing is named, or the number is not from 1 to 16.
    """
    name, colon, number = text.rpartition(":")
    if not colon or not number.isdecimal():
        name, number = text, ""
    if not name or (number and not 1 <= int(number) <= 16):
        raise RecipeError(
            f"{text!r}",
            where="--speculate",
            expected="ngram, nextn or a checkpoint, and 1 to 16 tokens behind a colon, as in nextn:3",
        )
    return name, int(number) if number else None
