"""An exponential moving average of a model's weights, kept beside the weights that train."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """avg = d avg + (1 - d) weights after every update; d = min(decay, (1 + t) / (10 + t)) while it warms up.

    Everything in the module's state that is a float is averaged, the routers' expert biases among it, in its own
    dtype and on its own device. `t` counts the updates before this one; with the warm-up the first weights are soon
    forgotten, whatever the decay (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        module: starts the average.
        decay: between 0 and 1.
        warmup: forget faster in the beginning.
        skip: names in the module's state that are not averaged.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = True, skip: Collection[str] = ()) -> None:
        self.module, self.decay, self.warmup, self.skip = module, decay, warmup, frozenset(skip)
        self.num_updates = 0
        self.tensors: dict[str, Tensor] = {name: value.clone() for name, value in self._live()}

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        state = self.module.state_dict()
        live = ((name, value) for name, value in state.items() if name not in self.skip)
        return ((name, value.detach()) for name, value in live if value.is_floating_point())

    def decay_at(self, update: int) -> float:
        """The decay of update `update`, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present weights."""
        weight = 1.0 - self.decay_at(self.num_updates)
        for name, value in self._live():
            self.tensors[name].lerp_(value, weight)
        self.num_updates += 1

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._live():
            average = self.tensors[name]
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module computes with the average; afterwards it has its own weights again, bit for bit.

        One tensor at a time is held twice.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()
