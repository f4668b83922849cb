"""Advantages from group rewards."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grpo_advantages"]


def grpo_advantages(rewards_PG: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards_PG: rewards of G completions for each of P prompts, float.
        normalize_std: divide by the group's standard deviation (unbiased, as in TRL and verl); off, the
            advantage is the centred reward alone (Dr. GRPO, arXiv 2503.20783).
        eps: added to the standard deviation; a group of equal rewards gets zero advantages.

    Returns:
        Advantages of shape (P, G).
    """
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not normalize_std:
        return centred
    return centred / (rewards_PG.std(dim=1, keepdim=True) + eps)


def zero_variance_groups(rewards_PG: Tensor) -> Tensor:
    """Boolean (P,): groups whose rewards are all equal and which therefore teach nothing."""
    return torch.all(rewards_PG == rewards_PG[:, :1], dim=1)
