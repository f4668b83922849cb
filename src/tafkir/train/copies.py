"""Many processes with a copy of the policy each, as `Ranks`: they share rollouts and micro-batches, not weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tafkir.models.decoder import Decoder
from tafkir.ops.device import choose_device
from tafkir.recipe.parallel import ParallelSizes, resolve_sizes, world_size
from tafkir.recipe.schema import ParallelConfig
from tafkir.train.collectives import DataShards, sum_gradients
from tafkir.train.ema import WeightAverage
from tafkir.train.ranks import OneProcess, Ranks

__all__ = ["WholeCopies", "open_copies"]


class WholeCopies(DataShards, OneProcess):
    """See `tafkir.train.ranks.Ranks`; the default process group is joined.

    Gradients are summed over the processes before they are clipped, and all copies are updated alike; the first
    process alone writes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sizes = ParallelSizes(data=dist.get_world_size())
        self.is_main = dist.get_rank() == 0

    def clip_gradients(self, decoder: Decoder, max_norm: float) -> float:
        sum_gradients(decoder.parameters())
        return super().clip_gradients(decoder, max_norm)

    def save_state(
        self,
        folder: Path,
        decoder: Decoder,
        optimizers: Sequence[torch.optim.Optimizer],
        average: WeightAverage | None,
        step: int,
        totals: Mapping[str, float],
        carried: Mapping[str, Any],
    ) -> None:
        if self.is_main:
            super().save_state(folder, decoder, optimizers, average, step, totals, carried)

    def whole(self, decoder: Decoder) -> Decoder | None:
        return super().whole(decoder) if self.is_main else None


def open_copies(config: ParallelConfig) -> Ranks:
    """The processes that `torchrun` started for this stage, each with a whole copy of the model, or this one alone.

    Raises:
        RecipeError: their number does not fit the recipe's `[parallel]` table.
        BackendUnavailable: the device that the recipe names is not there.
    """
    if resolve_sizes(config, world_size()).world == 1:
        return OneProcess(choose_device(config.device))
    from tafkir.train.parallel.world import join_world

    return WholeCopies(join_world(config.device))
