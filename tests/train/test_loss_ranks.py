"""A policy update's loss and gradients do not depend on how its groups are packed, cut or shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.ranks import run_ranks
from tests.train.sharded_loss import GROUPS, update

KEYS: dict[str, dict[str, Any]] = {
    "ring": {},
    "dapo": {"reduction": "token_mean", "acceptance": {"kind": "none"}, "clip_eps_high": 0.28},
    "dr_grpo": {"reduction": "constant", "acceptance": {"kind": "tis"}, "max_completion_tokens": 12},
    "gspo": {"surrogate": "gspo", "acceptance": {"kind": "seq_tis"}},
}


def same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> None:
    assert other[0] == pytest.approx(one[0], abs=1e-6)
    assert max(float(grad.abs().max()) for grad in one[1]) > 1e-3
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", KEYS)
def test_packing_and_micro_batches_change_nothing(name: str) -> None:
    """All groups in one row, two rows, and each alone, where nothing is packed beside it."""
    whole = update(KEYS[name])
    for pieces in (2, len(GROUPS)):
        same(whole, update(KEYS[name], pieces))


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_ranks_changes_nothing(world: int) -> None:
    """Five groups on two or four processes, some with more of them than others; denominators are the whole step's."""
    for name in ("ring", "dapo"):
        whole = update(KEYS[name])
        for result in run_ranks(world, update, KEYS[name]):
            same(whole, result)
