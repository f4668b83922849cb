"""The recursive model under torchrun: rows of the batch shared out, the same losses, and states for any number."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.trm import load_trm
from tafkir.errors import RecipeError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.parallel import ParallelSizes, check_parallel
from tafkir.runlog.atomic import read_json
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli
from tests.parallel.ranks import run_ranks
from tests.parallel.test_torchrun import torchrun, worker_of
from tests.parallel.test_trajectory import assert_same_rows
from tests.parallel.trm_jobs import train_recursively

OVERRIDES = (
    "threads=1", "kernels=torch", "report=", "trm.steps=12", "trm.batch_size=6", "trm.warmup_steps=2",
    "trm.save_every=2", "trm.log_every=1", "trm.validate_every=5", "trm.precision=float32", "trm.optimizer=adamw",
    "trm.learning_rate=1e-5", "trm.model.hidden_size=16", "trm.model.intermediate_multiple=8",
    "trm.model.mixer=attention", "trm.model.position_encoding=rope", "trm.model.num_attention_heads=2",
    "trm.model.num_latent_steps=2", "trm.model.max_supervision_steps=3", "trm.puzzles.num_train=12",
    "trm.puzzles.num_validation=5", "trm.puzzles.num_test=6",
)  # fmt: skip


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert_same_rows(found["rows"], wanted["rows"])
    assert found["drawn"] == wanted["drawn"]
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = train_recursively(tmp_path_factory.mktemp("alone"), {})
    halted = [row["train/halted"] for row in found["rows"]]
    assert 0 < halted[0] < 7 and len(set(halted)) > 1, "puzzles halt at different steps"
    return found


@pytest.mark.parametrize(
    "table",
    [{}, pytest.param({"micro_batches": 2}, marks=pytest.mark.slow)],
    ids=["whole", "micro-batches"],
)
def test_two_processes_follow_the_trajectory_of_one(
    table: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = run_ranks(2, train_recursively, tmp_path, table)
    assert_same(first, alone)
    assert (first["held"], second["held"], second["rows"]) == (3, 4, None)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items()), "copies agree"


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_another_number_of_processes_goes_on(before: int, after: int, alone: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(before, train_recursively, tmp_path, {}, stop=5)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004.safetensors"]
    assert_same(run_ranks(after, train_recursively, tmp_path, {})[0], alone)


@pytest.mark.parametrize(
    ("sizes", "where"),
    [
        ({"expert": 2}, "parallel.expert_parallel"),
        ({"tensor": 2}, "parallel.tensor_parallel"),
        ({"data": 65}, "trm.batch_size"),
    ],
)
def test_what_cannot_be_shared_out(sizes: dict[str, int], where: str) -> None:
    with pytest.raises(RecipeError, match=where):
        check_parallel(load_recipe(["trm-sudoku4"]).recipe, ParallelSizes(**sizes))
    check_parallel(load_recipe(["trm-sudoku4"]).recipe, ParallelSizes(data=64))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker through /proc")
def test_a_killed_worker_is_restarted_and_ends_with_the_same_result(
    tmp_path: Path, cli: Cli, cli_env: dict[str, str]
) -> None:
    """`torchrun -m tafkir.cli.main run` with the recipe's own stage: puzzles, validation, checkpoint and scores."""
    given = [part for value in OVERRIDES for part in ("--set", value)]
    done = cli("run", "trm-sudoku4", "--name", "alone", *given)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out").open("w+") as out:
        command = [*torchrun(2, "--max-restarts", "1"), "trm-sudoku4", "--name", "many", *given]
        process = subprocess.Popen(command, cwd=tmp_path, env=cli_env, stdout=out, stderr=subprocess.STDOUT)
        try:
            many, alone = (RunDir(tmp_path / "runs" / name).stage("trm") for name in ("many", "alone"))
            deadline = time.monotonic() + 300
            while not list(many.state_dir.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            worker = worker_of(process.pid, rank=1)
            assert worker is not None, (tmp_path / "out").read_text()
            os.kill(worker, signal.SIGKILL)
            process.wait(300)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "out").read_text()
    log = [row["message"] for row in read_jsonl(tmp_path / "runs" / "many" / "log.jsonl")]
    assert "trm: goes on" in log, log
    rows = zip(read_jsonl(many.metrics_path), read_jsonl(alone.metrics_path), strict=True)
    for ours, theirs in rows:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4), ours["step"]
    found, wanted = (load_trm(stage.checkpoint_dir).model.state_dict() for stage in (many, alone))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    results = [read_json(stage.path / "result.json") for stage in (many, alone)]
    assert results[0]["test"] == results[1]["test"]
