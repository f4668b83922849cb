"""Who runs next: waiting requests are admitted in order, while rows and memory allow. No tensor is touched here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from tafkir.engine.sequence import Prompt, Sequence

__all__ = ["CacheRoom", "PromptTable", "Scheduler"]


class CacheRoom(Protocol):
    """What the scheduler asks of the cache."""

    def fits(self, prompt_rows: int, prompt_length: int, rows: int, length: int) -> bool: ...


class PromptTable:
    """The distinct prompts of the running sequences, in dense cache rows."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self._by_ids: dict[tuple[int, ...], Prompt] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._by_ids

    def acquire(self, ids: tuple[int, ...]) -> tuple[Prompt, bool]:
        """The prompt's entry with one more user, and whether it is new and must be prefilled."""
        prompt = self._by_ids.get(ids)
        is_new = prompt is None
        if prompt is None:
            prompt = self._by_ids[ids] = Prompt(ids, row=len(self.prompts))
            self.prompts.append(prompt)
        prompt.users += 1
        return prompt, is_new

    def compact(self) -> list[tuple[int, int]]:
        """Drop prompts that nobody reads and close the holes; (from row, to row) of each one that moves."""
        living = [prompt for prompt in self.prompts if prompt.users]
        if len(living) == len(self.prompts):
            return []
        self._by_ids = {prompt.ids: prompt for prompt in living}
        holes = (prompt.row for prompt in self.prompts[: len(living)] if not prompt.users)
        moves = []
        for prompt, hole in zip([p for p in living if p.row >= len(living)], holes, strict=True):
            moves.append((prompt.row, hole))
            prompt.row = hole
        self.prompts = sorted(living, key=lambda prompt: prompt.row)
        return moves


class Scheduler:
    """First come, first served, among requests of one priority.

    Args:
        max_batch: most sequences that run at once.
        max_prefill_tokens: most prompt tokens in one forward pass (one longer prompt runs alone).
    """

    def __init__(self, max_batch: int, max_prefill_tokens: int) -> None:
        self.max_batch, self.max_prefill_tokens = max_batch, max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        # Where the batch is full, a prefill waits until it can serve several sequences at once.
        self.slack = max(1, max_batch // 16)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind those that come before it (`Sequence.order`)."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].order > seq.order:
            place -= 1
        self.waiting.insert(place, seq)

    def row_capacity(self, rows: int) -> int:
        """Cache rows to hold for so many sequences: the next power of two, never above the limit."""
        return min(self.max_batch, 1 << (rows - 1).bit_length())

    def admit(self, running: int, longest_limit: int, table: PromptTable, room: CacheRoom) -> list[Sequence]:
        """Take sequences off the queue.

        A sequence is admitted only when the cache can hold all that it and the running ones may still sample, so
        that none has to stop halfway for want of memory.

        Args:
            running: rows in use.
            longest_limit: largest token limit among the running sequences.
            table: prompts that are in the cache.
            room: the cache.
        """
        free = self.max_batch - running
        if running and free < min(self.slack, len(self.waiting)):
            return []
        admitted: list[Sequence] = []
        new_prompts: set[tuple[int, ...]] = set()
        prefill = 0
        longest_prompt = max((len(prompt.ids) for prompt in table.prompts), default=0)
        while self.waiting and len(admitted) < free:
            seq = self.waiting[0]
            ids = seq.context_ids
            is_new = ids not in table and ids not in new_prompts
            if is_new and prefill and prefill + len(ids) > self.max_prefill_tokens:
                break
            longest_limit, longest_prompt = max(longest_limit, seq.limit), max(longest_prompt, len(ids))
            prompt_rows = self.row_capacity(len(table) + len(new_prompts) + is_new)
            rows = self.row_capacity(running + len(admitted) + 1)
            if not room.fits(prompt_rows, longest_prompt, rows, longest_limit):
                break
            if is_new:
                new_prompts.add(ids)
                prefill += len(ids)
            admitted.append(self.waiting.popleft())
        return admitted

    def remove(self, request_id: str) -> Sequence | None:
        """Take a waiting sequence out of the queue."""
        for seq in self.waiting:
            if seq.request.id == request_id:
                self.waiting.remove(seq)
                return seq
        return None

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.waiting)
