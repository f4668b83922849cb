"""What the engine knows of each running sequence, as columns of tensors: a step is a few ops, whatever the batch.

Shapes: B running sequences, W most stop ids of one sequence, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from enum import IntEnum

import torch
from torch import Tensor

from tafkir.engine.sequence import Sequence
from tafkir.engine.store import bucket
from tafkir.ops.sampling import greedy, sample, uniform

__all__ = ["Column", "RunningBatch"]


class Column(IntEnum):
    """Rows of the int64 state."""

    TOKEN = 0
    """The newest token, next to be fed."""
    COUNT = 1
    """Tokens sampled so far."""
    PROMPT_ROW = 2
    PROMPT_LENGTH = 3
    LIMIT = 4
    TOP_K = 5
    KEY = 6
    ALIVE = 7
    """1 while the sequence runs, 0 once it has ended and waits for its row to be reused."""


class RunningBatch:
    """The running sequences in dense rows 0..size-1; an ended one leaves None until `compact`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sequences: list[Sequence | None] = []
        self._ints = torch.zeros(len(Column), 0, dtype=torch.int64, device=device)
        self._floats = torch.zeros(2, 0, device=device)
        self._stop_ids = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(0, 0, device=device)
        self.num_alive = 0
        self.longest = 0
        """Upper bound of the sampled tokens of any living row."""

    @property
    def size(self) -> int:
        return len(self.sequences)

    def column(self, column: Column) -> Tensor:
        return self._ints[column, : self.size]

    def append(self, sequences: SequenceOf[Sequence]) -> None:
        """Add sequences (with their prompts in the cache) as the last rows."""
        first, size = self.size, self.size + len(sequences)
        self._reserve(size, 1, max(1, *(len(seq.stop_ids) for seq in sequences)))
        prompts = [seq.prompt for seq in sequences if seq.prompt is not None]
        columns = {
            Column.PROMPT_ROW: [prompt.row for prompt in prompts],
            Column.PROMPT_LENGTH: [len(prompt.ids) for prompt in prompts],
            Column.LIMIT: [seq.limit for seq in sequences],
            Column.TOP_K: [seq.request.params.top_k for seq in sequences],
            Column.KEY: [seq.key for seq in sequences],
            Column.ALIVE: [1] * len(sequences),
        }
        self._ints[:, first:size] = 0
        for column, values in columns.items():
            self._ints[column, first:size] = torch.tensor(values, device=self._device)
        sampling = [(seq.request.params.temperature, seq.request.params.top_p) for seq in sequences]
        self._floats[:, first:size] = torch.tensor(sampling, device=self._device).t()
        width = self._stop_ids.shape[1]
        stops = [list(seq.stop_ids) + [-1] * (width - len(seq.stop_ids)) for seq in sequences]
        self._stop_ids[first:size] = torch.tensor(stops, device=self._device)
        self.sequences.extend(sequences)
        self.num_alive += len(sequences)

    def record(
        self, first: int, logits_BV: Tensor, shaped: tuple[SequenceOf[int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample the next token of the rows from `first` on, and note it.

        `shaped` names some of the rows (counted from `first`) and other logits [R, V] that these are drawn from;
        log-probabilities are those of `logits_BV` all the same.

        Returns:
            token_B, logprob_B, and two bool masks: which rows end with this token, and which of them by a stop
            token. Rows that ended before are drawn as well (their values mean nothing) and never end again.
        """
        self._reserve(self.size, self.longest + 1, 1)
        ints, rows = self._ints[:, first : self.size], slice(first, self.size)
        count_B, alive_B = ints[Column.COUNT], ints[Column.ALIVE]
        temperature_B, top_p_B = self._floats[:, rows]
        drawn_BV = logits_BV
        changed: Tensor | slice = slice(None)
        if shaped is not None:
            drawn_BV = shaped[1]
            if len(shaped[0]) < len(logits_BV):
                changed = torch.tensor(shaped[0], device=self._device)
                drawn_BV = logits_BV.float().index_copy(0, changed, shaped[1])
        if not bool(temperature_B.any()):
            token_B, logprob_B = greedy(drawn_BV)
        else:
            u_B = uniform(ints[Column.KEY], count_B)
            token_B, logprob_B = sample(drawn_BV, temperature_B, ints[Column.TOP_K], top_p_B, u_B)
        if shaped is not None:
            scale_R1 = torch.where(temperature_B == 0, 1.0, temperature_B)[changed].unsqueeze(1)
            own_RV = torch.log_softmax(logits_BV[changed].float() / scale_R1, dim=-1)
            logprob_B[changed] = own_RV.gather(1, token_B[changed].unsqueeze(1)).squeeze(1)
        capacity = self._tokens.shape[1]
        # An ended row may be full; what is drawn for it must not spill into the next row.
        place_B = count_B.clamp(max=capacity - 1)
        flat_B = torch.arange(first * capacity, self.size * capacity, capacity, device=self._device) + place_B
        self._tokens.view(-1).index_copy_(0, flat_B, token_B)
        self._logprobs.view(-1).index_copy_(0, flat_B, logprob_B)
        ints[Column.TOKEN] = token_B
        count_B += alive_B
        self.longest = self.longest + 1 if first == 0 else max(self.longest, 1)
        stopped_B = (self._stop_ids[rows] == token_B.unsqueeze(1)).any(dim=1)
        ended_B = (stopped_B | (count_B >= ints[Column.LIMIT])) & (alive_B == 1)
        return token_B, logprob_B, ended_B, stopped_B

    def draw(self, logits_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """What the rows draw after each of their last `width` tokens, as `record` would; nothing is noted.

        Args:
            logits_NV: of `width` tokens a row, row after row; the first stands for the row's next token.

        Returns:
            token_BW (int64) and logprob_BW (float32).
        """
        ints, floats = self._ints[:, : self.size], self._floats[:, : self.size]
        if not bool(floats[0].any()):
            token_N, logprob_N = greedy(logits_NV)
            return token_N.view(-1, width), logprob_N.view(-1, width)
        ints, floats = ints.repeat_interleave(width, dim=1), floats.repeat_interleave(width, dim=1)
        ahead_N = torch.arange(width, device=self._device).repeat(self.size)
        u_N = uniform(ints[Column.KEY], ints[Column.COUNT] + ahead_N)
        token_N, logprob_N = sample(logits_NV, floats[0], ints[Column.TOP_K], floats[1], u_N)
        return token_N.view(-1, width), logprob_N.view(-1, width)

    def draw_shaped(self, row: int, ahead: int, logits_V: Tensor, shaped_V: Tensor) -> tuple[int, float]:
        """One row's token, `ahead` places after its next one, drawn from `shaped_V`; log-probability by `logits_V`."""
        ints, (temperature, top_p) = self._ints[:, row], self._floats[:, row]
        u = uniform(ints[Column.KEY], ints[Column.COUNT] + ahead)
        token = int(sample(shaped_V[None], temperature[None], ints[Column.TOP_K, None], top_p[None], u[None])[0])
        scale = torch.where(temperature == 0, 1.0, temperature)
        return token, float(torch.log_softmax(logits_V.float() / scale, dim=-1)[token])

    def keep(self, tokens: SequenceOf[SequenceOf[int]], logprobs: SequenceOf[SequenceOf[float]]) -> None:
        """Note what every row has sampled in a step, one token at least; all of them are alive."""
        self._reserve(self.size, self.longest + max(map(len, tokens)), 1)
        starts, capacity = self.column(Column.COUNT).tolist(), self._tokens.shape[1]
        counts = [start + len(row) for start, row in zip(starts, tokens, strict=True)]
        places = [
            row * capacity + place
            for row, (a, b) in enumerate(zip(starts, counts, strict=True))
            for place in range(a, b)
        ]
        place_N = torch.tensor(places, device=self._device)
        for store, values in ((self._tokens, tokens), (self._logprobs, logprobs)):
            flat = torch.tensor([x for row in values for x in row], dtype=store.dtype, device=self._device)
            store.view(-1).index_copy_(0, place_N, flat)
        newest = torch.tensor([[row[-1] for row in tokens], counts], device=self._device)
        self._ints[[Column.TOKEN, Column.COUNT], : self.size] = newest
        self.longest = max(counts)

    def truncate(self, count_B: Tensor) -> None:
        """Keep only the first tokens of each row, int64, one at least; the last kept one is fed next."""
        self.column(Column.COUNT).copy_(count_B)
        rows_B = torch.arange(self.size, device=self._device)
        self.column(Column.TOKEN).copy_(self._tokens[rows_B, count_B - 1])
        self.longest = int((count_B * self.column(Column.ALIVE)).max())

    def tokens(self) -> list[list[int]]:
        """What every row has sampled so far."""
        counts = self.column(Column.COUNT).tolist()
        rows = self._tokens[: self.size, : max(counts, default=0)].tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    def end(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Mark rows as ended; their tokens and logprobs, in the same order."""
        index = torch.tensor(rows, device=self._device)
        self._ints[Column.ALIVE, index] = 0
        self.num_alive -= len(rows)
        counts = self._ints[Column.COUNT, index].tolist()
        tokens = self._tokens[index, : max(counts)].tolist()
        logprobs = self._logprobs[index, : max(counts)].tolist()
        # Without the ended rows, so that the cache never grows for their sake.
        self.longest = int((self.column(Column.COUNT) * self.column(Column.ALIVE)).max())
        return [(t[:n], p[:n]) for t, p, n in zip(tokens, logprobs, counts, strict=True)]

    def compact(self) -> tuple[Tensor, Tensor]:
        """Move living rows into the places of ended ones; the rows to copy from and to, for the cache as well."""
        alive_B = self.column(Column.ALIVE) == 1
        src = alive_B[self.num_alive :].nonzero().squeeze(1) + self.num_alive
        dst = (~alive_B[: self.num_alive]).nonzero().squeeze(1)
        for row_major in (self._stop_ids, self._tokens, self._logprobs):
            row_major[dst] = row_major[src]
        self._ints[:, dst] = self._ints[:, src]
        self._floats[:, dst] = self._floats[:, src]
        for from_row, to_row in zip(src.tolist(), dst.tolist(), strict=True):
            self.sequences[to_row] = self.sequences[from_row]
        del self.sequences[self.num_alive :]
        self.longest = int(self.column(Column.COUNT).max()) if self.sequences else 0
        return src, dst

    def _reserve(self, rows: int, length: int, num_stops: int) -> None:
        """Grow the tensors to hold so many rows, sampled tokens and stop ids."""
        old_rows, old_length = self._tokens.shape
        old_width = self._stop_ids.shape[1]
        if rows <= old_rows and length <= old_length and num_stops <= old_width:
            return
        rows = max(old_rows, 1 << (rows - 1).bit_length())
        length, width = max(old_length, bucket(length)), max(old_width, num_stops)
        self._ints = _grown(self._ints, (len(Column), rows), 0)
        self._floats = _grown(self._floats, (2, rows), 0)
        self._tokens = _grown(self._tokens, (rows, length), 0)
        self._logprobs = _grown(self._logprobs, (rows, length), 0)
        # No token has the id -1, so an empty place never matches.
        self._stop_ids = _grown(self._stop_ids, (rows, width), -1)


def _grown(old: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    new = old.new_full(size, fill)
    new[: old.shape[0], : old.shape[1]] = old
    return new
