"""Estimates grow with what they should grow with, and count what can be counted by hand."""

from __future__ import annotations

import pytest

from tafkir.plan.estimate import Rates, StageEstimate, estimate_stages
from tafkir.recipe.load import load_recipe


def estimates(*overrides: str) -> dict[str, StageEstimate]:
    recipe = load_recipe(["smoke"], overrides).recipe
    return {estimate.kind: estimate for estimate in estimate_stages(recipe, rates=Rates(train=1e9, decode=1e8))}


def test_every_stage_of_the_recipe_is_estimated() -> None:
    assert list(estimates()) == ["tokenizer", "pretrain", "sft", "rlvr", "eval", "report"]
    assert list(estimates("rlvr=", "eval=", "report=")) == ["tokenizer", "pretrain", "sft"]


def test_training_counts_three_forwards_a_token() -> None:
    recipe = load_recipe(["smoke"]).recipe
    sft = estimates()["sft"]
    assert sft.flops == pytest.approx(3 * sft.tokens * recipe.model.flops_per_token(46))
    assert sft.seconds == pytest.approx(sft.flops / 1e9)


@pytest.mark.parametrize(
    ("override", "stage", "factor"),
    [("sft.steps=12", "sft", 2), ("rlvr.steps=9", "rlvr", 3), ("threads=2", "sft", 0.5)],
)
def test_time_is_proportional(override: str, stage: str, factor: float) -> None:
    assert estimates(override)[stage].seconds == pytest.approx(factor * estimates()[stage].seconds, rel=1e-6)


def test_memory_counts_weights_gradients_and_moments() -> None:
    small, large = estimates(), estimates("model.num_experts=64")
    more = load_recipe(["smoke"], ["model.num_experts=64"]).recipe.model.num_parameters()
    more -= load_recipe(["smoke"]).recipe.model.num_parameters()
    assert large["sft"].memory_bytes - small["sft"].memory_bytes == 16 * more
    assert large["eval"].memory_bytes - small["eval"].memory_bytes == 4 * more


def test_micro_batches_lower_memory_and_not_time() -> None:
    one, two = estimates()["sft"], estimates("sft.micro_batches=2")["sft"]
    assert two.memory_bytes < one.memory_bytes and two.seconds == one.seconds
