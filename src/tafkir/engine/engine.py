"""The in-process completer: admits requests, steps the batch, hands finished completions out.

One thread owns an engine. A step either prefills new prompts or samples one token for every running sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tafkir.engine.batch import Column, RunningBatch
from tafkir.engine.cache_formats import CacheFormat
from tafkir.engine.coded_cache import build_cache
from tafkir.engine.expert_log import ExpertLog
from tafkir.engine.requests import check_request
from tafkir.engine.runner import Runner
from tafkir.engine.scheduler import PromptTable, Scheduler
from tafkir.engine.sequence import Sequence, StopWatch, TokenEvent
from tafkir.engine.shaping import Shaper, shape_rows
from tafkir.engine.speculative import Speculation
from tafkir.engine.text import TextStream
from tafkir.engine.views import Grouping
from tafkir.errors import CapacityError, CheckpointError, RequestError
from tafkir.models.decoder import Decoder
from tafkir.ops.sampling import stream_key, top_logprobs
from tafkir.records import Completion, FinishReason, Request

__all__ = ["Engine", "PrepareWeights", "Step", "TextDecoder", "Weights"]

Weights = Iterable[tuple[str, Tensor]]
PrepareWeights = Callable[[Weights, int], Weights]


class TextDecoder(Protocol):
    """What the engine needs of a tokenizer, for stop strings only."""

    def decode(self, ids: SequenceOf[int], /) -> str: ...


@dataclass(slots=True)
class Step:
    """What one step sampled: rows from `first` on, and which of them ended.

    A step that checked drafts has `events` in place of tokens, in order, several a row.
    """

    first: int = 0
    sequences: list[Sequence | None] = field(default_factory=list)
    tokens: Tensor | None = None
    logprobs: Tensor | None = None
    tops: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    ended: dict[int, Completion] = field(default_factory=dict)
    events: list[TokenEvent] = field(default_factory=list)


class Engine:
    """Continuous batching on one decoder; implements `Completer`.

    Args:
        decoder: the policy. Its parameters are read in place, and `load_weights` writes to them.
        eos_ids: tokens that end every completion.
        max_batch: most sequences that run at once.
        max_context: most tokens of a prompt and its completion together; None takes the decoder's.
        max_cache_bytes: limit of the key-value cache; None leaves it to max_batch and max_context.
        max_prefill_tokens: most prompt tokens in one forward pass.
        tokenizer: needed for stop strings only.
        policy_version: what completions carry until `load_weights` sets another.
        prepare_weights: what every policy goes through on its way in, such as a quantization: from (name, tensor)
            pairs and their version to pairs of the same names.
        record_experts: say in each completion which experts its tokens went to (`Completion.expert_ids`).
        kv_cache: number format of the cache; auto takes the weights' dtype.
        kv_scales: of keys and of values in every layer, for `kv_cache` in codes; None takes the format's own.
        speculation: drafts tokens and has several checked in one step; None samples one a step.

    Raises:
        CapacityError: max_context exceeds what the decoder was built for, or its heads do not fit the cache's format.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        eos_ids: SequenceOf[int],
        max_batch: int = 256,
        max_context: int | None = None,
        max_cache_bytes: int | None = None,
        max_prefill_tokens: int = 8192,
        tokenizer: TextDecoder | None = None,
        policy_version: int = 0,
        prepare_weights: PrepareWeights | None = None,
        record_experts: bool = False,
        kv_cache: CacheFormat = "auto",
        kv_scales: SequenceOf[tuple[float, float]] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        config = decoder.config
        longest = config.max_position_embeddings
        self.max_context = longest if max_context is None else max_context
        if not 2 <= self.max_context <= longest:
            raise CapacityError(f"max_context={self.max_context}", where="engine", expected=f"2 to {longest}")
        if max_batch < 1:
            raise CapacityError(f"max_batch={max_batch}", where="engine", expected="1 or larger")
        self.decoder, self.tokenizer = decoder, tokenizer
        self.eos_ids, self.policy_version = tuple(eos_ids), policy_version
        weight = decoder.embed_tokens.weight
        self.max_batch = max_batch
        self.prepare_weights = prepare_weights
        # A dense decoder has nothing to record.
        records = record_experts and bool(decoder.routers)
        self._cache, self._expert_log = self._build_cache(max_cache_bytes, kv_cache, kv_scales, records)
        self.speculation = speculation
        kept_state = speculation.drafter.state if speculation else None
        self._runner = Runner(decoder, self._cache, self._expert_log, kept_state)
        self._scheduler = Scheduler(max_batch, max_prefill_tokens)
        self._prompts = PromptTable()
        self._batch = RunningBatch(weight.device)
        self._grouping: Grouping | None = None
        self._by_id: dict[str, Sequence] = {}
        self._num_arrived = 0
        self.num_preemptions = 0
        """Sequences that had to give their room back."""
        self.prefix_queries = self.prefix_hits = 0
        """Prompt tokens that were looked up among what earlier requests have left, and those that were found."""
        self.batch_invariant = False
        """Whether a request's numbers are the same to the bit in any company."""

    def _build_cache(
        self,
        max_bytes: int | None,
        kv_cache: CacheFormat,
        scales: SequenceOf[tuple[float, float]] | None,
        records: bool,
    ) -> tuple[Any, Any]:
        """The cache, and what remembers experts where that is asked for."""
        weight = self.decoder.embed_tokens.weight.detach()
        cache = build_cache(self.decoder.config, weight, max_bytes, kv_cache, scales)
        return cache, ExpertLog() if records else None

    # --- Completer -------------------------------------------------------------------------------------------------

    def complete(self, requests: SequenceOf[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish.

        Every request is checked before the first one runs. Requests without a seed take a fresh one. Closing the
        iterator early cancels what has not finished.

        Raises:
            RequestError: a request is not valid, or others are still running.
            CapacityError: a request can never fit in the cache.
        """
        if self._by_id:
            raise RequestError(
                f"{len(self._by_id)} requests are still running",
                where="engine",
                expected="an idle engine",
                fix="finish or cancel them first",
            )
        sequences = [self._sequence(request, 0) for request in requests]
        ids = {seq.request.id for seq in sequences}
        if len(ids) < len(sequences):
            raise RequestError("two requests have the same id", where="engine", expected="distinct ids")
        return self._complete(sequences)

    def _complete(self, sequences: list[Sequence]) -> Iterator[Completion]:
        for seq in sequences:
            self._enqueue(seq)
        try:
            while self._by_id:
                yield from self._advance().ended.values()
        finally:
            for request_id in list(self._by_id):
                self.cancel(request_id)

    @torch.inference_mode()
    def _score(self, sequences: SequenceOf[SequenceOf[int]]) -> list[Tensor]:
        return self._runner.score(sequences)

    def score(self, token_ids: SequenceOf[SequenceOf[int]]) -> list[Tensor]:
        """Teacher-forced log-probabilities at temperature 1: for n tokens, n - 1 float32 values on the CPU.

        Raises:
            RequestError: a sequence has fewer than two tokens, a token out of the vocabulary, or too many tokens.
        """
        for i, ids in enumerate(token_ids):
            self._check_scorable(i, ids)
        results: list[Tensor | None] = [None] * len(token_ids)
        # Alike lengths share a pass, so that padding inside attention stays small.
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        while order:
            chunk, tokens = [order.pop()], len(token_ids[order[-1]]) if order else 0
            while order and tokens + len(token_ids[order[-1]]) <= self._scheduler.max_prefill_tokens:
                tokens += len(token_ids[order[-1]])
                chunk.append(order.pop())
            for i, logprobs in zip(chunk, self._score([token_ids[i] for i in chunk]), strict=True):
                # A clone made outside inference mode may take part in a loss.
                results[i] = logprobs.to("cpu").clone()
        return [logprobs for logprobs in results if logprobs is not None]

    def _check_scorable(self, index: int, ids: SequenceOf[int]) -> None:
        vocab, longest = self.decoder.config.vocab_size, self.decoder.config.max_position_embeddings
        if not 2 <= len(ids) <= longest:
            raise RequestError(f"{len(ids)} tokens", where=f"sequence {index}", expected=f"2 to {longest} tokens")
        if not all(0 <= token < vocab for token in ids):
            raise RequestError("a token id is out of range", where=f"sequence {index}", expected=f"0 to {vocab - 1}")

    @torch.no_grad()
    def load_weights(self, weights: Weights, version: int) -> None:
        """Copy new values into the decoder, by way of `prepare_weights`.

        Every name of its state dict must come, and nothing is half-loaded.

        Raises:
            CheckpointError: a name is unknown or missing, or a shape differs.
            RequestError: requests are running; their cache would belong to the old weights.
        """
        if self._by_id:
            raise RequestError(
                f"{len(self._by_id)} requests are still running", where="load_weights", expected="an idle engine"
            )
        new = dict(weights if self.prepare_weights is None else self.prepare_weights(weights, version))
        own = self.decoder.state_dict()
        for kind, names in (("unknown", new.keys() - own.keys()), ("missing", own.keys() - new.keys())):
            if names:
                raise CheckpointError(
                    f"{len(names)} {kind} weights", where=min(names), expected="the names of the decoder's state dict"
                )
        for name, tensor in new.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(f"shape {tuple(tensor.shape)}", where=name, expected=f"{tuple(own[name].shape)}")
        for name, tensor in new.items():
            own[name].copy_(tensor)
        self.policy_version = version

    def forget_prefixes(self) -> None:
        """Begin no later prompt with what earlier ones have left."""

    # --- incremental -----------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return self._batch.num_alive

    @property
    def waiting_ids(self) -> set[str]:
        """Requests that have not begun, or had to give their room back."""
        return {seq.request.id for seq in self._scheduler.waiting}

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache at this moment."""
        return int(self._cache.num_bytes)

    @property
    def cache_usage(self) -> float:
        """Share of the cache in use, 0 to 1; 0 where it has no limit."""
        return float(self._cache.num_bytes / self._cache.max_bytes) if self._cache.max_bytes else 0.0

    def check(self, request: Request, *, top_logprobs: int = 0) -> None:
        """Raises RequestError or CapacityError when the request could not run. Any thread may call this."""
        check_request(
            request,
            vocab_size=self.decoder.config.vocab_size,
            max_context=self.max_context,
            can_decode=self.tokenizer is not None,
            top_logprobs=top_logprobs,
        )
        needed = self._alone(len(request.prompt_ids) + len(request.prefix_ids), self._limit(request))
        if self._cache.max_bytes is not None and needed > self._cache.max_bytes:
            raise CapacityError(
                f"the request needs {needed} bytes of key-value cache",
                where=f"request {request.id!r}",
                expected=f"at most {self._cache.max_bytes}",
                fix="shorten the prompt, lower max_tokens, or raise the cache limit",
            )

    def _alone(self, context: int, limit: int) -> int:
        """Bytes that a request of so many tokens takes in an empty cache."""
        return int(self._cache.alone(context, limit))

    def add_request(self, request: Request, *, top_logprobs: int = 0, shaper: Shaper | None = None) -> None:
        """Queue a request; `step` reports its tokens.

        Args:
            top_logprobs: how many of the most probable tokens to report with each sampled one.
            shaper: changes the logits before each draw; reported log-probabilities stay those of the model. Its
                `error` ends the sequence as cancelled.

        Raises:
            RequestError: the request is not valid, or its id is in use.
            CapacityError: it can never fit in the cache.
        """
        if request.id in self._by_id:
            raise RequestError("the id is in use", where=f"request {request.id!r}", expected="a fresh id")
        seq = self._sequence(request, top_logprobs)
        seq.shaper = shaper
        self._enqueue(seq)

    def step(self) -> list[TokenEvent]:
        """Prefill waiting prompts or sample one token per running sequence; one event per sampled token."""
        step = self._advance()
        if step.tokens is None or step.logprobs is None:
            return step.events
        rows = zip(step.sequences, step.tokens.tolist(), step.logprobs.tolist(), strict=True)
        return [
            TokenEvent(
                seq.request.id,
                token,
                logprob,
                step.ended[row].finish_reason if row in step.ended else None,
                step.tops.get(row, ()),
            )
            for row, (seq, token, logprob) in enumerate(rows, start=step.first)
            if seq is not None
        ]

    @torch.inference_mode()
    def cancel(self, request_id: str) -> Completion | None:
        """Stop a request at once; what it has sampled so far, or None when no such request is unfinished."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return None
        if self._scheduler.remove(request_id) is not None:
            del self._by_id[request_id]
            return self._unfinished(seq)
        row = self._batch.sequences.index(seq)
        return self._end({row: "cancelled"})[row]

    def _unfinished(self, seq: Sequence) -> Completion:
        """What a sequence without a row has sampled."""
        return Completion(seq.request.id, seq.kept_ids, seq.kept_logprobs, "cancelled", self.policy_version)

    @torch.inference_mode()
    def cancel_all(self) -> list[Completion]:
        """Stop every request, running or waiting; what each has sampled so far, those without a token last."""
        waiting = [self._unfinished(seq) for seq in self._scheduler]
        for seq in list(self._scheduler):
            self._scheduler.remove(seq.request.id)
            del self._by_id[seq.request.id]
        running = [row for row, seq in enumerate(self._batch.sequences) if seq is not None]
        if not running:
            return waiting
        return [*self._end(dict.fromkeys(running, "cancelled")).values(), *waiting]

    # --- one step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _advance(self) -> Step:
        self._compact()
        admitted = self._admit()
        if admitted:
            return self._prefill(admitted)
        return self._step_running()

    def _step_running(self) -> Step:
        """One step of the running sequences alone, with drafts or without."""
        if not self._batch.num_alive:
            return Step()
        return self._decode() if self.speculation is None else self._decode_timed(self.speculation)

    def _decode(self) -> Step:
        """One token for each running sequence."""
        grouping = self._make_room(1)
        return self._sample(0, self._runner.decode(self._batch, grouping))

    def _decode_timed(self, speculation: Speculation) -> Step:
        """A step with drafts where they pay, else a plain one."""
        alive, began = self._batch.num_alive, speculation.clock()
        speculated = speculation.wanted(alive)
        step = self._check_drafts(speculation) if speculated else self._decode()
        speculation.note_step(alive, speculated, len(step.events) or alive, speculation.clock() - began)
        return step

    def _check_drafts(self, speculation: Speculation) -> Step:
        """Feed drafts behind the newest tokens, and keep what the model would have said itself."""
        # A row that has ended has no room for more tokens.
        self._compact(force=True)
        batch = self._batch
        drafts = speculation.draft(batch)
        if not any(drafts) and speculation.drafter.state is None:
            return self._decode()
        grouping = self._make_room(1 + max(map(len, drafts)))
        output = self._runner.feed(batch, grouping, speculation.fed(batch, drafts))
        kept = speculation.check(batch, drafts, self.decoder.logits(output.hidden_ND))
        batch.keep([row.tokens for row in kept], [row.logprobs for row in kept])
        speculation.observe(batch, kept, output)
        step = Step()
        for row, seq in zip(kept, batch.sequences, strict=True):
            assert seq is not None
            step.events += row.events(seq.request.id)
        if ended := {i: row.reason for i, row in enumerate(kept) if row.reason is not None}:
            step.ended = self._end(ended)
        return step

    def _make_room(self, width: int) -> Grouping:
        """See to it that every row may be fed its newest token and `width` - 1 more (`Runner.feed`)."""
        self._cache.reserve(self._scheduler.row_capacity(self._batch.size), self._batch.longest + width - 1)
        if self._grouping is None:
            self._grouping = self._group()
        return self._grouping

    def _admit(self) -> list[Sequence]:
        if not self._scheduler.waiting:
            return []
        batch = self._batch
        limit = int(batch.column(Column.LIMIT).max()) if batch.size else 0
        admitted = self._scheduler.admit(batch.num_alive, limit, self._prompts, self._cache)
        if not admitted and not batch.size:
            # An idle cache may still hold the shape of earlier requests; alone, any accepted request fits.
            self._cache.clear()
            admitted = self._scheduler.admit(0, 0, self._prompts, self._cache)
        return admitted

    def _prefill(self, admitted: list[Sequence]) -> Step:
        self._compact(force=True)
        fresh = []
        for seq in admitted:
            seq.prompt, is_new = self._prompts.acquire(seq.context_ids)
            if is_new:
                fresh.append(seq.prompt)
        if fresh:
            longest = max(len(prompt.ids) for prompt in fresh)
            self._cache.reserve_prompts(self._scheduler.row_capacity(len(self._prompts)), longest)
            for prompt, hidden_D in zip(fresh, self._runner.prefill(fresh).unbind(), strict=True):
                prompt.hidden_D = hidden_D
        first = self._batch.size
        self._batch.append(admitted)
        if self.speculation is not None:
            self.speculation.start(admitted)
        self._cache.reserve(self._scheduler.row_capacity(self._batch.size), 1)
        self._grouping = None
        hidden = [seq.prompt.hidden_D for seq in admitted if seq.prompt is not None and seq.prompt.hidden_D is not None]
        return self._sample(first, self.decoder.logits(torch.stack(hidden)))

    def _sample(self, first: int, logits_BV: Tensor) -> Step:
        batch = self._batch
        shapers = {row: s.shaper for row, s in enumerate(batch.sequences[first:]) if s is not None and s.shaper}
        rows = list(shapers)
        shaped = None
        if rows:
            whole = len(rows) == len(logits_BV)
            shaped = rows, shape_rows(list(shapers.values()), logits_BV if whole else logits_BV[rows])
        tokens, logprobs, ended_B, stopped_B = batch.record(first, logits_BV, shaped)
        step = Step(first, batch.sequences[first:], tokens, logprobs)
        reasons: dict[int, FinishReason] = {}
        ended = ended_B.nonzero().squeeze(1).tolist()
        if ended:
            for row, stopped in zip(ended, stopped_B[ended].tolist(), strict=True):
                reasons[first + row] = "stop" if stopped else "length"
        if any(seq is not None and (seq.watch or seq.top_logprobs) for seq in step.sequences):
            self._watch(step, logits_BV, reasons)
        for (row, shaper), token in zip(shapers.items(), tokens[rows].tolist() if rows else (), strict=True):
            shaper.push(token)
            if shaper.error is not None:
                reasons[first + row] = "cancelled"
        if reasons:
            step.ended = self._end(reasons)
        return step

    def _watch(self, step: Step, logits_BV: Tensor, reasons: dict[int, FinishReason]) -> None:
        """Stop strings and alternatives, for the sequences that asked for them."""
        assert step.tokens is not None
        for row, (seq, token) in enumerate(zip(step.sequences, step.tokens.tolist(), strict=True)):
            if seq is None:
                continue
            # A stop token ends the text; what it would decode to is not part of it.
            by_token = reasons.get(step.first + row) == "stop"
            if seq.watch and not by_token and seq.watch.push(token):
                reasons[step.first + row] = "stop"
            if seq.top_logprobs:
                temperature = torch.tensor([seq.request.params.temperature], device=logits_BV.device)
                ids, values = top_logprobs(logits_BV[row : row + 1], temperature, seq.top_logprobs)
                step.tops[step.first + row] = tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True))

    def _end(self, reasons: dict[int, FinishReason]) -> dict[int, Completion]:
        rows = list(reasons)
        completions = {}
        for row, (tokens, logprobs) in zip(rows, self._batch.end(rows), strict=True):
            seq = self._batch.sequences[row]
            assert seq is not None and seq.prompt is not None
            seq.prompt.users -= 1
            self._batch.sequences[row] = None
            experts = None if self._expert_log is None else self._expert_log.take(seq, len(tokens))
            self._leave(seq, tokens)
            del self._by_id[seq.request.id]
            if self.speculation is not None:
                self.speculation.drafter.drop(seq)
            completions[row] = Completion(
                seq.request.id,
                seq.kept_ids + tuple(tokens),
                seq.kept_logprobs + tuple(logprobs),
                reasons[row],
                self.policy_version,
                experts,
            )
        return completions

    def _leave(self, seq: Sequence, tokens: SequenceOf[int]) -> None:
        """A sequence gives its row back; it has sampled `tokens` there."""

    def _compact(self, force: bool = False) -> None:
        """Give the rows of ended sequences back: when enough have ended to be worth the copy, or before a prefill."""
        batch, scheduler = self._batch, self._scheduler
        ended = batch.size - batch.num_alive
        wanted = scheduler.waiting and scheduler.max_batch - batch.num_alive >= scheduler.slack
        if not ended or not (force or wanted or ended * 16 >= batch.size):
            return
        longest = batch.longest
        src, dst = batch.compact()
        if len(src):
            self._cache.move(src, dst, longest)
        moves = self._prompts.compact()
        self._grouping = None
        if batch.size:
            rows = batch.column(Column.PROMPT_ROW)
            prompts = [seq.prompt.row for seq in batch.sequences if seq is not None and seq.prompt is not None]
            rows.copy_(torch.tensor(prompts))
        if moves:
            device = self._runner.device
            old, new = (torch.tensor(list(column), device=device) for column in zip(*moves, strict=True))
            self._cache.move_prompts(old, new, max(len(prompt.ids) for prompt in self._prompts.prompts))

    def _group(self) -> Grouping:
        lengths = torch.tensor([len(prompt.ids) for prompt in self._prompts.prompts], device=self._runner.device)
        dtype = self.decoder.embed_tokens.weight.dtype
        return Grouping.build(self._batch.column(Column.PROMPT_ROW), lengths, self._cache.num_heads, dtype)

    # --- requests --------------------------------------------------------------------------------------------------

    def _limit(self, request: Request) -> int:
        return min(request.params.max_tokens, self.max_context - len(request.prompt_ids)) - len(request.prefix_ids)

    def _sequence(self, request: Request, top: int) -> Sequence:
        self.check(request, top_logprobs=top)
        params = request.params
        seed = secrets.randbits(64) if params.seed is None else params.seed
        watch = None
        if params.stop and self.tokenizer is not None:
            tokenizer = self.tokenizer
            watch = StopWatch(TextStream(tokenizer.decode), params.stop)
            for token in request.prefix_ids:
                watch.push(token)
        stop_ids = tuple(dict.fromkeys((*self.eos_ids, *params.stop_token_ids)))
        key = stream_key(seed, len(request.prefix_ids))
        return Sequence(request, key, self._limit(request), stop_ids, top, watch)

    def _enqueue(self, seq: Sequence) -> None:
        self._by_id[seq.request.id] = seq
        self._num_arrived += 1
        seq.arrival = self._num_arrived
        self._scheduler.add(seq)
