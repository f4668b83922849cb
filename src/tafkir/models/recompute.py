"""Recomputes residual streams in the backward instead of keeping them (arXiv 2512.24880, section 4.3.2).

Shapes: N tokens, n streams, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tafkir.ops.hyper_connections import Maps, read_streams, write_streams

__all__ = ["Recorder"]

Norm = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _Sublayer:
    """What stays of a sublayer: its output, its maps (a few numbers a token) and its norm."""

    norm: Norm | None = None
    maps: Maps | None = None
    y_ND: Tensor | None = None


@dataclass(slots=True)
class _Block:
    """Consecutive sublayers: the streams before the first, and what it takes to run the mixing again."""

    start_NnD: Tensor
    sublayers: list[_Sublayer] = field(default_factory=list)

    @torch.no_grad()
    def recompute(self) -> list[dict[str, Tensor]]:
        """Streams, sublayer input and normed input of each sublayer: the same ops on the same numbers, so same bits."""
        values = []
        x_NnD = self.start_NnD
        for i, sublayer in enumerate(self.sublayers):
            assert sublayer.maps is not None and sublayer.y_ND is not None and sublayer.norm is not None
            u_ND = read_streams(x_NnD, sublayer.maps.pre_Nn)
            values.append({"streams": x_NnD, "input": u_ND, "normed": sublayer.norm(u_ND)})
            if i + 1 < len(self.sublayers):
                x_NnD = write_streams(x_NnD, sublayer.y_ND, sublayer.maps.post_Nn, sublayer.maps.res_Nij)
        return values


class _Discarded(NamedTuple):
    """Stands in autograd's graph for a tensor that the block can make again."""

    block: _Block
    sublayer: int
    name: str


class Recorder:
    """Keeps autograd from keeping streams: of every block, only the first sublayer's streams and all outputs stay.

    One block at a time is recomputed, when the backward first asks for one of its tensors.

    Args:
        block_sublayers: L_r, sublayers per block.
    """

    def __init__(self, block_sublayers: int) -> None:
        self.block_sublayers = block_sublayers
        self._block: _Block | None = None
        self._known: dict[tuple[int, torch.Size, torch.dtype], tuple[str, Tensor]] = {}
        self._recomputed: tuple[_Block, list[dict[str, Tensor]]] | None = None

    @contextmanager
    def sublayer(self, x_NnD: Tensor) -> Iterator[None]:
        """Around one sublayer, from its reading to its writing."""
        if self._block is None or len(self._block.sublayers) == self.block_sublayers:
            self._block = _Block(x_NnD.detach())
        self._block.sublayers.append(_Sublayer())
        self._note("streams", x_NnD)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._known.clear()

    def normed(self, u_ND: Tensor, norm: Norm) -> Tensor:
        """norm(u), both to be made again."""
        assert self._block is not None
        self._block.sublayers[-1].norm = norm
        self._note("input", u_ND)
        normed_ND = norm(u_ND)
        self._note("normed", normed_ND)
        return normed_ND

    def end_sublayer(self, maps: Maps, y_ND: Tensor) -> None:
        """The sublayer's output and maps, which are kept."""
        assert self._block is not None
        self._block.sublayers[-1].maps = Maps(*(part.detach() for part in maps))
        self._block.sublayers[-1].y_ND = y_ND.detach()

    def _note(self, name: str, tensor: Tensor) -> None:
        # The tensor is held as long as its address is looked for, so no other can get that address.
        self._known[tensor.data_ptr(), tensor.shape, tensor.dtype] = (name, tensor)

    def _pack(self, tensor: Tensor) -> Tensor | _Discarded:
        found = self._known.get((tensor.data_ptr(), tensor.shape, tensor.dtype))
        if found is None or self._block is None or not tensor.is_contiguous():
            return tensor
        return _Discarded(self._block, len(self._block.sublayers) - 1, found[0])

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Discarded):
            return saved  # type: ignore[no-any-return]
        if self._recomputed is None or self._recomputed[0] is not saved.block:
            self._recomputed = None
            self._recomputed = (saved.block, saved.block.recompute())
        return self._recomputed[1][saved.sublayer][saved.name]
