"""AdamW, and Muon for hidden matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tafkir.models.decoder import Decoder
from tafkir.recipe.schema import OptimConfig

__all__ = ["Muon", "build_optimizers", "orthogonalize"]

# Coefficients of the quintic iteration (Jordan et al. 2024, "Muon"): steep at zero, singular values end near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate U V^T of the singular value decomposition by Newton-Schulz iteration in bfloat16.

    Args:
        matrix: (..., m, n); leading dims are a batch of matrices.
        iterations: quintic steps; after five, singular values lie within about 0.7 to 1.2.
    """
    a, b, c = _QUINTIC
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    levelled: Tensor = x.mT if tall else x
    return levelled.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices and stacks of matrices.

    Nesterov momentum and Newton-Schulz after Jordan et al. 2024; the update is scaled by 0.2 sqrt(max(m, n)), so
    that its size matches AdamW's (Moonlight, arXiv 2502.16982, equation 4); decoupled weight decay. Unlike
    `torch.optim.Muon` it takes parameters with leading dims, such as stacked experts.

    Attributes:
        orthogonalize: what levels an update; many ranks bring their own, which sees whole matrices.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.orthogonalize: Callable[[Tensor], Tensor] = orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update every parameter that has a gradient; a closure is not called."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        average = state["exp_avg"].lerp_(param.grad, 1 - group["momentum"])
        update = self.orthogonalize(param.grad.lerp(average, group["momentum"]))
        scale = 0.2 * math.sqrt(max(param.shape[-2:]))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * scale)


def _is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Matrices inside the blocks; the tables and the router's few rows are left to AdamW."""
    return param.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "router"))


def build_optimizers(decoder: Decoder, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a decoder; `group["peak_lr"]` of every group is its peak learning rate.

    Weight decay acts on matrices only, never on norms.
    """
    named = [(name, param) for name, param in decoder.named_parameters() if param.requires_grad]
    hidden = [p for name, p in named if config.optimizer == "muon" and _is_hidden_matrix(name, p)]
    taken = {id(param) for param in hidden}
    rest = [param for _, param in named if id(param) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=1e-8,
            fused=True,
        )
    ]
    if hidden:
        optimizers.append(Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
