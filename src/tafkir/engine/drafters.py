"""Who guesses the next tokens of a sequence: its own text (n-grams), MTP layers (NEXTN), or a smaller model.

A draft changes what a step costs, never what it says: see `engine.speculative`.

Shapes: B sequences, N tokens of all of them, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tafkir.engine.draft_cache import DraftCache
from tafkir.engine.sequence import Sequence
from tafkir.engine.store import bucket
from tafkir.errors import CapacityError
from tafkir.models.decoder import Decoder
from tafkir.models.draft_chain import DraftChain, DraftTrack
from tafkir.models.mtp import MtpOutput
from tafkir.ops.rope import rope_table
from tafkir.ops.sampling import sample, uniform

__all__ = ["Drafter", "ModelDrafter", "NextnDrafter", "NgramDrafter", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence that wants a draft, and all tokens it has sampled so far, one at least."""

    seq: Sequence
    tokens: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.seq.context_ids, *self.tokens]


class Drafter(Protocol):
    """Guesses tokens. What it keeps of a sequence is dropped when that ends."""

    max_tokens: int
    """Most tokens of one draft."""
    state: str | None
    """Which hidden states of the model it wants to see, a field of `DecoderOutput`; None: none."""

    def observe(self, seq: Sequence, position: int, state_ND: Tensor) -> None:
        """The model's states of a sequence's tokens from `position` on; those of rejected drafts never come."""
        ...

    def draft(self, rows: SequenceOf[Row], most: int) -> list[list[int]]:
        """At most `most` tokens after each sequence's newest one; empty where there is nothing to say."""
        ...

    def drop(self, seq: Sequence) -> None: ...


class NgramDrafter:
    """Prompt lookup: what followed the last time that the newest tokens stood in prompt or answer.

    Args:
        max_tokens: most tokens of a draft.
        longest, shortest: how many tokens must agree; the longest match wins, and of equals the latest.
    """

    state: str | None = None

    def __init__(self, max_tokens: int = 5, longest: int = 4, shortest: int = 2) -> None:
        self.max_tokens, self._sizes = max_tokens, range(longest, shortest - 1, -1)
        self._ids: dict[Sequence, list[int]] = {}
        self._after: dict[Sequence, dict[tuple[int, ...], int]] = {}
        """Where the text went on after an n-gram, for all but the newest ones."""

    def observe(self, seq: Sequence, position: int, state_ND: Tensor) -> None:
        return None

    def draft(self, rows: SequenceOf[Row], most: int) -> list[list[int]]:
        return [self._draft(row, min(most, self.max_tokens)) for row in rows]

    def _draft(self, row: Row, most: int) -> list[int]:
        ids = self._ids.setdefault(row.seq, list(row.seq.context_ids[:1]))
        after = self._after.setdefault(row.seq, {})
        for token in row.ids[len(ids) :]:
            # Only once a token follows it can an n-gram say what comes next.
            for size in self._sizes:
                if len(ids) >= size:
                    after[tuple(ids[-size:])] = len(ids)
            ids.append(token)
        for size in self._sizes:
            place = after.get(tuple(ids[-size:])) if len(ids) >= size else None
            if place is not None:
                # A short loop is read on into what it has just drafted.
                text = ids[place:]
                while len(text) < most:
                    text += text[: most - len(text)]
                return text[:most]
        return []

    def drop(self, seq: Sequence) -> None:
        self._ids.pop(seq, None)
        self._after.pop(seq, None)


def _draw(logits_BV: Tensor, rows: SequenceOf[Row], ahead: int) -> list[int]:
    """A draft's next token, `ahead` draws after the newest one, drawn by the number that the model will draw with."""
    params = [row.seq.request.params for row in rows]
    if all(p.temperature == 0 for p in params):
        return logits_BV.argmax(-1).tolist()
    device = logits_BV.device
    u_B = uniform(
        torch.tensor([row.seq.key for row in rows], device=device),
        torch.tensor([len(row.tokens) + ahead for row in rows], device=device),
    )
    temperature_B, top_p_B = (
        torch.tensor([getattr(p, name) for p in params], device=device) for name in ("temperature", "top_p")
    )
    top_k_B = torch.tensor([p.top_k for p in params], device=device)
    tokens: list[int] = sample(logits_BV, temperature_B, top_k_B, top_p_B, u_B)[0].tolist()
    return tokens


class ModelDrafter:
    """A smaller model with the same vocabulary, one token after the other.

    Args:
        decoder: the smaller model.
        vocab_size: of the model it drafts for.
        max_tokens: most tokens of a draft.

    Raises:
        CapacityError: the vocabularies differ in size.
    """

    state: str | None = None
    _CHUNK = 512

    def __init__(self, decoder: Decoder, vocab_size: int, max_tokens: int = 4) -> None:
        if decoder.config.vocab_size != vocab_size:
            raise CapacityError(
                f"the draft model has {decoder.config.vocab_size} tokens",
                where="speculate",
                expected=f"the model's own {vocab_size}",
                fix="draft with a model that has the same tokenizer",
            )
        self.max_tokens, self._decoder = max_tokens, decoder
        self._cache = DraftCache(decoder.config.num_hidden_layers)
        self._fed: dict[Sequence, int] = {}

    def observe(self, seq: Sequence, position: int, state_ND: Tensor) -> None:
        return None

    @torch.inference_mode()
    def draft(self, rows: SequenceOf[Row], most: int) -> list[list[int]]:
        most = min(most, self.max_tokens)
        drafts: list[list[int]] = [[] for _ in rows]
        ids = [row.ids for row in rows]
        longest = self._decoder.config.max_position_embeddings
        able = [i for i, known in enumerate(ids) if len(known) + most <= longest]
        for ahead in range(most if able else 0):
            hidden_BD = self._feed([rows[i] for i in able], [ids[i] + drafts[i] for i in able])
            for i, token in zip(
                able, _draw(self._decoder.logits(hidden_BD), [rows[i] for i in able], ahead), strict=True
            ):
                drafts[i].append(token)
        for i in able:
            self._fed[rows[i].seq] = len(ids[i])
        return drafts

    def _feed(self, rows: SequenceOf[Row], ids: SequenceOf[list[int]]) -> Tensor:
        """Feed what the cache lacks; the hidden states of the last tokens, [B, D]."""
        for row, known in zip(rows, ids, strict=True):
            while len(known) - self._fed.get(row.seq, 0) > self._CHUNK:
                self._forward([row], [known[: self._fed.get(row.seq, 0) + self._CHUNK]])
        return self._forward(rows, ids)

    def _forward(self, rows: SequenceOf[Row], ids: SequenceOf[list[int]]) -> Tensor:
        starts = [self._fed.get(row.seq, 0) for row in rows]
        parts = [known[start:] for known, start in zip(ids, starts, strict=True)]
        view = self._cache.view([row.seq for row in rows], starts, [len(part) for part in parts])
        for row, known in zip(rows, ids, strict=True):
            self._fed[row.seq] = len(known)
        device = self._decoder.embed_tokens.weight.device
        ids_N = torch.tensor([token for part in parts for token in part], device=device)
        hidden_ND: Tensor = self._decoder(ids_N, view.place_N.to(device), view).hidden_ND
        return hidden_ND[view.last_B]

    def drop(self, seq: Sequence) -> None:
        self._fed.pop(seq, None)
        self._cache.drop(seq)


@dataclass(slots=True)
class _Track:
    """What NEXTN knows of a sequence.

    Attributes:
        position: of the next token whose state is to come.
        states: of the tokens before it that no depth has read yet.
        cached: by depth, rows of the cache that hold for good; what was guessed stands behind them.
        carried: by depth, the state that the depth before gave the first row that has to be read again.
        chain: what the kernel keeps in place of `cached` and `carried`, where it drafts.
    """

    position: int
    cached: list[int]
    carried: list[Tensor | None]
    states: list[Tensor] = field(default_factory=list)
    chain: DraftTrack | None = None


class NextnDrafter:
    """The decoder's own MTP layers (arXiv 2412.19437, section 2.2), as a chain.

    Layer k reads, for position i, the state that layer k - 1 has at i (the model's own for k = 1) and token i + k. A
    draft longer than the chain goes on with its last layer, fed with its own state and the token it drafted, as
    SGLang's NEXTN does with models of one layer.

    Args:
        decoder: with MTP layers.
        max_tokens: most tokens of a draft; None takes the number of layers.

    Raises:
        CapacityError: the decoder has no MTP layers.
    """

    WINDOW = 1024
    """Of a longer prompt, its last tokens are read: layers of their own remember no more than these."""

    def __init__(self, decoder: Decoder, max_tokens: int | None = None) -> None:
        if decoder.mtp is None:
            raise CapacityError(
                "the model has no multi-token-prediction layers",
                where="speculate",
                fix="speculate by ngram, or give it layers: tafkir run mtp-distill",
            )
        self._decoder, self._mtp, shape = decoder, decoder.mtp, decoder.mtp.shape
        self.max_tokens = max_tokens or shape.depth
        self._post_norm = shape.input_state == "post_norm"
        self.state: str | None = "hidden_ND" if self._post_norm else "pre_norm_ND"
        self._chained = shape.chain_hidden
        self._chain = DraftChain(decoder) if DraftChain.takes(decoder) else None
        first = decoder.config.num_hidden_layers
        self._caches = [DraftCache(1, first + k) for k in range(shape.depth)]
        self._tracks: dict[Sequence, _Track] = {}
        self._rope = self._rope_table(0)
        self._device = decoder.embed_tokens.weight.device

    def observe(self, seq: Sequence, position: int, state_ND: Tensor) -> None:
        track = self._tracks.get(seq)
        if track is None:
            depth = len(self._caches)
            track = self._tracks[seq] = _Track(position, [0] * depth, [None] * depth)
            track.chain = self._chain.track() if self._chain is not None else None
        if position != track.position:
            # Steps without drafts lie between; the rows before them stay, and those of the gap are missing.
            track.states, track.carried = [], [None] * len(self._caches)
            if track.chain is not None:
                track.chain.forget_states()
        track.states.append(state_ND)
        track.position = position + len(state_ND)

    @torch.inference_mode()
    def draft(self, rows: SequenceOf[Row], most: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        texts = [row.ids for row in rows]
        able = [i for i, row in enumerate(rows) if self._is_up_to_date(row.seq, len(texts[i]) - 1)]
        if not able:
            return drafts
        if self._chain is not None:
            for i in able:
                drafts[i] = self._draft_alone(self._chain, rows[i], texts[i], min(most, self.max_tokens))
            return drafts
        rows, texts = [rows[i] for i in able], [texts[i] for i in able]
        tracks = [self._tracks[row.seq] for row in rows]
        states = outputs = [torch.cat(track.states)[-self.WINDOW :] for track in tracks]
        ends = [0] * len(rows)
        most = min(most, self.max_tokens)
        for ahead in range(most):
            depth = min(ahead, len(self._caches) - 1)
            if ahead == depth:
                inputs = self._inputs(depth, tracks, outputs if self._chained else states)
                starts = [track.cached[depth] for track in tracks]
                for track, part in zip(tracks, inputs, strict=True):
                    track.cached[depth] += max(0, len(part) - depth)
            else:
                inputs, starts = [part[-1:] for part in outputs], ends
            ends = [start + len(part) for start, part in zip(starts, inputs, strict=True)]
            hidden_BD, outputs = self._run(depth, rows, texts, inputs, starts)
            tokens = _draw(self._decoder.logits(hidden_BD), rows, ahead)
            for i, text, token in zip(able, texts, tokens, strict=True):
                text.append(token)
                drafts[i].append(token)
        for track in tracks:
            track.states = []
            # Layers that had no turn go on without the rows that they miss.
            track.carried[most:] = [None] * len(track.carried[most:])
        return drafts

    def _draft_alone(self, chain: DraftChain, row: Row, text: list[int], most: int) -> list[int]:
        """One sequence, in one call of the kernel."""
        track = self._tracks[row.seq]
        assert track.chain is not None
        state_ND = track.states[0] if len(track.states) == 1 else torch.cat(track.states)
        state_ND, track.states = state_ND[-self.WINDOW :], []
        params, draw = row.seq.request.params, (row.seq.key, len(row.tokens))
        return chain.draft(track.chain, state_ND, text[-len(state_ND) :], len(text) - 2, most, params, draw)

    def _is_up_to_date(self, seq: Sequence, position: int) -> bool:
        track = self._tracks.get(seq)
        return track is not None and bool(track.states) and track.position == position

    def _inputs(self, depth: int, tracks: SequenceOf[_Track], fresh: SequenceOf[Tensor]) -> list[Tensor]:
        """What layer `depth` (from 0) reads of each sequence: rows that it guessed last time, then new ones.

        Its last `depth` rows stand on drafted tokens, so they are read again next time. In a chain the layer before
        computes all of them anew but the first.
        """
        inputs = []
        for track, new_ND in zip(tracks, fresh, strict=True):
            carried = track.carried[depth]
            part = new_ND if carried is None else torch.cat((carried, new_ND))
            again = part[len(part) - depth :] if 0 < depth <= len(part) else None
            track.carried[depth] = again[:1] if again is not None and self._chained else again
            inputs.append(part)
        return inputs

    def _run(
        self,
        depth: int,
        rows: SequenceOf[Row],
        texts: SequenceOf[list[int]],
        inputs: SequenceOf[Tensor],
        starts: SequenceOf[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer over `inputs`: the last hidden states [B, D], for the head, and every row's output state."""
        lengths = [len(part) for part in inputs]
        view = self._caches[depth].view([row.seq for row in rows], starts, lengths)
        ids = [token for text, length in zip(texts, lengths, strict=True) for token in text[-length:]]
        # The newest token of a text stands depth + 1 places after the position that is read with it.
        lasts = [len(text) - 2 - depth for text in texts]
        places = [i for last, length in zip(lasts, lengths, strict=True) for i in range(last - length + 1, last + 1)]
        if max(places) >= len(self._rope[0]):
            self._rope = self._rope_table(max(places))
        positions_N = torch.tensor(places, device=self._device)
        cos, sin = (table.index_select(0, positions_N) for table in self._rope)
        embedded_ND = self._decoder.embed_tokens(torch.tensor(ids, device=self._device))
        input_ND = torch.cat(list(inputs)) if len(inputs) > 1 else inputs[0]
        out: MtpOutput = self._mtp.layers[depth](input_ND, embedded_ND, cos, sin, view)
        state_ND = out.hidden_MD if self._post_norm else out.pre_norm_MD
        return out.hidden_MD[view.last_B], list(state_ND.split(lengths))

    def _rope_table(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to this one, and some more."""
        config = self._decoder.config
        positions = torch.arange(bucket(position + 1), device=self._decoder.embed_tokens.weight.device)
        return rope_table(positions, config.rotary_size, config.rope_theta, config.rope_scaling)

    def drop(self, seq: Sequence) -> None:
        self._tracks.pop(seq, None)
        for cache in self._caches:
            cache.drop(seq)
