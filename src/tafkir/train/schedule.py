"""Learning-rate schedules, and the decay shapes that checkpoint merging shares with them: pure functions."""

from __future__ import annotations

import math

from tafkir.recipe.schema import DecayShape, OptimConfig

__all__ = ["decayed_share", "scheduled_share"]


def decayed_share(shape: DecayShape, done: float, floor: float = 0.0) -> float:
    """What is left of the peak when the share `done` of a decay is over: 1 at 0, `floor` at 1.

    `1-sqrt` is 1 - sqrt(done) (Hägele et al., arXiv 2405.18392): steep at first, then slow.
    """
    if shape == "linear":
        return 1.0 + (floor - 1.0) * done
    if shape == "1-sqrt":
        return 1.0 + (floor - 1.0) * math.sqrt(done)
    return floor + (1.0 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def scheduled_share(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of `steps` as a share of the peak: linear warm-up, then the schedule.

    `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) stays at the peak until the last `decay_share` of all
    steps and decays there in `decay_shape`; a warm-up that reaches into the decay shortens it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start, shape = config.warmup_steps, config.decay_shape
    if config.schedule == "wsd":
        start = max(start, steps - round(config.decay_share * steps))
        if step < start:
            return 1.0
    else:
        shape = config.schedule
    return decayed_share(shape, (step - start) / max(1, steps - start), config.min_lr_ratio)
