"""What one of thousands of ranks would hold: the real sharding code on a fake process group and the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from tafkir.errors import TrainingError
from tafkir.models.decoder import Decoder, DecoderLayer
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.parallel import ParallelSizes, check_shapes
from tafkir.train.parallel.sharding import shard_decoder
from tafkir.train.parallel.world import Meshes

__all__ = ["RankBytes", "measure_rank"]

# AdamW in float32 keeps two moments per weight.
_MOMENTS = 2


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes that one rank holds while it trains, activations left out.

    Attributes:
        weights: its part of all parameters; gradients take as much.
        moments: AdamW's two moments of them.
        gathered: the weights of the largest block, whole while it computes, and of the root (tables, last norm).
    """

    rank: int
    world: int
    weights: int
    moments: int
    gathered: int

    @property
    def total(self) -> int:
        return 2 * self.weights + self.moments + self.gathered


def measure_rank(model: ModelConfig, sizes: ParallelSizes, *, rank: int = 0) -> RankBytes:
    """Shard a float32 decoder as rank `rank` of `sizes.world` would, without memory, network or other processes.

    Raises:
        RecipeError: the sizes do not divide the model.
        TrainingError: this process already belongs to a process group.
    """
    check_shapes(model, sizes)
    if dist.is_initialized():
        raise TrainingError(
            "this process is one of a distributed run", where="measure_rank", fix="ask in a process of its own"
        )
    # Importing it registers the backend "fake", whose collectives do nothing.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
    try:
        with torch.device("meta"):
            decoder = Decoder(model)
        shard_decoder(decoder, Meshes(sizes, "cpu"))
        params = [cast(DTensor, param) for param in decoder.parameters()]
        held = sum(param.to_local().numel() * param.element_size() for param in params)
        blocks = [
            [cast(DTensor, param) for param in module.parameters()]
            for module in decoder.modules()
            if isinstance(module, DecoderLayer)
        ]
        in_blocks = {id(param) for block in blocks for param in block}
        root = sum(_gathered(param) for param in params if id(param) not in in_blocks)
        largest = max(sum(map(_gathered, block)) for block in blocks)
    finally:
        dist.destroy_process_group()
    return RankBytes(rank, sizes.world, held, _MOMENTS * held, root + largest)


def _gathered(param: DTensor) -> int:
    """Bytes of a weight when FSDP has gathered it: what the expert and tensor ranks hold stays apart."""
    names = param.device_mesh.mesh_dim_names or ()
    axes = zip(names, param.device_mesh.shape, param.placements, strict=True)
    apart = prod(size for name, size, p in axes if name in ("expert", "tensor") and isinstance(p, Shard))
    return param.numel() * param.element_size() // apart
