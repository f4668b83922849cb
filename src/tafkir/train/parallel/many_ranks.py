"""Many processes as one `Ranks`: sums, the global gradient norm, and sharded states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from tafkir.checkpoint.load import read_parts
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.parallel import ParallelSizes, check_shapes
from tafkir.train.collectives import DataShards
from tafkir.train.ema import WeightAverage
from tafkir.train.optim import Muon, orthogonalize
from tafkir.train.parallel.sharding import Sharding, parts_of, shard_decoder
from tafkir.train.parallel.state import gather_decoder, load_sharded, load_whole, save_sharded
from tafkir.train.parallel.tensor import with_whole_matrices
from tafkir.train.parallel.world import Meshes
from tafkir.train.state import latest_state

__all__ = ["ManyRanks"]


class ManyRanks(DataShards):
    """The processes of a training stage; see `tafkir.train.ranks.Ranks`.

    Args:
        device: this process's; the default process group is joined.
        sizes: their product is the number of processes.
        model: what is going to be sharded.
    """

    def __init__(self, device: torch.device, sizes: ParallelSizes, model: ModelConfig) -> None:
        check_shapes(model, sizes)
        self.sizes = sizes
        self._meshes = Meshes(sizes, device.type)
        super().__init__(device, self._meshes.dense.get_group("fsdp"))
        self._sharding = Sharding({}, [])

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def shard(self, decoder: Decoder, source: Path | None = None) -> None:
        if source is None:
            decoder.to(self.device)
            self._sharding = shard_decoder(decoder, self._meshes)
            return
        self._sharding = shard_decoder(decoder, self._meshes)
        decoder.to_empty(device=self.device)
        self.reload(decoder, source)

    def adapt(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        # One fused step takes parameters of one mesh.
        for optimizer in optimizers:
            if isinstance(optimizer, Muon):
                optimizer.orthogonalize = partial(with_whole_matrices, orthogonalize)
            groups: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                by_mesh: dict[Any, list[DTensor]] = {}
                for param in group["params"]:
                    by_mesh.setdefault((param.device_mesh, param.placements), []).append(param)
                groups += [{**group, "params": params} for params in by_mesh.values()]
            optimizer.param_groups = groups
        return optimizers

    def clip_gradients(self, decoder: Decoder, max_norm: float) -> float:
        self._sum_partial(decoder)
        grads = [cast(DTensor, p.grad) for p in decoder.parameters() if p.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for grad in grads:
            # A part that several ranks hold counts once.
            copies = self.sizes.world // grad.device_mesh.size()
            for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True):
                copies *= size if isinstance(placement, Replicate) else 1
            total += torch.linalg.vector_norm(grad.to_local(), dtype=torch.float64).square() / copies
        dist.all_reduce(total)
        norm = float(total.sqrt())
        scale = min(1.0, max_norm / (norm + 1e-6))
        for grad in grads:
            grad.to_local().mul_(scale)
        return norm

    def _sum_partial(self, decoder: Decoder) -> None:
        """Queries' and keys' norms: each tensor rank has only its own heads' share of the gradient."""
        if self._sharding.partial:
            params = [decoder.get_parameter(name) for name in self._sharding.partial]
            grads = [cast(DTensor, param.grad).to_local() for param in params if param.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self._meshes.dense.get_group("tensor"))
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))

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
        load = load_sharded if path.is_dir() else load_whole
        return load(path, decoder, optimizers, average, self._sharding.orders)

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
        # Only language stages are shared by many ranks, and they carry nothing.
        assert not carried
        self._settle(decoder)
        save_sharded(folder, decoder, optimizers, average, step, totals, self._sharding.orders)

    def load_carried(self, folder: Path) -> dict[str, Any]:
        return {}

    def reload(self, decoder: Decoder, source: Path) -> None:
        self._settle(decoder)
        read_parts(source, decoder, parts_of(decoder, self._sharding.orders))

    def whole(self, decoder: Decoder) -> Decoder | None:
        self._settle(decoder)
        return gather_decoder(decoder, self._sharding.orders, keep=self.is_main)

    @staticmethod
    def _settle(decoder: Decoder) -> None:
        """Back to sharded weights: a forward without a backward leaves the root's whole."""
        cast(FSDPModule, decoder).reshard()
