"""Advantages from rewards: P prompts with G completions each. What they are made of are the rewards of a whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.recipe.rl import AdvantageKind

__all__ = [
    "advantages",
    "dr_grpo",
    "grpo",
    "leave_one_out",
    "overlong_penalty",
    "reinforce_plus_plus",
    "rloo",
    "zero_variance_groups",
]

_EPS = 1e-6


def grpo(rewards_PG: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) within the group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the unbiased one, as in TRL and verl; a group of equal rewards gets zeros.
    """
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    normal = centred / (rewards_PG.std(dim=1, keepdim=True) + _EPS)
    # The mean of equal rewards can be off by a rounding, which so small a divisor would blow up.
    return torch.where(zero_variance_groups(rewards_PG)[:, None], torch.zeros_like(normal), normal)


def dr_grpo(rewards_PG: Tensor) -> Tensor:
    """r - mean within the group, no division (Dr. GRPO, arXiv 2503.20783)."""
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def rloo(rewards_PG: Tensor) -> Tensor:
    """r_i - mean of the group's *other* rewards (RLOO, arXiv 2402.14740): leave-one-out without a division."""
    others = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (rewards_PG.shape[1] - 1)
    return rewards_PG - others


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """(r_i - mean of the others) / (their std + 1e-6), as NeMo-RL's `use_leave_one_out_baseline` does.

    The standard deviation of the others is the population's; where it is zero, or there are no two of them, nothing is
    divided.
    """
    rest = rewards_PG.shape[1] - 1
    mean = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / rest
    square = (rewards_PG.square().sum(dim=1, keepdim=True) - rewards_PG.square()) / rest
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.where(std > _EPS, (rewards_PG - mean) / (std + _EPS), rewards_PG - mean)


def reinforce_plus_plus(rewards_PG: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) over the whole step, not the group (REINFORCE++, arXiv 2501.03262, equation 7)."""
    if bool(torch.all(rewards_PG == rewards_PG[0, 0])):
        return torch.zeros_like(rewards_PG)
    return (rewards_PG - rewards_PG.mean()) / (rewards_PG.std() + _EPS)


def advantages(kind: AdvantageKind, rewards_PG: Tensor) -> Tensor:
    """Advantages (P, G) of float rewards (P, G), as the recipe names them."""
    match kind:
        case "grpo":
            return grpo(rewards_PG)
        case "dr_grpo":
            return dr_grpo(rewards_PG)
        case "rloo":
            return rloo(rewards_PG)
        case "leave_one_out":
            return leave_one_out(rewards_PG)
        case "reinforce++":
            return reinforce_plus_plus(rewards_PG)


def zero_variance_groups(rewards_PG: Tensor) -> Tensor:
    """Boolean (P,): groups whose rewards are all equal and which therefore teach nothing."""
    return torch.all(rewards_PG == rewards_PG[:, :1], dim=1)


def overlong_penalty(lengths_PG: Tensor, *, max_tokens: int, buffer_tokens: int, penalty: float) -> Tensor:
    """What DAPO's soft overlong punishment adds to the rewards (arXiv 2503.14476, equation 13): zero or less.

    0 up to `max_tokens - buffer_tokens`, then falling in a line to `-penalty` at `max_tokens`. A buffer of 0 is off.
    """
    if buffer_tokens == 0:
        return torch.zeros_like(lengths_PG, dtype=torch.float32)
    excess = (lengths_PG - (max_tokens - buffer_tokens)).clamp(min=0, max=buffer_tokens)
    return -penalty * excess / buffer_tokens
