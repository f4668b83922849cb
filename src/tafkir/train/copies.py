"""Many processes with a copy of the policy each, as `Ranks`: they share rollouts and micro-batches, not weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tafkir.models.decoder import Decoder
from tafkir.ops.device import choose_device
from tafkir.recipe.parallel import ParallelSizes, resolve_sizes, world_size
from tafkir.recipe.schema import ParallelConfig
from tafkir.train.ema import WeightAverage
from tafkir.train.ranks import OneProcess, Ranks

__all__ = ["WholeCopies", "open_copies"]

Item = TypeVar("Item")


class WholeCopies(OneProcess):
    """See `tafkir.train.ranks.Ranks`; the default process group is joined.

    Gradients are summed over the processes before they are clipped. A sum arrives everywhere with the same bits, so
    that copies which are updated alike stay alike; the first process alone writes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sizes = ParallelSizes(data=dist.get_world_size())
        self.is_main = dist.get_rank() == 0

    def own(self, pieces: Sequence[Item]) -> list[Item]:
        return list(pieces[dist.get_rank() :: self.sizes.data])

    def gather(self, items: Sequence[Item]) -> list[Item]:
        parts: list[list[Item] | None] = [None] * self.sizes.data
        dist.all_gather_object(parts, list(items))
        return [item for part in parts if part is not None for item in part]

    def sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def sum_tensor(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def sum_loads(self, loads: list[Tensor]) -> list[Tensor]:
        return list(self.sum_tensor(torch.stack(loads))) if loads else []

    def clip_gradients(self, decoder: Decoder, max_norm: float) -> float:
        params = [param for param in decoder.parameters() if param.requires_grad]
        # A process without a micro-batch has no gradients; what has none anywhere must not get zeros, which decay.
        known = self.sum_tensor(torch.tensor([float(param.grad is not None) for param in params]))
        shared = [param for param, count in zip(params, known.tolist(), strict=True) if count]
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in shared]
        flat = self.sum_tensor(torch.cat([grad.reshape(-1) for grad in grads]))
        for param, summed in zip(shared, flat.split([grad.numel() for grad in grads]), strict=True):
            param.grad = summed.view_as(param)
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
