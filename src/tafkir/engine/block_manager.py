"""Blocks of a paged cache: who holds them, and which of them hold tokens that a later request may begin with.

A full block is known by its own tokens and by the block before it, so a chain of known blocks is a prompt's beginning.
Tokens are compared, not hashes of them: no request can find another one's block by a collision. Blocks that nobody
holds stay known until they are needed, the longest unused first (PagedAttention, arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["BlockManager"]

# The parent of a sequence's first block.
_ROOT = 0

_Key = tuple[int, tuple[int, ...]]


class BlockManager:
    """References to blocks, and what the full ones hold; no tensor is touched here.

    Args:
        num_blocks: of the cache.
        block_size: tokens of a block.
        caching: remember full blocks that nobody holds any more.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._references = [0] * num_blocks
        # Low numbers first, so that a cache that is never full never touches all of its memory.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_blocks
        # A block's place in chains; it gets a new one with every new content, so no chain outlives a part of it.
        self._serials = [_ROOT] * num_blocks
        self._last_serial = _ROOT

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def match(self, ids: Sequence[int], most: int) -> list[int]:
        """Known blocks that hold the first tokens, `most` of them at most. They are not held yet: see `hold`."""
        blocks: list[int] = []
        parent, size = _ROOT, self.block_size
        for start in range(0, min(most, len(ids) // size) * size, size):
            block = self._known.get((parent, tuple(ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            parent = self._serials[block]
        return blocks

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: holding them takes so many free blocks."""
        return sum(1 for block in blocks if not self._references[block])

    def hold(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each."""
        for block in blocks:
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """So many blocks with one reference each, of unknown content; the caller has looked at `num_free`."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._idle.popitem(last=False)[0]
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def seal(self, ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Let the full blocks among `blocks`, which hold these tokens, be found; of two alike the older one is."""
        if not self.caching:
            return
        parent, size = _ROOT, self.block_size
        for block, start in zip(blocks, range(0, len(ids) - size + 1, size), strict=False):
            key = (parent, tuple(ids[start : start + size]))
            found = self._known.get(key)
            if found is None:
                self._forget(block)
                self._last_serial += 1
                self._known[key], self._keys[block], self._serials[block] = block, key, self._last_serial
                found = block
            parent = self._serials[found]

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference to each back. The end of a chain is reused before its beginning."""
        for block in reversed(blocks):
            assert self._references[block] > 0
            self._references[block] -= 1
            if not self._references[block]:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def forget_all(self) -> None:
        """Nothing that is stored may be found any more: the weights are others."""
        for block in list(self._known.values()):
            self._forget(block)
        self._empty += self._idle
        self._idle.clear()

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._known[key]
