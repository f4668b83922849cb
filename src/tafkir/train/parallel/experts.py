"""Expert parallelism: each rank holds some experts; tokens travel to them and back (arXiv 2006.16668).

Shapes: N tokens of this rank, A active experts per token, P = N * A pairs, R pairs received, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from tafkir.models.experts import Experts
from tafkir.train.parallel.tensor import copy_to_ranks, place_parameter, sum_over_ranks
from tafkir.train.parallel.world import Meshes

__all__ = ["place_experts"]

ExpertForward = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    return cast(Tensor, _Exchange.apply(rows, send, receive, group))  # type: ignore[no-untyped-call]


@contextmanager
def _local_weights(experts: Experts) -> Iterator[None]:
    """Let the module see its own part of each weight as a plain tensor."""
    weights = {name: cast(DTensor, param).to_local() for name, param in experts.named_parameters(recurse=False)}
    # An instance attribute is found before a parameter of the same name.
    experts.__dict__.update(weights)
    try:
        yield
    finally:
        for name in weights:
            del experts.__dict__[name]


def _run_shared_out(
    forward: ExpertForward, group: dist.ProcessGroup, num_local: int, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Send each token-expert pair to the rank of its expert, run the local experts, bring the results back."""
    num_ranks = dist.get_world_size(group)
    flat_P = ids_NA.reshape(-1)
    order_P = torch.sort(flat_P, stable=True).indices
    sent_RE = torch.bincount(flat_P, minlength=num_ranks * num_local).view(num_ranks, num_local)
    received_RE = torch.empty_like(sent_RE)
    dist.all_to_all_single(received_RE, sent_RE, group=group)
    send, receive = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
    x_R = _exchange(x_ND.index_select(0, order_P // ids_NA.shape[1]), send, receive, group)
    weights_R = _exchange(weights_NA.reshape(-1).index_select(0, order_P), send, receive, group)
    local_E = torch.arange(num_local, device=ids_NA.device).repeat(num_ranks)
    ids_R = local_E.repeat_interleave(received_RE.reshape(-1))
    y_R = forward(x_R, ids_R.unsqueeze(1), weights_R.unsqueeze(1))
    y_PD = _exchange(y_R, receive, send, group)
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    return y_PD.index_select(0, inverse_P).view(*ids_NA.shape, -1).sum(1)


def place_experts(experts: Experts, meshes: Meshes) -> None:
    """Keep this rank's experts, and of each its part of the width; their inputs and outputs stay as they were.

    Args:
        experts: whole, its `gate_up_proj` already ordered for the tensor ranks; changed in place.
        meshes: E is a multiple of the expert ranks, I of the tensor ranks.
    """
    sizes = meshes.sizes
    names = [name for name, size in (("expert", sizes.expert), ("tensor", sizes.tensor)) if size > 1]
    mesh = meshes.expert[tuple(names)] if sizes.expert > 1 else meshes.dense["tensor"]
    for name, width_dim in (("gate_up_proj", 1), ("down_proj", 2)):
        dims = {"expert": Shard(0), "tensor": Shard(width_dim)}
        place_parameter(experts, name, mesh, [dims[axis] for axis in names])
    tensor = meshes.dense["tensor"] if sizes.tensor > 1 else None
    group = meshes.expert.get_group("expert") if sizes.expert > 1 else None
    inner = experts.forward

    def forward(x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        if tensor is not None:
            x_ND, weights_NA = copy_to_ranks(x_ND, tensor), copy_to_ranks(weights_NA, tensor)
        with _local_weights(experts):
            if group is None:
                out_ND = inner(x_ND, expert_ids_NA, weights_NA)
            else:
                num_local = experts.gate_up_proj.shape[0]
                out_ND = _run_shared_out(inner, group, num_local, x_ND, expert_ids_NA, weights_NA)
        if tensor is None:
            return out_ND
        out_ND = sum_over_ranks(out_ND, tensor)
        # FSDP hangs its hooks on what the module returns, and warns of a view.
        return out_ND if group is None else out_ND.clone()

    experts.forward = forward  # type: ignore[method-assign]
