"""A checkpoint chosen, a reward model, and reinforcement learning on it: many processes make the run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import rows_of_sums, write_jsonl
from tests.parallel.chain_jobs import ask_an_endpoint, run_chain
from tests.parallel.ranks import run_ranks
from tests.parallel.test_trajectory import assert_same_rows, assert_same_weights


def settings(folder: Path) -> list[str]:
    sums = write_jsonl(folder / "sums.jsonl", rows_of_sums())
    made = [
        {"prompt": f"{i}. What is it? {name}", "chosen": f"It is {name}.", "rejected": "No idea at all, sorry."}
        for i in range(5)
        for name in ("pens", "cups", "أقلام", "كتب")
    ]
    pairs = write_jsonl(folder / "pairs.jsonl", made)
    return [f"data.sources=[{str(sums)!r}]", f"preferences.sources=[{str(pairs)!r}]"]


def assert_same(found: Any, wanted: Any) -> None:
    """Equal but for rounding, however deep."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == (pytest.approx(wanted, abs=1e-5) if isinstance(wanted, float) else wanted)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    shared = settings(tmp_path)
    alone = run_chain(tmp_path / "alone", shared)
    first, other = run_ranks(2, run_chain, tmp_path / "shared", shared)
    assert other == {}
    for key in ("select", "heldout", "guard", "kept"):
        assert_same(first[key], alone[key])
    assert len(alone["select"]["candidates"]) == 2 and len(alone["kept"]) == 3
    assert {"rlhf/judge_reward", "rlhf/kl", "rlhf/verifiable_accuracy"} <= alone["rows"]["rlhf"][-1].keys()
    for kind, rows in alone["rows"].items():
        assert_same_rows(first["rows"][kind], rows)
    assert_same_weights(first["weights"], alone["weights"])


def test_an_endpoint_is_asked_by_one_process(tmp_path: Path) -> None:
    rewards = run_ranks(2, ask_an_endpoint, tmp_path / "asked.jsonl")
    assert rewards == [[0.0, 1.0, 1.0, 2.0, 2.0, 3.0]] * 2
    assert (tmp_path / "asked.jsonl").read_text() == '["0", "1", "2"]\n'
