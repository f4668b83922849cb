"""A page's cells say what `advise` says, and the frontier is one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.plan.advise import advise
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.grid import Grid, frontier, grid_cells, precision_for
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment
from tafkir.plan.workload import WORKLOADS

CHIPS = load_chips(own_only=True)
CHAT = WORKLOADS["chat"]


def test_cells_say_what_advise_says() -> None:
    chips = [(CHIPS["h100"], 4), (CHIPS["rtx4090"], 1), (CHIPS["ascend-910b3"], 0)]
    shape, c = find_shape("qwen3-32b"), fitted_coefficients()
    grid = Grid({"qwen3-32b": shape}, chips, {"chat": CHAT}, PRECISIONS["fp8"], c, requests=100)
    cells = {cell["chip"]: cell for cell in json.loads(json.dumps(list(grid_cells(grid))))}
    assert len(cells) == len(grid) == 3
    cell = cells["h100"]
    best = advise(Deployment(shape, CHIPS["h100"], PRECISIONS["fp8"], Layout(), c, "vllm"), CHAT, 4)[0][0]
    first = cell["layouts"][0]
    assert first["tokens_per_s"] == best.tokens_per_s and first["tpot_s"] == best.point.tpot_s
    assert first["dollars_out"] == list(best.dollars_out or ())
    assert sum(first["memory"].values()) == pytest.approx(CHIPS["h100"].memory_bytes)
    assert len(cell["simulated"]) == 8 and cell["simulated"][0]["ttft_s"][0] < cell["simulated"][-1]["ttft_s"][0]
    # One RTX 4090 cannot hold it, and says how many would; Ascend has no FP8 and gets as many chips as it takes.
    assert cells["rtx4090"]["layouts"] == [] and cells["rtx4090"]["least"] > 1
    assert cells["ascend-910b3"]["precision"] == "int8" and cells["ascend-910b3"]["layouts"]


def test_precisions_that_a_chip_lacks_are_replaced() -> None:
    assert precision_for(CHIPS["b200"], PRECISIONS["nvfp4"]).name == "nvfp4"
    assert precision_for(CHIPS["h100"], PRECISIONS["nvfp4"]).name == "fp8"
    assert precision_for(CHIPS["a100"], PRECISIONS["fp8"]).name == "int8"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_the_frontier_keeps_what_nothing_beats(speeds: list[tuple[int, int]]) -> None:
    kept = [(p["per_user"], p["per_chip"]) for p in frontier([{"per_user": a, "per_chip": b} for a, b in speeds])]
    assert set(kept) == {
        (a, b) for a, b in speeds if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in speeds)
    }
