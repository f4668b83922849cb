"""Schedules by hand, against torch's own schedulers, and the running recipe's to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tafkir.errors import RecipeError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.schema import OptimConfig
from tafkir.train.schedule import decayed_share, scheduled_share


def test_schedules_by_hand() -> None:
    base: dict[str, Any] = {"warmup_steps": 4, "min_lr_ratio": 0.2}
    linear, cosine, constant = (OptimConfig(schedule=kind, **base) for kind in ("linear", "cosine", "constant"))
    assert [scheduled_share(step, 12, linear) for step in (0, 3, 4, 8)] == pytest.approx([0.25, 1.0, 1.0, 0.6])
    assert scheduled_share(12, 12, linear) == pytest.approx(0.2)
    assert scheduled_share(8, 12, cosine) == pytest.approx(0.6)
    assert scheduled_share(11, 12, constant) == 1.0


def test_wsd_warms_up_stays_and_decays() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=2, decay_share=0.4, decay_shape="1-sqrt", min_lr_ratio=0.0)
    got = [scheduled_share(step, 10, config) for step in range(11)]
    # 1 - sqrt(done) at done = 0, 1/4, 1/2, 3/4 and, past the last step, 1
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])


def test_wsd_over_all_steps_is_the_plain_schedule() -> None:
    for shape in ("linear", "cosine"):
        whole = OptimConfig(schedule="wsd", decay_share=1.0, decay_shape=shape, warmup_steps=3)  # type: ignore[arg-type]
        plain = OptimConfig(schedule=shape, warmup_steps=3)  # type: ignore[arg-type]  # literals from a loop
        assert [scheduled_share(i, 20, whole) for i in range(20)] == [scheduled_share(i, 20, plain) for i in range(20)]


def test_a_decay_shorter_than_a_step_and_a_warm_up_of_all_steps_divide_by_nothing() -> None:
    short = OptimConfig(schedule="wsd", decay_share=0.01, warmup_steps=0)
    assert [scheduled_share(step, 10, short) for step in range(10)] == [1.0] * 10
    long = OptimConfig(schedule="wsd", warmup_steps=10)
    assert scheduled_share(9, 10, long) == 1.0
    assert scheduled_share(10, 10, long) == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_linear_and_cosine_agree_with_torch(floor: float) -> None:
    def theirs(schedule: type, **options: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = schedule(optimizer, **options)
        rates = []
        for _ in range(9):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    lr = torch.optim.lr_scheduler
    linear = theirs(lr.LinearLR, start_factor=1.0, end_factor=floor, total_iters=8)
    cosine = theirs(lr.CosineAnnealingLR, T_max=8, eta_min=floor)
    assert [decayed_share("linear", i / 8, floor) for i in range(9)] == pytest.approx(linear, abs=1e-12)
    assert [decayed_share("cosine", i / 8, floor) for i in range(9)] == pytest.approx(cosine, abs=1e-12)


def frozen_share(step: int, steps: int, config: OptimConfig) -> float:
    """The formula that the shipped base was trained with, operation by operation."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1.0 + (floor - 1.0) * done
    return floor + (1.0 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def test_the_schedules_of_trained_checkpoints_keep_their_bits() -> None:
    base = load_recipe(["base-tiny"]).recipe.pretrain
    assert base is not None and base.schedule == "linear"
    for config in (base, OptimConfig(schedule="cosine", min_lr_ratio=0.1)):
        for step in range(0, 3000, 7):
            assert scheduled_share(step, 3000, config) == frozen_share(step, 3000, config)


def test_a_decay_share_of_nothing_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="decay_share"):
        load_recipe(["smoke"], ["pretrain.decay_share=0"])
    with pytest.raises(RecipeError, match=r"decay_shape.*1-sqrt"):
        load_recipe(["smoke"], ["pretrain.decay_shape=sqrt"])
