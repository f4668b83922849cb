"""What every cache of the engine is made of: growing stores of rows, and their limit in bytes.

Rows are dense (0..rows-1) and capacities grow in powers of two. Sequences that share a prompt share its row, so a group
of RL completions reads its prompt once per step.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from tafkir.engine.views import DecodeView, Grouping, PrefillView
from tafkir.errors import CapacityError
from tafkir.recipe.model import ModelConfig

__all__ = ["Cache", "Store", "bucket"]

_SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """The capacity that holds `length`: the next power of two, 32 at least."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class Store:
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


class Cache(abc.ABC):
    """What attention keeps of every layer: one row per distinct prompt, one row per sequence.

    Args:
        config: the decoder's shape.
        like: a tensor whose dtype and device the cache takes.
        max_bytes: never hold more than this; None sets no limit of its own.
        num_heads: kv heads of a row.
        prompts: the stores of prompt rows.
        own: the stores of sequence rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        like: Tensor,
        max_bytes: int | None,
        *,
        num_heads: int,
        prompts: tuple[Store, ...],
        own: tuple[Store, ...],
    ) -> None:
        self.num_heads, self.max_bytes = num_heads, max_bytes
        self._prompts, self._own = prompts, own
        self._position_bytes = config.kv_bytes_per_token(like.element_size())

    @abc.abstractmethod
    def prefill_view(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> PrefillView:
        """Attention for whole prompts of these lengths; what it keeps lands in the prompt rows `rows`."""

    @abc.abstractmethod
    def decode_view(self, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> DecodeView:
        """Attention for the newest tokens of each sequence; arguments as for `DecodeView`."""

    def bytes_for(self, prompt_rows: int, prompt_length: int, rows: int, length: int) -> int:
        """Bytes of the cache once it holds this much (lengths in tokens; 0 asks for nothing)."""
        prompts, own = self._prompts[0], self._own[0]
        prompt_rows = max(prompt_rows, prompts.rows)
        prompt_length = max(bucket(prompt_length) if prompt_length else 0, prompts.length)
        rows, length = max(rows, own.rows), max(bucket(length) if length else 0, own.length)
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
        self._reserve(self._prompts, rows, length)

    def reserve(self, rows: int, length: int) -> None:
        self._reserve(self._own, rows, length)

    def _reserve(self, stores: tuple[Store, ...], rows: int, length: int) -> None:
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
        for store in self._prompts:
            store.move(src, dst, length)

    def move(self, src: Tensor, dst: Tensor, length: int) -> None:
        for store in self._own:
            store.move(src, dst, length)

    def clear(self) -> None:
        """Give all memory back."""
        for store in (*self._prompts, *self._own):
            store.clear()
