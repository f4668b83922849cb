"""What a training stage asks of the processes that share it, and the answers when there is only one.

`torch.distributed` is imported only when there are several: see `tafkir.train.parallel`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.models.decoder import Decoder
from tafkir.ops.device import choose_device
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.parallel import ParallelSizes, resolve_sizes, world_size
from tafkir.recipe.schema import ParallelConfig
from tafkir.train.ema import WeightAverage
from tafkir.train.state import latest_state, load_carried, load_state, load_totals, save_state

__all__ = ["OneProcess", "Ranks", "open_ranks"]

Item = TypeVar("Item")


class Ranks(Protocol):
    """The processes of a stage, seen from one of them. Every method is called by all of them, in the same order."""

    sizes: ParallelSizes
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        ...

    def shard(self, decoder: Decoder, source: Path | None = None) -> None:
        """Move the decoder to the device and leave this process its part of it; before the optimisers are built.

        Args:
            source: checkpoint folder that a decoder on the meta device is filled from, by every process its part.
        """
        ...

    def adapt(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Make the optimisers work on sharded parameters."""
        ...

    def own(self, pieces: Sequence[Item]) -> list[Item]:
        """This process's part of the step's pieces: every `data_shards`-th one."""
        ...

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """What all processes give, the first one's first; plain values and tensors, which every process gets."""
        ...

    def sum(self, value: float) -> float:
        """The sum over all data shards."""
        ...

    def sum_tensor(self, value: Tensor) -> Tensor:
        """The sum over all data shards, entry by entry; `value` may be overwritten."""
        ...

    def sum_loads(self, loads: list[Tensor]) -> list[Tensor]:
        """Expert loads summed over all data shards."""
        ...

    def clip_gradients(self, decoder: Decoder, max_norm: float) -> float:
        """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before."""
        ...

    def load_state(
        self,
        folder: Path,
        decoder: Decoder,
        optimizers: Sequence[torch.optim.Optimizer],
        average: WeightAverage | None,
    ) -> tuple[int, dict[str, float]]:
        """Restore the newest state, if there is one; returns the finished steps and what they came to."""
        ...

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
        """Write the resumable state, and with it what else the next step needs, as JSON."""
        ...

    def load_carried(self, folder: Path) -> dict[str, Any]:
        """What the newest state was given to carry."""
        ...

    def reload(self, decoder: Decoder, source: Path) -> None:
        """Give the decoder the weights of a checkpoint of its own, every process its part."""
        ...

    def whole(self, decoder: Decoder) -> Decoder | None:
        """The decoder with all of its weights, on the CPU; None for those who do not write it."""
        ...


class OneProcess:
    """No other process: nothing is split, summed or gathered."""

    sizes = ParallelSizes()
    is_main = True

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def shard(self, decoder: Decoder, source: Path | None = None) -> None:
        assert source is None, "one process holds the whole decoder"
        if self.device.type != "cpu":
            decoder.to(self.device)

    def adapt(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        return optimizers

    def own(self, pieces: Sequence[Item]) -> list[Item]:
        return list(pieces)

    def gather(self, items: Sequence[Item]) -> list[Item]:
        return list(items)

    def sum(self, value: float) -> float:
        return value

    def sum_tensor(self, value: Tensor) -> Tensor:
        return value

    def sum_loads(self, loads: list[Tensor]) -> list[Tensor]:
        return loads

    def clip_gradients(self, decoder: Decoder, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(decoder.parameters(), max_norm))

    def load_state(
        self,
        folder: Path,
        decoder: Decoder,
        optimizers: Sequence[torch.optim.Optimizer],
        average: WeightAverage | None,
    ) -> tuple[int, dict[str, float]]:
        path = latest_state(folder)
        if path is None:
            return 0, {}
        if path.is_dir():
            from tafkir.train.parallel.state import load_sharded

            return load_sharded(path, decoder, optimizers, average, {})
        return load_state(path, decoder, optimizers, average), load_totals(path)

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
        save_state(folder, decoder, optimizers, step, totals, average, carried)

    def load_carried(self, folder: Path) -> dict[str, Any]:
        path = latest_state(folder)
        return {} if path is None or path.is_dir() else load_carried(path)

    def reload(self, decoder: Decoder, source: Path) -> None:
        decoder.load_state_dict(load_checkpoint(source).decoder.state_dict())

    def whole(self, decoder: Decoder) -> Decoder | None:
        return decoder if self.device.type == "cpu" else copy.deepcopy(decoder).cpu()


def open_ranks(config: ParallelConfig, model: ModelConfig) -> Ranks:
    """The processes that `torchrun` started for this stage, or this one alone.

    Raises:
        RecipeError: their number does not fit the recipe's `[parallel]` table.
        BackendUnavailable: the device that the recipe names is not there.
    """
    sizes = resolve_sizes(config, world_size())
    if sizes.world == 1:
        return OneProcess(choose_device(config.device))
    from tafkir.train.parallel.many_ranks import ManyRanks
    from tafkir.train.parallel.world import join_world

    return ManyRanks(join_world(config.device), sizes, model)
