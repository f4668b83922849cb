"""Decode steps over buffers that stay where they are; on CUDA each size is captured once as a graph, and replayed.

What varies from step to step stays outside: sampling, grammars, prompts and drafts. Shapes: B rows, R the size they are
filled up to, T blocks of a row, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tafkir.engine.paged_cache import PagedCache, PagedRows
from tafkir.errors import BackendUnavailable
from tafkir.models.decoder import Decoder
from tafkir.models.on_device import has_static_steps

__all__ = ["Record", "Run", "StaticDecode", "build_static", "cuda_recorder", "run_again", "size_of_rows"]

Run = Callable[[], tuple[Tensor, list[Tensor]]]
"""One step over the buffers: logits [R, V], and each MoE layer's experts [R, A]."""
Record = Callable[[Run], Run]
"""From a step to one that does the same on the same buffers, at less cost."""

_LEAST_BLOCKS = 8


def run_again(run: Run) -> Run:
    """Records nothing: the step itself."""
    return run


def cuda_recorder(device: torch.device) -> Record:
    """Captures steps in CUDA graphs that share one pool of memory: outputs last until the next replay of any."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> Run:
        # What libraries and Triton set up on first use may not be captured.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a checkpoint being loaded beside this one) may go on allocating.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> tuple[Tensor, list[Tensor]]:
            graph.replay()
            return outputs

        return replay

    return record


def size_of_rows(rows: int, most: int) -> int:
    """1, 2, 4 or a multiple of 8, but no more than `most`: few sizes to capture, and few rows for nothing."""
    size = 1 << (rows - 1).bit_length() if rows <= 4 else -(-rows // 8) * 8
    return min(size, most)


@dataclass(slots=True)
class _Step:
    """Buffers of one size, and the step over them once it is recorded."""

    ids_R: Tensor
    positions_R: Tensor
    tables_RT: Tensor
    replay: Run | None = None


class StaticDecode:
    """One token for each row of a paged batch.

    Rows that fill a step up feed token 0 at position 0 and write to the cache's spare block.

    Args:
        decoder: one of which `has_static_steps` holds.
        cache: without the compiled kernel's layout and without codes.
        record: what makes a step cheaper.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, record: Record = run_again) -> None:
        self._decoder, self._cache, self._record = decoder, cache, record
        self._steps: dict[tuple[int, int], _Step] = {}
        self._addresses = self._where()

    @property
    def num_recorded(self) -> int:
        """Sizes that are ready."""
        return len(self._steps)

    def __call__(self, token_B: Tensor, position_B: Tensor, tables_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of the next token [B, V], and each MoE layer's experts [B, A]; both are the caller's to keep.

        Args:
            token_B: the newest tokens.
            position_B: theirs.
            tables_BT: blocks of the rows, with room for the new tokens.
        """
        rows, blocks = tables_BT.shape
        step = self._step(rows, blocks)
        for buffer_R, values_B in ((step.ids_R, token_B), (step.positions_R, position_B)):
            buffer_R[:rows] = values_B
            buffer_R[rows:] = 0
        step.tables_RT[:rows, :blocks] = tables_BT
        step.tables_RT[rows:] = self._cache.spare
        if step.replay is None:
            step.replay = self._record(lambda: self._run(step))
        logits_RV, expert_ids = step.replay()
        return logits_RV[:rows].clone(), [ids_RA[:rows].clone() for ids_RA in expert_ids]

    def forget_moved(self) -> None:
        """Drop what is recorded if any weight lies elsewhere than before; one whose numbers changed in place is read
        anew by every replay."""
        addresses = self._where()
        if addresses != self._addresses:
            self._steps.clear()
            self._addresses = addresses

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self._decoder.parameters(), *self._decoder.buffers())]

    def _step(self, rows: int, blocks: int) -> _Step:
        most, widest = self._cache.tables.shape
        size = size_of_rows(rows, most)
        wide = min(widest, max(_LEAST_BLOCKS, 1 << (blocks - 1).bit_length()))
        if (size, wide) not in self._steps:
            whole: dict[str, Any] = {"dtype": torch.int64, "device": self._cache.device}
            self._steps[size, wide] = _Step(
                torch.zeros(size, **whole), torch.zeros(size, **whole), torch.zeros(size, wide, **whole)
            )
        return self._steps[size, wide]

    def _run(self, step: _Step) -> tuple[Tensor, list[Tensor]]:
        view = self._cache.view(PagedRows(step.tables_RT, step.positions_R), step.positions_R, 1, ())
        view.reads_all = True
        output = self._decoder(step.ids_R, view.positions_N, view)
        return self._decoder.logits(output.hidden_ND), output.expert_ids


def build_static(decoder: Decoder, cache: PagedCache, wanted: bool | None) -> StaticDecode | None:
    """What `PagedEngine` decodes with: graphs on CUDA, the same steps uncaptured where they are asked for elsewhere.

    Raises:
        BackendUnavailable: they are asked for, and the model or the cache cannot have them.
    """
    if wanted is None:
        wanted = cache.device.type == "cuda" and _why_not(decoder, cache) is None
    if not wanted:
        return None
    if reason := _why_not(decoder, cache):
        raise BackendUnavailable(f"steps cannot be static: {reason}", where="static_steps", fix="leave it out")
    return StaticDecode(decoder, cache, cuda_recorder(cache.device) if cache.device.type == "cuda" else run_again)


def _why_not(decoder: Decoder, cache: PagedCache) -> str | None:
    if cache.native:
        return "the processor's kernels have steps of their own"
    if cache.invariant:
        return "every token is computed by itself"
    if cache.coded:
        return "the cache keeps codes"
    if not has_static_steps(decoder):
        return "which experts are computed depends on the tokens, or matrices are decoded as a whole"
    return None
