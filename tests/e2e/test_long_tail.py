"""Runs with partial and with stale rollouts that are killed with SIGKILL: the same curve, the same rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafkir.runlog.rollouts import RolloutLog
from tests.e2e.conftest import Tafkir, copy_of, differing, outcome

# Both at once: a pool that is cut at a budget, and the weights of the step before.
LONG_TAIL = (
    "--set", "rlvr.steps=6",
    "--set", "rlvr.save_every=2",
    "--set", "rlvr.long_tail.token_budget=60",
    "--set", "rlvr.long_tail.pool_prompts=5",
    "--set", "rlvr.long_tail.staleness=1",
    "--set", 'rlvr.keep_rollouts="4 steps"',
)  # fmt: skip

KILLS = {
    "in the middle of the second step": ("os.rename", r"rlvr/rollouts/step-00000001", 1, 0.02),
    "between the rollouts of a step and its state": ("os.rename", r"rlvr/state/step-00000002", 1, 0.0),
    "in the middle of a step after a state": ("os.rename", r"rlvr/state/step-00000002", 1, 0.03),
    "while rollouts are written": ("os.rename", r"rlvr/rollouts/step-00000004", 1, 0.0),
    "while old rollouts are removed": ("os.remove", r"rlvr/rollouts/step-00000001", 1, 0.0),
}


def rlvr(run: Path) -> Path:
    (folder,) = run.glob("stages/[0-9][0-9]-rlvr")
    return folder


def rollout_files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in rlvr(run).glob("rollouts/*")}


@pytest.fixture(scope="module")
def unbroken(tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference run, its rlvr done again with long-tail control."""
    place = tmp_path_factory.mktemp("unbroken")
    run = copy_of(reference, place)
    done = tafkir(*tiny, *LONG_TAIL, cwd=place)
    assert done.code == 0, done.err
    return run


def test_a_run_with_unfinished_rollouts_killed_again_and_again_ends_like_an_unbroken_one(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    for moment, (event, path, count, after_s) in KILLS.items():
        kill = {"event": event, "path": path, "count": count, "after_s": after_s}
        done = tafkir(*tiny, *LONG_TAIL, cwd=tmp_path, kill=kill)
        assert done.code == -9, f"{moment}: the process was not killed\n{done.err}"
        log = RolloutLog(rlvr(run) / "rollouts")
        for step in log.steps():  # whatever is there is whole
            assert {row["step"] for row in log.read(step)} == {step}
    done = tafkir(*tiny, *LONG_TAIL, cwd=tmp_path)
    assert done.code == 0, done.err
    assert differing(outcome(run), outcome(unbroken)) == []
    assert rollout_files(run) == rollout_files(unbroken)


def test_the_unbroken_run_had_something_to_lose(unbroken: Path) -> None:
    """Else equal curves would prove nothing about what was carried."""
    rows = [json.loads(line) for line in (rlvr(unbroken) / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert max(row["rollout/carried_tokens"] for row in rows) > 0
    assert max(row["rollout/cuts_mean"] for row in rows) > 0
    assert rows[-1]["rollout/stale_tokens"] == 1.0
    assert rows[-1]["mismatch/abs_logprob_diff_max"] > 1e-4  # of the weights' age: the engines themselves agree
    assert len({row["rollout/reward_mean"] for row in rows}) > 1


def test_the_kept_rollouts_say_what_the_metrics_say(unbroken: Path) -> None:
    log = RolloutLog(rlvr(unbroken) / "rollouts")
    assert log.steps() == [3, 4, 5, 6]
    metrics = {row["step"]: row for row in map(json.loads, (rlvr(unbroken) / "metrics.jsonl").read_text().splitlines())}
    mixed = 0
    for step in log.steps():
        rows = list(log.read(step))
        assert metrics[step]["rollout/reward_mean"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
        assert metrics[step]["rollout/finished_groups"] == len({row["group"] for row in rows})
        lengths = [len(row["token_ids"]) for row in rows]
        assert metrics[step]["rollout/length_mean"] == pytest.approx(sum(lengths) / len(lengths))
        for row in rows:
            assert len(row["logprobs"]) == len(row["token_ids"]) == sum(count for _, count in row["versions"])
            assert all(version < step for version, _ in row["versions"])
            mixed += len(row["versions"]) > 1
        learned = [row for row in rows if row["train_logprobs"] is not None]
        apart = [abs(a - b) for row in learned for a, b in zip(row["train_logprobs"], row["logprobs"], strict=True)]
        if learned:
            assert metrics[step]["mismatch/abs_logprob_diff_mean"] == pytest.approx(sum(apart) / len(apart), abs=2e-5)
            masked = sum(len(row["masked"]) for row in learned) / len(apart)
            assert metrics[step]["mismatch/masked_fraction"] == pytest.approx(masked)
            entropy = -sum(x for row in learned for x in row["train_logprobs"]) / len(apart)
            assert metrics[step]["train/entropy"] == pytest.approx(entropy, abs=1e-4)
    assert mixed > 0
