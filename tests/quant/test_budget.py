"""The knapsack of formats against every combination, and at the size of a large model."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.errors import RecipeError
from tafkir.quant.budget import Option, allocate, allocate_reference, best_choices

OPTION = st.builds(Option, st.integers(0, 40), st.integers(0, 50).map(lambda loss: loss / 7))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


@given(GROUPS, st.integers(0, 200))
def test_nothing_better_fits(groups: list[list[Option]], budget: int) -> None:
    try:
        expected = allocate_reference(groups, budget)
    except RecipeError:
        with pytest.raises(RecipeError, match="too small"):
            allocate(groups, budget)
        return
    found = allocate(groups, budget)
    assert found.loss == pytest.approx(expected.loss, abs=1e-9) and found.cost <= budget
    assert found.loss == pytest.approx(sum(o[i].loss for o, i in zip(groups, found.picks, strict=True)))
    assert found.cost == sum(o[i].cost for o, i in zip(groups, found.picks, strict=True))
    assert found.bound <= found.loss + 1e-9


def test_a_large_model_is_decided_at_once() -> None:
    """61 layers of six groups, of sizes and sensitivities as they come; the bound proves how near the best is."""
    generator = random.Random(0)
    groups = []
    for _ in range(61):
        for size in (7_000_000, 58_000_000, 117_000_000, 4_100_000, 14_700_000, 11_300_000_000):
            loss = generator.lognormvariate(0, 1.5) * size**0.5
            groups.append([Option(size * 9 // 16, loss), Option(size, loss / 40), Option(2 * size, 0.0)])
    budget = sum(options[0].cost for options in groups) * 5 // 4
    began = time.process_time()
    found = allocate(groups, budget)
    assert time.process_time() - began < 2
    assert found.cost <= budget and found.bound <= found.loss <= found.bound * 1.001
    hull = best_choices(groups)
    assert hull == sorted(hull) and hull[-1][1] == pytest.approx(0, abs=1e-3) and len(hull) > 366
    below, above = max(p for p in hull if p[0] <= budget), min(p for p in hull if p[0] > budget)
    assert above[1] - 1e-3 <= found.loss <= below[1] + 1e-3
    assert found.price > 0 and allocate(groups, 10**15).price == 0
