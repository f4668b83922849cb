"""Which checkpoint goes on, and how documents fill packed rows."""

from __future__ import annotations

import pytest

from tafkir.errors import DataError
from tafkir.train.language import fill_rows
from tafkir.train.selection import Candidate, choose


def candidate(step: int, score: float, entropy: float) -> Candidate:
    return Candidate(step, score, score, score, entropy)


def test_the_best_score_above_the_floor_goes_on() -> None:
    measured = [candidate(3, 0.9, 0.05), candidate(2, 0.7, 0.2), candidate(1, 0.5, 0.6)]
    assert choose(measured, 0.1)[0].step == 2
    assert choose(measured, 0.0)[0].step == 3
    assert choose(measured, 0.3)[0].step == 1
    chosen, reason = choose(measured, 2.0)
    assert chosen.step == 1 and "highest entropy" in reason
    assert choose([candidate(4, 0.5, 1.0), candidate(2, 0.5, 1.0)], 0.1)[0].step == 2


def test_rows_are_filled_in_order_and_none_is_too_long() -> None:
    documents = [(list(range(size)), None) for size in (3, 4, 2, 5, 1)]
    rows = fill_rows(documents, 7)
    assert [[len(ids) for ids, _ in row] for row in rows] == [[3, 4], [2, 5], [1]]
    assert fill_rows(documents, 0) == [documents]
    with pytest.raises(DataError, match="5 tokens does not fit a packed row of 4"):
        fill_rows(documents, 4)
