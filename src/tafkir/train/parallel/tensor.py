"""Tensor parallelism (arXiv 1909.08053) with DTensor: heads and MLP widths are split, activations stay whole.

A fused weight is put in an order in which each rank's rows lie together: `[Q | K | V]` becomes
`[Q0 | K0 | V0 | Q1 | K1 | V1 ...]`, `[gate | up]` becomes `[gate0 | up0 | gate1 | up1 ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from tafkir.models.attention import Attention
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.models.layers import SwiGLU
from tafkir.models.mla import LatentAttention

__all__ = [
    "Order",
    "copy_to_ranks",
    "order_fused",
    "place_parameter",
    "split_heads_and_widths",
    "sum_over_ranks",
    "with_whole_matrices",
]


@dataclass(frozen=True, slots=True)
class Order:
    """Entry i along `dim` of a weight in memory is entry `index[i]` of the weight in a checkpoint."""

    dim: int
    index: Tensor

    def apply(self, stored: Tensor) -> Tensor:
        """From a checkpoint's order to the order in memory."""
        return stored.index_select(self.dim, self.index.to(stored.device))

    def undo(self, held: Tensor) -> Tensor:
        """From the order in memory to a checkpoint's."""
        return held.index_select(self.dim, self.index.argsort().to(held.device))


def _split_order(parts: Sequence[int], ranks: int) -> Tensor:
    """Indices that put rank r's share of every part together, for the ranks one after the other."""
    chunks = [rows.chunk(ranks) for rows in torch.arange(sum(parts)).split(list(parts))]
    return torch.cat([chunk[rank] for rank in range(ranks) for chunk in chunks])


def _fused_heads(module: Attention) -> list[int]:
    """Rows of queries, keys and values in the fused projection."""
    return [count * module.head_dim for count in (module.num_heads, module.num_kv_heads, module.num_kv_heads)]


def place_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Replace a parameter, equal on all ranks, by this rank's part of it; nothing is sent."""
    param = cast(nn.Parameter, getattr(module, name))
    placed = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
    setattr(module, name, nn.Parameter(placed, requires_grad=param.requires_grad))


def copy_to_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor; its gradient is the sum of what the ranks' parts send back."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def sum_over_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' parts; each part gets the sum's gradient."""
    parts = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()


def with_whole_matrices(compute: Callable[[Tensor], Tensor], value: DTensor) -> DTensor:
    """What `compute` makes of the whole matrices (the last two dims) of a tensor; each rank keeps its part of it.

    Ranks that hold parts of one matrix gather it and compute alike; whole matrices of a stack, such as experts, stay
    where they are.
    """
    cut = range(value.ndim - 2, value.ndim)
    whole = [Replicate() if isinstance(p, Shard) and p.dim in cut else p for p in value.placements]
    made = compute(value.redistribute(placements=whole).to_local())
    placed = DTensor.from_local(
        made, value.device_mesh, whole, run_check=False, shape=value.shape, stride=value.stride()
    )
    return placed.redistribute(placements=value.placements)


def _leave_out_bias(module: nn.Module) -> None:
    """The product alone: the bias is a whole vector on every rank, and is added to what leaves the ranks."""
    module.forward = lambda x: F.linear(x, module.weight)  # type: ignore[arg-type]


class _SplitRows(ParallelStyle):
    """Each rank computes its share of the output features.

    Args:
        bias_rows: which entries of the bias are this rank's, where the module has one.
    """

    def __init__(self, bias_rows: Tensor | None = None) -> None:
        super().__init__()
        self.bias_rows = bias_rows

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        place_parameter(module, "weight", device_mesh, [Shard(0)])
        rows = self.bias_rows if getattr(module, "bias", None) is not None else None
        if rows is not None:
            _leave_out_bias(module)

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (DTensor.from_local(inputs[0], device_mesh, [Replicate()], run_check=False), *inputs[1:])

        def leave(_: nn.Module, __: Any, output: DTensor) -> Tensor:
            local = output.to_local()
            return local if rows is None else local + cast(Tensor, module.bias)[rows.to(local.device)]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class _SplitColumns(ParallelStyle):
    """Each rank holds its share of the input features; the outputs are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        place_parameter(module, "weight", device_mesh, [Shard(1)])
        biased = getattr(module, "bias", None) is not None
        if biased:
            _leave_out_bias(module)

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (DTensor.from_local(inputs[0], device_mesh, [Shard(-1)], run_check=False), *inputs[1:])

        def leave(_: nn.Module, __: Any, output: DTensor) -> Tensor:
            whole = output.redistribute(placements=[Replicate()]).to_local()
            return whole + cast(Tensor, module.bias) if biased else whole

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def order_fused(decoder: Decoder, ranks: int) -> dict[str, Order]:
    """Put the rows of the fused weights in the order of the ranks, in place; returns the orders by parameter name."""
    orders: dict[str, Order] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Attention):
            orders[f"{name}.qkv_proj.weight"] = Order(0, _split_order(_fused_heads(module), ranks))
        elif isinstance(module, SwiGLU):
            width = module.down_proj.weight.shape[1]
            orders[f"{name}.gate_up_proj.weight"] = Order(0, _split_order([width, width], ranks))
        elif isinstance(module, Experts):
            width = module.down_proj.shape[2]
            orders[f"{name}.gate_up_proj"] = Order(1, _split_order([width, width], ranks))
    with torch.no_grad():
        for name, order in orders.items():
            param = decoder.get_parameter(name)
            if not param.is_meta:
                param.copy_(order.apply(param))
    return orders


def split_heads_and_widths(decoder: Decoder, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Split attention and dense MLPs over the ranks of a 1-D mesh, in place, after `order_fused`.

    Returns:
        Parameters that every rank holds but sees only its own heads' gradient of: to be summed over the ranks.
    """
    partial: list[nn.Parameter] = []
    for module in list(decoder.modules()):
        if isinstance(module, Attention):
            rows = _split_order(_fused_heads(module), mesh.size()).chunk(mesh.size())[mesh.get_local_rank()]
            parallelize_module(module, mesh, {"qkv_proj": _SplitRows(rows), "o_proj": _SplitColumns()})
            if module.qkv_proj.bias is not None:
                partial.append(module.qkv_proj.bias)
            module.num_heads //= mesh.size()
            module.num_kv_heads //= mesh.size()
            partial += [norm.weight for norm in (module.q_norm, module.k_norm) if norm is not None]
        elif isinstance(module, LatentAttention):
            _split_latent_heads(module, mesh)
        elif isinstance(module, SwiGLU):
            parallelize_module(module, mesh, {"gate_up_proj": _SplitRows(), "down_proj": _SplitColumns()})
    return partial


def _split_latent_heads(module: LatentAttention, mesh: DeviceMesh) -> None:
    """Split what is there once a head; the way down to the latents, and its gradient, stay whole on every rank."""
    queries = "q_proj" if module.shape.q_lora_rank is None else "q_b_proj"
    parallelize_module(module, mesh, {queries: _SplitRows(), "kv_b_proj": _SplitRows(), "o_proj": _SplitColumns()})
    module.num_heads //= mesh.size()
    inner = module.project_latents

    def project_latents(x_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Each rank's heads read the rotated key that all heads share.
        latent_NL, k_NR = inner(x_ND, cos, sin)
        return latent_NL, copy_to_ranks(k_NR, mesh)

    module.project_latents = project_latents  # type: ignore[method-assign]
