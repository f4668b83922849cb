"""Sums and gathers over the processes that share a step's data, however they hold the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DataShards", "sum_gradients"]

Item = TypeVar("Item")


class DataShards:
    """What `tafkir.train.ranks.Ranks` asks of the processes of one group, each with its own part of a step.

    A sum arrives at every process with the same bits, so that copies that are updated alike stay alike.

    Args:
        device: this process's.
        group: None is the default process group.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self._group = group
        self._index, self._count = dist.get_rank(group), dist.get_world_size(group)

    def own(self, pieces: Sequence[Item]) -> list[Item]:
        return list(pieces[self._index :: self._count])

    def gather(self, items: Sequence[Item]) -> list[Item]:
        parts: list[list[Item] | None] = [None] * self._count
        dist.all_gather_object(parts, list(items), group=self._group)
        return [item for part in parts if part is not None for item in part]

    def sum(self, value: float) -> float:
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        dist.all_reduce(value, group=self._group)
        return value

    def sum_loads(self, loads: list[Tensor]) -> list[Tensor]:
        return list(self.sum_tensor(torch.stack(loads))) if loads else []


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all processes, which have a copy of the parameters each.

    A process that had nothing to learn from has no gradients; a parameter without one anywhere gets none, because
    zeros would let it decay.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    known = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=trained[0].device)
    dist.all_reduce(known)
    shared = [parameter for parameter, count in zip(trained, known.tolist(), strict=True) if count]
    grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in shared]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for parameter, summed in zip(shared, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = summed.view_as(parameter)
