"""Keys and values of the running sequences, in two stores: one row per distinct prompt, one row per sequence.

Sequences that share a prompt share its row, so a group of RL completions reads its prompt once per step. Rows are
dense (0..rows-1) and capacities grow in powers of two. The views implement `AttentionState` for the decoder.

Shapes: N tokens, H query heads, G key-value heads, K head_dim, R query heads per kv head (H = G R), P prompts,
M most sequences of one prompt, B sequences, S cached length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.errors import CapacityError
from tafkir.models.attention import VarlenCausal
from tafkir.recipe.model import ModelConfig

__all__ = ["DecodeView", "Grouping", "KVCache", "PrefillView", "bucket"]

_SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """The capacity that holds `length`: the next power of two, 32 at least."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class _Store:
    """One growing tensor per layer and kind; axis 0 is the row, `length_dim` the position."""

    def __init__(self, shape: tuple[int, ...], length_dim: int, num_tensors: int, like: Tensor) -> None:
        self._shape, self._length_dim, self._like = shape, length_dim, like
        self.tensors = [like.new_empty(self._size(0, 0)) for _ in range(num_tensors)]
        self.rows = self.length = 0

    def _size(self, rows: int, length: int) -> tuple[int, ...]:
        size = [rows, *self._shape]
        size[self._length_dim] = length
        return tuple(size)

    def reserve(self, rows: int, length: int) -> None:
        """Grow to at least this many rows and positions; what is stored stays, row for row."""
        if rows <= self.rows and length <= self.length:
            return
        rows, length = max(rows, self.rows), max(length, self.length)
        size = self._size(rows, length)
        for i, old in enumerate(self.tensors):
            # Zeros, because a masked position still enters the matmul: NaN from fresh memory would spread.
            new = self._like.new_zeros(size)
            if old.numel():
                new[: self.rows].narrow(self._length_dim, 0, self.length).copy_(old)
            self.tensors[i] = new
        self.rows, self.length = rows, length

    def move(self, src: Tensor, dst: Tensor, length: int) -> None:
        """Copy the first `length` positions of the rows `src` over the rows `dst`."""
        for tensor in self.tensors:
            part = tensor.narrow(self._length_dim, 0, min(length, self.length))
            part[dst] = part[src]

    def clear(self) -> None:
        self.tensors = [self._like.new_empty(self._size(0, 0)) for _ in self.tensors]
        self.rows = self.length = 0


class KVCache:
    """Storage for the keys and values of all layers.

    Args:
        config: the decoder's shape.
        like: a tensor whose dtype and device the cache takes.
        max_bytes: never hold more than this; None sets no limit of its own.
    """

    def __init__(self, config: ModelConfig, like: Tensor, max_bytes: int | None = None) -> None:
        heads, dim = config.num_key_value_heads, config.head_dim
        self.num_layers, self.max_bytes = config.num_hidden_layers, max_bytes
        self._position_bytes = config.kv_bytes_per_token(like.element_size())
        # A prompt is written once and read often, so its keys lie the way that the matmul reads best.
        self.prompt_keys = _Store((heads, dim, 0), 3, self.num_layers, like)
        self.prompt_values = _Store((heads, 0, dim), 2, self.num_layers, like)
        self.keys = _Store((heads, 0, dim), 2, self.num_layers, like)
        self.values = _Store((heads, 0, dim), 2, self.num_layers, like)

    def bytes_for(self, prompt_rows: int, prompt_length: int, rows: int, length: int) -> int:
        """Bytes of the cache once it holds this much (lengths in tokens; 0 asks for nothing)."""
        prompt_rows = max(prompt_rows, self.prompt_keys.rows)
        prompt_length = max(bucket(prompt_length) if prompt_length else 0, self.prompt_keys.length)
        rows, length = max(rows, self.keys.rows), max(bucket(length) if length else 0, self.keys.length)
        return (prompt_rows * prompt_length + rows * length) * self._position_bytes

    def fits(self, prompt_rows: int, prompt_length: int, rows: int, length: int) -> bool:
        needed = self.bytes_for(prompt_rows, prompt_length, rows, length)
        return self.max_bytes is None or needed <= self.max_bytes

    def alone(self, prompt_length: int, length: int) -> int:
        """Bytes that one request takes in an empty cache."""
        return (bucket(prompt_length) + bucket(length)) * self._position_bytes

    @property
    def num_bytes(self) -> int:
        return self.bytes_for(0, 0, 0, 0)

    def reserve_prompts(self, rows: int, length: int) -> None:
        self._reserve((self.prompt_keys, self.prompt_values), rows, length)

    def reserve(self, rows: int, length: int) -> None:
        self._reserve((self.keys, self.values), rows, length)

    def _reserve(self, stores: tuple[_Store, _Store], rows: int, length: int) -> None:
        try:
            for store in stores:
                store.reserve(rows, bucket(length))
        except (RuntimeError, MemoryError) as error:
            if "alloc" not in str(error) and not isinstance(error, MemoryError):
                raise
            raise CapacityError(
                f"the key-value cache cannot grow to {rows} rows of {length} tokens",
                where="engine",
                expected=f"{rows * bucket(length) * self._position_bytes / 2**20:.0f} MiB free",
                fix="lower max_batch or max_context, or set a cache limit",
            ) from error

    def move_prompts(self, src: Tensor, dst: Tensor, length: int) -> None:
        self.prompt_keys.move(src, dst, length)
        self.prompt_values.move(src, dst, length)

    def move(self, src: Tensor, dst: Tensor, length: int) -> None:
        self.keys.move(src, dst, length)
        self.values.move(src, dst, length)

    def clear(self) -> None:
        """Give all memory back."""
        for store in (self.prompt_keys, self.prompt_values, self.keys, self.values):
            store.clear()


class PrefillView:
    """Attention for whole prompts, packed without padding; their keys and values land in the prompt rows.

    The scores are those of the training forward (`VarlenCausal`), bit for bit.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        self._causal = VarlenCausal(bounds, device=device)
        self._cache = cache
        repeats = torch.tensor(lengths, device=device)
        self._rows_N = torch.tensor(rows, device=device).repeat_interleave(repeats)
        starts = torch.tensor(bounds[:-1], device=device).repeat_interleave(repeats)
        self.positions_N = torch.arange(bounds[-1], device=device) - starts
        self.last_N = torch.tensor(bounds[1:], device=device) - 1

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        keys_PGKS = self._cache.prompt_keys.tensors[layer_idx]
        values_PGSK = self._cache.prompt_values.tensors[layer_idx]
        keys_PGKS.permute(0, 3, 1, 2)[self._rows_N, self.positions_N] = k_NGK
        values_PGSK.permute(0, 2, 1, 3)[self._rows_N, self.positions_N] = v_NGK
        return self._causal.attend(layer_idx, q_NHK, k_NGK, v_NGK)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which sequences read which prompt row. It changes only when sequences come or go.

    `members_F` lists, for each of P x M places (flat), the sequence that stands there (0 where none does);
    `prompt_B` and `place_B` say where each sequence stands.
    """

    members_F: Tensor
    prompt_B: Tensor
    place_B: Tensor
    num_prompts: int
    num_places: int
    prompt_mask_P1S: Tensor
    prompt_length: int

    @staticmethod
    def build(prompt_B: Tensor, prompt_lengths_P: Tensor, num_heads: int, dtype: torch.dtype) -> Grouping:
        """Args:
        prompt_B: int64, the prompt row of each sequence.
        prompt_lengths_P: int64, tokens of each prompt row.
        num_heads: kv heads; the mask is repeated for them.
        """
        num_prompts = len(prompt_lengths_P)
        sorted_B, order_B = torch.sort(prompt_B, stable=True)
        counts_P = torch.bincount(prompt_B, minlength=num_prompts)
        first_P = counts_P.cumsum(0) - counts_P
        place_B = torch.empty_like(prompt_B)
        place_B[order_B] = torch.arange(len(prompt_B), device=prompt_B.device) - first_P[sorted_B]
        num_places = int(counts_P.max())
        members_F = torch.zeros(num_prompts * num_places, dtype=torch.int64, device=prompt_B.device)
        members_F[prompt_B * num_places + place_B] = torch.arange(len(prompt_B), device=prompt_B.device)
        longest = int(prompt_lengths_P.max())
        mask_P1S = _length_mask(prompt_lengths_P.repeat_interleave(num_heads), longest, dtype)
        return Grouping(members_F, prompt_B, place_B, num_prompts, num_places, mask_P1S, longest)


def _length_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, longest]: 0 where a position is below the row's length, -inf elsewhere."""
    outside = torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(outside.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(outside, -torch.inf).unsqueeze(1)


class DecodeView:
    """Attention for one new token of each sequence: over its prompt's row, then over its own row.

    The two parts are softmaxed apart and merged with their maxima, which equals one softmax over both.

    Args:
        grouping: who shares which prompt.
        cached_B: int64, tokens in each sequence's own row before this step; the new one is written there.
        longest: upper bound of `cached_B`, plus one.
    """

    def __init__(self, cache: KVCache, grouping: Grouping, cached_B: Tensor, longest: int) -> None:
        self._cache, self._grouping, self._longest = cache, grouping, longest
        self._batch = len(cached_B)
        keys = cache.keys.tensors[0]
        self._heads, self._capacity = keys.shape[1], keys.shape[2]
        row_BG = torch.arange(self._batch * self._heads, device=cached_B.device)
        cached_BG = cached_B.repeat_interleave(self._heads)
        self._write_BG = row_BG * self._capacity + cached_BG
        self._mask_B1S = _length_mask(cached_BG + 1, longest, keys.dtype)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        own = self._own(layer_idx, q_NHK, k_NGK, v_NGK)
        prompt = self._prompt(layer_idx, q_NHK)
        shape = (self._batch, q_NHK.shape[1], -1)
        (out, total, peak), (out_p, total_p, peak_p) = (tuple(x.reshape(shape) for x in part) for part in (own, prompt))
        peak_all = torch.maximum(peak, peak_p)
        scale, scale_p = (peak - peak_all).exp_(), (peak_p - peak_all).exp_()
        merged = (out * scale).addcmul_(out_p, scale_p)
        return merged.div_((total * scale).addcmul_(total_p, scale_p)).to(q_NHK.dtype)

    def _own(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = q_NHK.shape[-1]
        keys, values = (store.tensors[layer_idx].view(-1, dim) for store in (self._cache.keys, self._cache.values))
        keys.index_copy_(0, self._write_BG, k_NGK.reshape(-1, dim))
        values.index_copy_(0, self._write_BG, v_NGK.reshape(-1, dim))
        rows = self._batch * self._heads
        keys_BSK = keys.view(-1, self._capacity, dim)[:rows, : self._longest]
        values_BSK = values.view(-1, self._capacity, dim)[:rows, : self._longest]
        q_BRK = q_NHK.reshape(rows, -1, dim)
        return _partial_softmax(q_BRK, keys_BSK.transpose(1, 2), values_BSK, self._mask_B1S)

    def _prompt(self, layer_idx: int, q_NHK: Tensor) -> tuple[Tensor, ...]:
        group = self._grouping
        dim = q_NHK.shape[-1]
        places = (group.num_prompts, group.num_places, self._heads, -1, dim)
        rows = group.num_prompts * self._heads
        q_PMGRK = q_NHK.reshape(self._batch, -1).index_select(0, group.members_F).view(places)
        q_PQK = q_PMGRK.transpose(1, 2).reshape(rows, -1, dim)
        keys_PKS = self._cache.prompt_keys.tensors[layer_idx].flatten(0, 1)[:rows, :, : group.prompt_length]
        values_PSK = self._cache.prompt_values.tensors[layer_idx].flatten(0, 1)[:rows, : group.prompt_length]
        parts = torch.cat(_partial_softmax(q_PQK, keys_PKS, values_PSK, group.prompt_mask_P1S), dim=-1)
        parts_PMGR = parts.view(*places[:1], self._heads, group.num_places, -1, dim + 2).transpose(1, 2)
        parts_B = parts_PMGR[group.prompt_B, group.place_B]
        return parts_B[..., :dim], parts_B[..., dim : dim + 1], parts_B[..., dim + 1 :]


def _partial_softmax(q: Tensor, keys_KS: Tensor, values_SK: Tensor, mask_1S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention over some of the positions: weighted values, sum of weights, largest score."""
    scores = torch.baddbmm(mask_1S, q, keys_KS, alpha=q.shape[-1] ** -0.5).float()
    peak = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    out = torch.bmm(weights.to(values_SK.dtype), values_SK).float()
    return out, weights.sum(dim=-1, keepdim=True), peak
