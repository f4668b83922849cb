"""What one of many processes holds of a decoder, read from a checkpoint without what the others hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf.convert import check_names, repeated_names, resolve_names, table_for
from tafkir.models.hf.table import Resolved, WeightTable

__all__ = ["Part", "WindowReader", "read_hf_parts"]


@dataclass(frozen=True, slots=True)
class Part:
    """Some entries of a tensor of ours.

    Attributes:
        place: where they go.
        entries: for each dim of the tensor, int64 indices of the entries that `place` has along it. Along the last dim
            of a matrix they follow each other.
    """

    place: Tensor
    entries: tuple[Tensor, ...]


class WindowReader(Protocol):
    """Reads rows and columns of a stored tensor, as `checkpoint.read.WeightFiles.read_window` does."""

    def __call__(self, name: str, shape: tuple[int, ...], rows: range, columns: range, place: Tensor) -> None: ...


@torch.no_grad()
def read_hf_parts(
    decoder: Decoder,
    parts: Mapping[str, Part],
    available: Iterable[str],
    read: WindowReader,
    table: WeightTable | None = None,
) -> None:
    """Fill parts of a decoder from a checkpoint's tensors; names are as strict as in `read_hf_tensors`.

    Args:
        decoder: gives names and whole shapes.
        parts: what is held of each tensor of its state dict.
        available: names that the checkpoint holds.
        read: reads a window of one of them.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or repeat another one with other numbers.
    """
    table, there = table or table_for(decoder.config), set(available)
    resolved = {names.name: names for names in resolve_names(decoder, table)}
    copies = repeated_names(decoder, table)
    check_names({name for names in resolved.values() for group in names.parts for name in group}, there - copies.keys())
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for name, names in resolved.items():
        _read_part(names, shapes[name], parts[name], read)
    for theirs, (ours, _) in copies.items():
        if theirs in there:
            again = Part(torch.empty_like(parts[ours].place), parts[ours].entries)
            _read_part(replace(resolved[ours], parts=((theirs,),)), shapes[ours], again, read)
            if not torch.equal(again.place, parts[ours].place):
                raise CheckpointError(
                    f"differs from {ours}, which it should repeat", where=theirs, fix="take the checkpoint anew"
                )


def _read_part(names: Resolved, shape: tuple[int, ...], part: Part, read: WindowReader) -> None:
    place = part.place if part.place.device.type == "cpu" else torch.empty(part.place.shape, dtype=part.place.dtype)
    if names.stacked:
        for piece, expert in zip(place, part.entries[0].tolist(), strict=True):
            _read_piece(names.parts[expert], names.rows, shape[1:], piece, part.entries[1:], read)
    else:
        _read_piece(names.parts[0], names.rows, shape, place, part.entries, read)
    if place is not part.place:
        part.place.copy_(place)


def _read_piece(
    theirs: Sequence[str],
    rows: tuple[int, ...] | None,
    shape: tuple[int, ...],
    place: Tensor,
    entries: Sequence[Tensor],
    read: WindowReader,
) -> None:
    """Fill a piece that is the concatenation of tensors of theirs along its rows."""
    lengths = rows or (shape[0] // len(theirs),) * len(theirs)
    columns = range(1)
    if len(shape) > 1:
        if not len(entries[1]):
            return
        ((_, columns),) = _runs(entries[1])
    bounds = [0, *accumulate(lengths)]
    for at, run in _runs(entries[0]):
        for name, (first, end) in zip(theirs, pairwise(bounds), strict=True):
            begin, stop = max(run.start, first), min(run.stop, end)
            if begin < stop:
                start = at + begin - run.start
                window = range(begin - first, stop - first)
                read(name, (end - first, *shape[1:]), window, columns, place[start : start + len(window)])


def _runs(indices: Tensor) -> Iterator[tuple[int, range]]:
    """Where each run of successive indices begins, and the indices."""
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    start = 0
    for run in indices.tensor_split(breaks.tolist()):
        if len(run):
            yield start, range(int(run[0]), int(run[-1]) + 1)
            start += len(run)
