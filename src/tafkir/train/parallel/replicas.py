"""Many processes with a copy of one small model each: one sum of all gradients a step, and rows gathered for states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tafkir.train.collectives import sum_gradients

__all__ = ["ManyReplicas"]


class ManyReplicas:
    """See `tafkir.train.replicas.Replicas`; the default process group is joined.

    A sum arrives at every process with the same bits, so that copies that are updated alike stay alike.

    Args:
        device: this process's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count, self._index = dist.get_world_size(), dist.get_rank()

    @property
    def is_main(self) -> bool:
        return self._index == 0

    def rows(self, total: int) -> slice:
        return self._part(self._index, total)

    def _part(self, index: int, total: int) -> slice:
        return slice(index * total // self.count, (index + 1) * total // self.count)

    def gather_rows(self, own: Tensor, total: int) -> Tensor:
        # Parts differ by one row at most, and a gather takes equal ones. Booleans travel as bytes.
        parts = [self._part(index, total) for index in range(self.count)]
        most = -(-total // self.count)
        sent = own.new_zeros(most, *own.shape[1:]).to(self.device)
        sent[: len(own)] = own
        sent = sent.byte() if own.dtype == torch.bool else sent
        received = [torch.empty_like(sent) for _ in parts]
        dist.all_gather(received, sent)
        whole = torch.cat([rows[: part.stop - part.start] for rows, part in zip(received, parts, strict=True)])
        return whole.to(own.device, own.dtype)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        sum_gradients(parameters)

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed
