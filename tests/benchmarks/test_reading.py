"""The kinds of failures that `benchmarks/reading.py` tells apart."""

from __future__ import annotations

import pytest

from benchmarks.reading import failure_kind
from tafkir.data.sources import Problem, Step

_PROBLEM = Problem(
    "p", "svamp", "validation", "8 birds sit on 2 trees. 3 birds leave. How many stay?", "5", (Step("8-3", "5"),)
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("8-3=5\n5+2=7\n#### 7", "more steps"),
        ("#### 5", "no step"),
        ("8+3=11\n#### 11", "wrong operation"),
        ("8-2=6\n#### 6", "wrong numbers"),
        ("8-3=4\n#### 4", "calculation"),
    ],
)
def test_failures_on_problems_of_one_step_fall_into_kinds(text: str, kind: str) -> None:
    assert failure_kind(_PROBLEM, text) == kind
