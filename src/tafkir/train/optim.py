"""AdamW and AdamATan2, Muon for hidden matrices, and sign-SGD for tables of which a step touches few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tafkir.recipe.schema import OptimConfig

__all__ = ["AdamATan2", "Muon", "SparseSignSgd", "build_optimizers", "orthogonalize"]

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


class AdamATan2(torch.optim.Optimizer):
    """AdamW whose quotient of moments goes through atan2 instead of a division with an epsilon (arXiv 2407.05872).

    Decoupled decay first; then the update is atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t))), at most pi / 2.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update every parameter that has a gradient; a closure is not called."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        step = int(state["step"])
        first = state["exp_avg"].lerp_(param.grad, 1 - beta1)
        second = state["exp_avg_sq"].lerp_(param.grad.square(), 1 - beta2)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        update = torch.atan2(first / (1 - beta1**step), (second / (1 - beta2**step)).sqrt_())
        param.add_(update, alpha=-group["lr"])


class SparseSignSgd(torch.optim.Optimizer):
    """Moves the touched rows of a table by the sign of their gradient; keeps no state.

    Gradients of equal rows are added before the sign is taken; decay acts on touched rows only. What Adam does to rows
    that are seen rarely, without moments as large as the table (the reference of arXiv 2510.04871).

    Args:
        table: [P, E].
        touched: (rows [B], copies of them [B, E] with their gradients), filled in forward passes and emptied here.
        lr: step size.
        weight_decay: decoupled.
    """

    def __init__(
        self, table: Tensor, touched: list[tuple[Tensor, Tensor]], lr: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__([table], {"lr": lr, "weight_decay": weight_decay})
        self.touched = touched

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update the rows that were touched since the last step; a closure is not called."""
        found = [(rows, copies.grad) for rows, copies in self.touched if copies.grad is not None]
        self.touched.clear()
        if not found:
            return
        group = self.param_groups[0]
        table: Tensor = group["params"][0]
        rows, place = torch.cat([rows for rows, _ in found]).unique(return_inverse=True)
        gradient = torch.zeros(len(rows), table.shape[1], dtype=table.dtype, device=table.device)
        gradient.index_add_(0, place, torch.cat([grad for _, grad in found]).to(table.dtype))
        kept = table[rows] * (1 - group["lr"] * group["weight_decay"])
        table[rows] = kept.add_(gradient.sign_(), alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was touched."""
        self.touched.clear()


# Tables, heads, the router's few rows, and filters that see one feature each.
_TABLES = ("embed_tokens", "embed_positions", "lm_head", "q_head", "router", "filters")


def _is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Matrices inside the blocks; what is named in `_TABLES` is left to AdamW."""
    return param.ndim >= 2 and not any(part in name for part in _TABLES)


def build_optimizers(
    model: nn.Module, config: OptimConfig, *, decay_vectors: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model; `group["peak_lr"]` of every group is its peak learning rate.

    Weight decay acts on matrices only, never on norms, unless `decay_vectors` asks for it.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    hidden = [p for name, p in named if config.optimizer == "muon" and _is_hidden_matrix(name, p)]
    taken = {id(param) for param in hidden}
    rest = [param for _, param in named if id(param) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": config.weight_decay if decay_vectors else 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "adam_atan2":
        optimizers.append(AdamATan2(groups, lr=config.learning_rate, betas=betas))
    else:
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=True))
    if hidden:
        optimizers.append(Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
