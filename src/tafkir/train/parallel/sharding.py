"""Leaves each rank its part of a decoder: experts shared out, heads and widths split, the rest sharded by FSDP2."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tafkir.models.decoder import Decoder, DecoderLayer
from tafkir.models.experts import Experts
from tafkir.train.parallel.experts import place_experts
from tafkir.train.parallel.tensor import Order, order_fused, split_heads_and_widths
from tafkir.train.parallel.world import Meshes

__all__ = ["Sharding", "shard_decoder"]


class Sharding:
    """What is to be known of a sharded decoder.

    Attributes:
        orders: fused weights whose rows lie in another order than in a checkpoint.
        partial: names of parameters whose gradient has to be summed over the tensor ranks.
    """

    def __init__(self, orders: dict[str, Order], partial: list[str]) -> None:
        self.orders, self.partial = orders, partial


def shard_decoder(decoder: Decoder, meshes: Meshes) -> Sharding:
    """Shard in place (FSDP2, arXiv 2304.11277): layer by layer, tables and last norm with the root.

    Weights lie on the meta device, or are equal on all ranks; nothing is sent. Gradients are sums over the ranks.
    """
    sizes = meshes.sizes
    orders, partial = {}, []
    names = {id(param): name for name, param in decoder.named_parameters()}
    if sizes.tensor > 1:
        orders = order_fused(decoder, sizes.tensor)
        partial = [names[id(param)] for param in split_heads_and_widths(decoder, meshes.dense["tensor"])]
    fsdp = meshes.dense["fsdp"]
    for module in list(decoder.modules()):
        if isinstance(module, Experts) and (sizes.expert > 1 or sizes.tensor > 1):
            place_experts(module, meshes)
            if sizes.expert > 1:
                _fully_shard(module, meshes.expert["data"])
    for module in list(decoder.modules()):
        if isinstance(module, DecoderLayer):
            _fully_shard(module, fsdp)
    _fully_shard(decoder, fsdp)
    return Sharding(orders, partial)


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda param: Shard(_fsdp_dim(param, mesh.size())))
    sharded = cast(FSDPModule, module)
    # The loss is divided by the targets of all ranks, so gradients are summed, not averaged.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _fsdp_dim(param: nn.Parameter, ranks: int) -> int:
    """The first dim that nobody splits yet and that the ranks divide; the first free one, padded, if there is none."""
    taken = {p.dim for p in param.placements if isinstance(p, Shard)} if isinstance(param, DTensor) else set()
    free = [dim for dim in range(param.ndim) if dim not in taken]
    return next((dim for dim in free if param.shape[dim] % ranks == 0), free[0])
