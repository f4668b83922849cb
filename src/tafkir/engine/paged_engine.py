"""The engine over a paged cache, for many people at once: prompts in chunks beside tokens, known beginnings not
computed again, and room taken back from the last to come where it runs out.

Sequences hold blocks for what they are, not for what they may become. Rollouts, whose groups share whole prompts and
whose arithmetic is pinned, keep to `Engine`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tafkir.engine.batch import Column
from tafkir.engine.cache_formats import CacheFormat
from tafkir.engine.engine import Engine, Step, Weights
from tafkir.engine.paged_cache import BLOCK_SIZE, Chunk, PagedCache, PagedRows
from tafkir.engine.sequence import Prompt, Sequence
from tafkir.engine.static_steps import build_static
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.invariant import batch_invariant
from tafkir.ops.sampling import advance_key
from tafkir.records import Completion

__all__ = ["PagedEngine"]


class _SlotExperts:
    """Which experts each token went to, by its place in the cache: what a prompt shares, it shares these of."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache

    def note(self, slot_N: Tensor, layers: SequenceOf[Tensor]) -> None:
        """The experts [N, A] of every layer, for the tokens at these slots."""
        assert self._cache.experts is not None
        self._cache.experts[slot_N] = torch.stack(list(layers), dim=1).to(torch.int16)

    def note_tokens(self, rows: SequenceOf[Sequence], place_N: Tensor, layers: SequenceOf[Tensor]) -> None:
        """As `ExpertLog.note_tokens`; a row's tokens stand together, rows in the order of the batch."""
        numbers = {seq: row for row, seq in enumerate(dict.fromkeys(rows))}
        device = place_N.device
        rows_N = torch.tensor([numbers[seq] for seq in rows], device=device)
        positions_N = place_N + torch.tensor([len(seq.context_ids) for seq in rows], device=device)
        self.note(self._cache.slots(self._cache.tables, rows_N, positions_N), layers)

    def take(self, seq: Sequence, num_tokens: int) -> Tensor:
        """As `ExpertLog.take`."""
        assert self._cache.experts is not None
        length = len(seq.context_ids) + num_tokens - 1
        return self._cache.experts[self._cache.slots_of(seq.blocks, length)].cpu()


class PagedEngine(Engine):
    """Continuous batching over blocks; implements `Completer`.

    Args:
        decoder: the policy.
        chunk_tokens: most tokens of a step while sequences are sampling: theirs, and what is left for prompts.
        prefix_caching: begin with what earlier requests of the same beginning have left.
        batch_invariant: the same numbers to the bit for a request, alone or in any company. On the processor every
            token is computed by itself; with several threads each still is by one.
        static_steps: decode over buffers that stay in place, captured in CUDA graphs where the device has them. None:
            on such a device, where the model and the cache's format allow it.
        options: as `Engine` takes them. `max_cache_bytes` is of all blocks; None takes 256 MiB, or one whole context.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        chunk_tokens: int = 512,
        prefix_caching: bool = True,
        batch_invariant: bool = False,
        static_steps: bool | None = None,
        **options: Any,
    ) -> None:
        self.chunk_tokens, self._caching, self._invariant = chunk_tokens, prefix_caching, batch_invariant
        super().__init__(decoder, **options)
        self.batch_invariant = batch_invariant
        self._runner.static = build_static(decoder, self._cache, static_steps)
        # Sequences whose prompts are in the making, and how many of their tokens are in the cache.
        self._prefilling: dict[Sequence, int] = {}

    def _build_cache(
        self,
        max_bytes: int | None,
        kv_cache: CacheFormat,
        scales: SequenceOf[tuple[float, float]] | None,
        records: bool,
    ) -> tuple[Any, Any]:
        cache = PagedCache(
            self.decoder.config,
            self.decoder.embed_tokens.weight.detach(),
            max_bytes,
            max_rows=self.max_batch,
            max_context=self.max_context,
            format=kv_cache,
            scales=scales,
            caching=self._caching,
            record_experts=records,
            invariant=self._invariant,
        )
        return cache, _SlotExperts(cache) if records else None

    @property
    def num_running(self) -> int:
        return self._batch.num_alive + len(self._prefilling)

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that running sequences hold."""
        return float(self._cache.blocks.num_used / self._cache.blocks.num_blocks)

    def load_weights(self, weights: Weights, version: int) -> None:
        super().load_weights(weights, version)
        self.forget_prefixes()
        if self._runner.static is not None:
            self._runner.static.forget_moved()

    def forget_prefixes(self) -> None:
        self._cache.blocks.forget_all()

    def cancel(self, request_id: str) -> Completion | None:
        seq = self._by_id.get(request_id)
        if seq in self._prefilling:
            self._give_up(seq)
        return super().cancel(request_id)

    def cancel_all(self) -> list[Completion]:
        for seq in list(self._prefilling):
            self._give_up(seq)
        return super().cancel_all()

    # --- one step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _advance(self) -> Step:
        self._compact(force=True)
        self._grow()
        self._start_prompts()
        chunks = self._next_chunks()
        with self._arithmetic():
            return self._mixed(chunks) if chunks else self._step_running()

    def _arithmetic(self) -> AbstractContextManager[None]:
        return batch_invariant() if self.batch_invariant else nullcontext()

    def _grow(self) -> None:
        """Give every running row the blocks of its next tokens, drafts among them; who came last makes room."""
        ahead = 1 + (self.speculation.drafter.max_tokens if self.speculation else 0)
        cache = self._cache
        while True:
            counts = self._batch.column(Column.COUNT).tolist()
            missing = {}
            for row, (seq, count) in enumerate(zip(self._batch.sequences, counts, strict=True)):
                assert seq is not None
                wanted = cache.num_blocks_for(len(seq.context_ids) + count - 1 + ahead)
                if wanted > len(seq.blocks):
                    missing[row] = wanted - len(seq.blocks)
            if sum(missing.values()) <= cache.blocks.num_free:
                break
            self._preempt()
        for row, count in missing.items():
            seq = self._batch.sequences[row]
            assert seq is not None
            seq.blocks += cache.blocks.allocate(count)
            cache.set_row(row, seq.blocks)

    def _preempt(self) -> None:
        """Send the last in order back to the queue; what it has is computed again, or found again, when it returns."""
        running = [seq for seq in self._batch.sequences if seq is not None]
        seq = max([*running, *self._prefilling], key=lambda seq: seq.order)
        self.num_preemptions += 1
        if seq in self._prefilling:
            self._give_up(seq)
            return
        row = self._batch.sequences.index(seq)
        ((tokens, logprobs),) = self._batch.end([row])
        self._batch.sequences[row] = None
        if self.speculation is not None:
            self.speculation.drafter.drop(seq)
        self._leave(seq, tokens)
        seq.key, seq.limit = advance_key(seq.key, len(tokens)), seq.limit - len(tokens)
        seq.kept_ids, seq.kept_logprobs = seq.kept_ids + tuple(tokens), seq.kept_logprobs + tuple(logprobs)
        self._scheduler.add(seq)
        self._compact(force=True)

    def _give_up(self, seq: Sequence) -> None:
        """A prompt in the making goes back to the queue."""
        del self._prefilling[seq]
        self._cache.blocks.release(seq.blocks)
        seq.blocks = []
        if self.speculation is not None:
            self.speculation.drafter.drop(seq)
        self._scheduler.add(seq)

    def _leave(self, seq: Sequence, tokens: SequenceOf[int]) -> None:
        # The newest token was never fed.
        self._cache.blocks.seal((*seq.context_ids, *tokens[:-1]), seq.blocks)
        self._cache.blocks.release(seq.blocks)
        seq.blocks = []

    def _start_prompts(self) -> None:
        """Take sequences off the queue while rows and blocks allow."""
        blocks = self._cache.blocks
        for seq in list(self._scheduler.waiting):
            if self.num_running >= self.max_batch:
                break
            ids = seq.context_ids
            # The last token is always computed: what comes after it is sampled from its state.
            found = blocks.match(ids, (len(ids) - 1) // BLOCK_SIZE)
            if self._is_being_computed(ids[: (len(found) + 1) * BLOCK_SIZE]):
                continue
            needed = self._cache.num_blocks_for(len(ids) + 1) - len(found)
            # A block for each that runs, so that the next step does not send this one back.
            if needed + self.num_running > blocks.num_free - blocks.num_idle(found):
                break
            self._scheduler.waiting.remove(seq)
            blocks.hold(found)
            seq.blocks = found + blocks.allocate(needed)
            self._prefilling[seq] = len(found) * BLOCK_SIZE
            if self._caching and not seq.kept_ids:
                self.prefix_queries += len(ids)
                self.prefix_hits += len(found) * BLOCK_SIZE

    def _is_being_computed(self, beginning: tuple[int, ...]) -> bool:
        """Whether the block that these tokens end with is on its way in: then it is waited for, not computed twice."""
        if not self._caching or len(beginning) % BLOCK_SIZE:
            return False
        size = len(beginning)
        return any(done < size and seq.context_ids[:size] == beginning for seq, done in self._prefilling.items())

    def _next_chunks(self) -> list[tuple[Sequence, int, int]]:
        """(sequence, first token, tokens) of this step's share of prompts."""
        alive = self._batch.num_alive
        budget = max(BLOCK_SIZE, self.chunk_tokens - alive) if alive else self._scheduler.max_prefill_tokens
        chunks = []
        for seq in sorted(self._prefilling, key=lambda seq: seq.order):
            done = self._prefilling[seq]
            count = min(budget, len(seq.context_ids) - done)
            if count:
                chunks.append((seq, done, count))
            budget -= count
        return chunks

    def _mixed(self, chunks: SequenceOf[tuple[Sequence, int, int]]) -> Step:
        """One forward pass over the newest token of every row and some tokens of prompts."""
        batch, cache = self._batch, self._cache
        size = batch.size
        first_B = batch.column(Column.PROMPT_LENGTH) + batch.column(Column.COUNT) - 1
        view = cache.view(self._make_room(1), first_B, 1, [Chunk(seq.blocks, a, n) for seq, a, n in chunks])
        new_ids = [token for seq, start, count in chunks for token in seq.context_ids[start : start + count]]
        ids_N = torch.cat((batch.column(Column.TOKEN), torch.tensor(new_ids, device=cache.device)))
        output: DecoderOutput = self.decoder(ids_N, view.positions_N, view)
        if self._expert_log is not None:
            self._expert_log.note(view.slot_N, output.expert_ids)
        last, finished, end = list(range(size)), [], size
        for seq, start, count in chunks:
            if self.speculation is not None and self.speculation.drafter.state is not None:
                state_ND = getattr(output, self.speculation.drafter.state)
                self.speculation.drafter.observe(seq, start, state_ND[end : end + count])
            end, done = end + count, start + count
            ids = seq.context_ids
            cache.blocks.seal(ids[:done], seq.blocks)
            self._prefilling[seq] = done
            if done == len(ids):
                del self._prefilling[seq]
                seq.prompt = Prompt(ids, row=0, users=1)
                finished.append(seq)
                last.append(end - 1)
        if not last:
            return Step()
        if finished:
            batch.append(finished)
            for row, seq in enumerate(finished, start=size):
                cache.set_row(row, seq.blocks)
        return self._sample(0, self.decoder.logits(output.hidden_ND[last]))

    def _make_room(self, width: int) -> Any:
        rows = [seq for seq in self._batch.sequences if seq is not None]
        longest = max((len(seq.blocks) for seq in rows), default=0)
        return PagedRows(self._cache.tables[: len(rows), :longest], self._batch.column(Column.PROMPT_LENGTH))

    def _alone(self, context: int, limit: int) -> int:
        drafts = self.speculation.drafter.max_tokens if self.speculation else 0
        return int(self._cache.num_blocks_for(context + limit + 1 + drafts) * self._cache.block_bytes)
