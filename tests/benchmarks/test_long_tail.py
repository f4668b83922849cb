"""The simulated engine counts what it should, and a budget leaves it less idle without preferring short rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import long_tail
from benchmarks.long_tail import SLOTS, SimulatedEngine, length_of, mean_length, simulate, variants
from tafkir.recipe.long_tail import LongTailConfig
from tafkir.records import Request, SamplingParams


def test_the_engine_is_as_slow_as_its_longest_rollout() -> None:
    requests = [Request(f"0.{seed}", (1,) * 100, SamplingParams(seed=seed)) for seed in range(SLOTS)]
    engine = SimulatedEngine(1.0)
    done = {completion.request_id: len(completion.token_ids) for completion in engine.complete(requests)}
    lengths = [length_of(seed, 1.0) for seed in range(SLOTS)]
    assert list(done.values()) == sorted(lengths)
    assert engine.ticks == max(lengths) + 1  # and one for the prompt
    assert engine.busy == sum(lengths)


def test_a_budget_leaves_less_idle_and_learns_from_the_same_lengths() -> None:
    mean = mean_length(1.0, 4000)
    synchronous, _, pooled, impatient = (simulate(1.0, tail, 10, 0) for tail in variants(mean).values())
    assert synchronous["idle_share"] > 0.7
    assert pooled["idle_share"] < synchronous["idle_share"] - 0.2
    assert pooled["tokens_per_tick"] > 2 * synchronous["tokens_per_tick"]
    assert pooled["dropped_share"] == 0.0 and pooled["length_bias"] == pytest.approx(1.0, abs=0.12)
    assert impatient["dropped_share"] > 0.05 and impatient["length_bias"] < pooled["length_bias"]
    assert pooled["lag_mean"] > 0.2 and synchronous["lag_mean"] == 0.0


def test_the_synchronous_row_is_the_default_table() -> None:
    assert next(iter(variants(100.0).values())) == LongTailConfig()


def test_the_command_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["long_tail.py", "--steps", "6", "--repeats", "1", "--out", str(out)])
    monkeypatch.setattr(long_tail, "TAILS", {"light": 0.5})
    long_tail.main()
    facts = json.loads(out.read_text())
    assert facts["rows"][0]["variant"] == "synchronous" and len(facts["rows"]) == 4
    assert "budget, pool 2x" in capsys.readouterr().out
