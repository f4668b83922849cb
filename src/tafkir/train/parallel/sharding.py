"""Leaves each rank its part of a decoder: experts shared out, heads and widths split, the rest sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tafkir.models.decoder import Decoder, DecoderLayer
from tafkir.models.experts import Experts
from tafkir.models.hf import Part
from tafkir.train.parallel.experts import place_experts
from tafkir.train.parallel.tensor import Order, order_fused, split_heads_and_widths
from tafkir.train.parallel.world import Meshes

__all__ = ["Sharding", "parts_of", "shard_decoder"]


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


def parts_of(decoder: Decoder, orders: Mapping[str, Order]) -> dict[str, Part]:
    """What this rank holds of every tensor of a sharded decoder, in terms of a checkpoint's order."""
    parts = {}
    for name, value in decoder.state_dict().items():
        entries = [torch.arange(size) for size in value.shape]
        if isinstance(value, DTensor):
            mesh = value.device_mesh
            for placement, ranks, rank in zip(value.placements, mesh.shape, mesh.get_coordinate() or (), strict=True):
                if isinstance(placement, Shard):
                    entries[placement.dim] = _chunk(entries[placement.dim], ranks, rank)
            value = value.to_local()
        if order := orders.get(name):
            entries[order.dim] = order.index[entries[order.dim]]
        parts[name] = Part(value.detach(), tuple(entries))
    return parts


def _chunk(entries: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's share as DTensor cuts it; the last ones may have less, or nothing."""
    chunks = entries.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else entries[:0]


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
