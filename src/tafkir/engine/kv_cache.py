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

    Attributes:
        members_F: for each of P x M places (flat), the sequence that stands there; 0 where none does.
        prompt_B: the prompt row of each sequence.
        place_B: its place among the prompt's sequences.
        regular: every place is taken, in the order of the sequences, so that grouping is a mere reshape.
        mask_P1S: 0 where a position is below the prompt's length, -inf elsewhere; prompt rows repeated per kv head.
    """

    members_F: Tensor
    prompt_B: Tensor
    place_B: Tensor
    num_prompts: int
    num_places: int
    regular: bool
    mask_P1S: Tensor

    @staticmethod
    def build(prompt_B: Tensor, prompt_lengths_P: Tensor, num_heads: int, dtype: torch.dtype) -> Grouping:
        """Args:
        prompt_B: int64, the prompt row of each sequence.
        prompt_lengths_P: int64, tokens of each prompt row.
        num_heads: kv heads.
        dtype: of the cache.
        """
        num_prompts, batch = len(prompt_lengths_P), len(prompt_B)
        sorted_B, order_B = torch.sort(prompt_B, stable=True)
        counts_P = torch.bincount(prompt_B, minlength=num_prompts)
        first_P = counts_P.cumsum(0) - counts_P
        rows_B = torch.arange(batch, device=prompt_B.device)
        place_B = torch.empty_like(prompt_B)
        place_B[order_B] = rows_B - first_P[sorted_B]
        num_places = int(counts_P.max())
        members_F = torch.zeros(num_prompts * num_places, dtype=torch.int64, device=prompt_B.device)
        members_F[prompt_B * num_places + place_B] = rows_B
        regular = len(members_F) == batch and bool((members_F == rows_B).all())
        mask_P1S = _length_mask(prompt_lengths_P.repeat_interleave(num_heads), int(prompt_lengths_P.max()), dtype)
        return Grouping(members_F, prompt_B, place_B, num_prompts, num_places, regular, mask_P1S)

    def gather(self, x_BGRx: Tensor) -> Tensor:
        """Sequences to groups: [B, G, R, x] to [P G, M R, x]."""
        _, heads, repeats, width = x_BGRx.shape
        if not self.regular:
            x_BGRx = x_BGRx.index_select(0, self.members_F)
        x_PMGRx = x_BGRx.reshape(self.num_prompts, self.num_places, heads, repeats, width)
        return x_PMGRx.transpose(1, 2).reshape(self.num_prompts * heads, self.num_places * repeats, width)

    def scatter(self, x_PQx: Tensor, heads: int) -> Tensor:
        """Groups back to sequences: [P G, M R, x] to [B, G, R, x]."""
        width = x_PQx.shape[-1]
        x_PMGRx = x_PQx.view(self.num_prompts, heads, self.num_places, -1, width).transpose(1, 2)
        return x_PMGRx.flatten(0, 1) if self.regular else x_PMGRx[self.prompt_B, self.place_B]


def _length_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, longest]: 0 where a position is below the row's length, -inf elsewhere."""
    outside = torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(outside.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(outside, -torch.inf).unsqueeze(1)


class DecodeView:
    """Attention for one new token of each sequence: over its prompt's row and its own row, under one softmax.

    The queries of all sequences that share a prompt meet its keys in one matmul.

    Args:
        grouping: who shares which prompt.
        cached_B: int64, tokens in each sequence's own row before this step; the new one is written there.
        longest: upper bound of `cached_B`, plus one.
    """

    def __init__(self, cache: KVCache, grouping: Grouping, cached_B: Tensor, longest: int) -> None:
        self._cache, self._grouping, self._longest = cache, grouping, longest
        keys = cache.keys.tensors[0]
        self._batch, self._heads, self._capacity = len(cached_B), keys.shape[1], keys.shape[2]
        self._rows = self._batch * self._heads
        cached_BG = cached_B.repeat_interleave(self._heads)
        first_BG = torch.arange(0, self._rows * self._capacity, self._capacity, device=cached_B.device)
        self._write_BG = first_BG + cached_BG
        self._mask_B1S = _length_mask(cached_BG + 1, longest, keys.dtype)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        group, prompt_rows = self._grouping, self._grouping.num_prompts * self._heads
        dim, longest_prompt = q_NHK.shape[-1], group.mask_P1S.shape[-1]
        prompt_keys = self._cache.prompt_keys.tensors[layer_idx].flatten(0, 1)[:prompt_rows, :, :longest_prompt]
        prompt_values = self._cache.prompt_values.tensors[layer_idx].flatten(0, 1)[:prompt_rows, :longest_prompt]
        keys = self._append(self._cache.keys.tensors[layer_idx], k_NGK)
        values = self._append(self._cache.values.tensors[layer_idx], v_NGK)
        q_BGRK = q_NHK.reshape(self._batch, self._heads, -1, dim)
        scale = dim**-0.5

        prompt_scores = torch.baddbmm(group.mask_P1S, group.gather(q_BGRK), prompt_keys, alpha=scale)
        own_scores = torch.baddbmm(self._mask_B1S, q_BGRK.flatten(0, 1), keys.transpose(1, 2), alpha=scale)
        scores = (group.scatter(prompt_scores, self._heads), own_scores.view(*q_BGRK.shape[:3], -1))
        weights_BGRS = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        own_out = torch.bmm(weights_BGRS[..., longest_prompt:].flatten(0, 1), values)
        prompt_out = torch.bmm(group.gather(weights_BGRS[..., :longest_prompt]), prompt_values)
        return (own_out.view(q_BGRK.shape) + group.scatter(prompt_out, self._heads)).flatten(1, 2)

    def _append(self, cache_BGSK: Tensor, new_NGK: Tensor) -> Tensor:
        """Write each sequence's new entry; the cached entries of every sequence and kv head, [B G, S, K]."""
        dim = new_NGK.shape[-1]
        cache_BGSK.view(-1, dim).index_copy_(0, self._write_BG, new_NGK.reshape(-1, dim))
        return cache_BGSK.flatten(0, 1)[: self._rows, : self._longest]
