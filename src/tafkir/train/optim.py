"""AdamW over decay and no-decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from tafkir.recipe.schema import OptimConfig

__all__ = ["build_optimizer", "learning_rate_at"]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices only, never on norms."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=True,
    )


def learning_rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule down to its minimum."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    floor = peak * config.min_lr_ratio
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "constant":
        return peak
    if config.schedule == "linear":
        return peak + (floor - peak) * done
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
