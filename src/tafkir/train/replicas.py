"""Small models that every process holds whole: each works on its own rows of the batch, and gradients are summed.

`torch.distributed` is imported only when there are several processes: see `tafkir.train.parallel.replicas`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tafkir.data.puzzles.format import Cells
from tafkir.data.puzzles.parts import PuzzleIds
from tafkir.models.solving import Solved, solve_puzzles
from tafkir.models.trm import Trm
from tafkir.ops.device import choose_device
from tafkir.recipe.parallel import resolve_sizes, world_size
from tafkir.recipe.schema import ParallelConfig

__all__ = ["OneReplica", "Replicas", "open_replicas", "solve_together"]


class Replicas(Protocol):
    """The processes that train copies of one model. Every method is called by all of them, in the same order."""

    device: torch.device
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        ...

    def rows(self, total: int) -> slice:
        """Which of `total` rows are this process's: a part of its own, in the order of the processes."""
        ...

    def gather_rows(self, own: Tensor, total: int) -> Tensor:
        """All `total` rows [total, ...] from every process's own, for everyone."""
        ...

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        ...


class OneReplica:
    """No other process: nothing is split, summed or gathered."""

    count = 1
    is_main = True

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def rows(self, total: int) -> slice:
        return slice(0, total)

    def gather_rows(self, own: Tensor, total: int) -> Tensor:
        return own

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        return

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def open_replicas(config: ParallelConfig) -> Replicas:
    """The processes that `torchrun` started for this stage, or this one alone.

    Raises:
        RecipeError: their number does not fit the recipe's `[parallel]` table.
        BackendUnavailable: the device that the recipe names is not there.
    """
    if resolve_sizes(config, world_size()).world == 1:
        return OneReplica(choose_device(config.device))
    from tafkir.train.parallel.replicas import ManyReplicas
    from tafkir.train.parallel.world import join_world

    return ManyReplicas(join_world(config.device))


def solve_together(
    replicas: Replicas, model: Trm, inputs: Cells, *, puzzle_ids: PuzzleIds | None = None, batch_size: int = 256
) -> Solved:
    """As `solve_puzzles`, every process its own puzzles; all of them get all answers."""
    own = replicas.rows(len(inputs))
    ids = None if puzzle_ids is None else puzzle_ids[own]
    solved = solve_puzzles(model, inputs[own], puzzle_ids=ids, batch_size=batch_size)
    if replicas.count == 1:
        return solved
    answers, q_halt = (
        replicas.gather_rows(torch.from_numpy(part.swapaxes(0, 1).copy()), len(inputs)).numpy().swapaxes(0, 1)
        for part in (solved.answers, solved.q_halt)
    )
    return Solved(answers, q_halt)
