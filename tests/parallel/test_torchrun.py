"""`torchrun ... -m tafkir.cli.main run RECIPE` as a user starts it, and as a cluster treats it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.trm import load_trm
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli
from tests.e2e.conftest import rows_of_sums, write_jsonl
from tests.parallel.ranks import free_port
from tests.parallel.test_trajectory import assert_same_rows, assert_same_weights

RECIPE = """
name = "many"
threads = 1

[model]
vocab_size = 512
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
intermediate_size = 64
moe_intermediate_size = 16
num_experts = 8
n_group = 2
topk_group = 1

[data]
sources = [{sums!r}]

[tokenizer]
vocab_size = 512

[pretrain]
steps = 15
batch_problems = 4
learning_rate = 1e-2
warmup_steps = 2
save_every = 3
log_every = 1
story_share = 0.0

[trm]
steps = 6
batch_size = 6
warmup_steps = 2
log_every = 1
validate_every = 5
optimizer = "adamw"
learning_rate = 1e-5

[trm.model]
hidden_size = 16
intermediate_multiple = 8
num_attention_heads = 2
num_latent_steps = 2
max_supervision_steps = 3

[trm.puzzles]
kind = "sudoku"
num_train = 12
num_validation = 5
num_test = 6
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "many.toml"
    sums = write_jsonl(tmp_path / "sums.jsonl", rows_of_sums())
    path.write_text(RECIPE.format(sums=str(sums)), encoding="utf-8")
    return path


def torchrun(world: int, *options: str) -> list[str]:
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), *place, *options]
    return [*command, "-m", "tafkir.cli.main", "run"]


def worker_of(parent: int, rank: int) -> int | None:
    """The process that torchrun started as this rank, as far as it is up."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                environ = (path.parent / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environ:
                    return int(path.parent.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker through /proc")
def test_a_killed_worker_is_restarted_and_ends_with_the_same_result(
    recipe: Path, tmp_path: Path, here: Cli, cli_env: dict[str, str]
) -> None:
    """A language model, then a recursive one: both stages are those of all processes."""
    done = here("run", str(recipe), "--name", "alone")
    assert done.returncode == 0, done.stderr
    many, alone = (RunDir(tmp_path / "runs" / name) for name in ("many", "alone"))
    with (tmp_path / "out").open("w+") as out:
        command = [*torchrun(2, "--max-restarts", "1"), str(recipe)]
        process = subprocess.Popen(command, cwd=tmp_path, env=cli_env, stdout=out, stderr=subprocess.STDOUT)
        try:
            states = many.stage("pretrain").state_dir
            deadline = time.monotonic() + 300
            while not list(states.glob("step-*.dcp")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            worker = worker_of(process.pid, rank=1)
            assert worker is not None, (tmp_path / "out").read_text()
            os.kill(worker, signal.SIGKILL)
            process.wait(300)
        finally:
            process.kill()
    said = (tmp_path / "out").read_text()
    assert process.returncode == 0, said
    log = [row["message"] for row in read_jsonl(many.log_path)]
    assert "pretrain: goes on" in log and "trm: starts" in log, log
    ours, theirs = many.stage("pretrain"), alone.stage("pretrain")
    assert_same_rows(list(read_jsonl(ours.metrics_path)), list(read_jsonl(theirs.metrics_path)))
    assert_same_weights(*(load_checkpoint(stage.checkpoint_dir).decoder.state_dict() for stage in (ours, theirs)))
    ours, theirs = many.stage("trm"), alone.stage("trm")
    for row, wanted in zip(read_jsonl(ours.metrics_path), read_jsonl(theirs.metrics_path), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-4), row["step"]
    assert (ours.read_result() or {})["test"] == (theirs.read_result() or {})["test"]
    found, weights = (load_trm(stage.checkpoint_dir).model.state_dict() for stage in (ours, theirs))
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_number_of_processes_that_does_not_fit_is_one_line(
    recipe: Path, tmp_path: Path, cli_env: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "tafkir.cli.main", "run", str(recipe), "--set", "parallel.expert_parallel=2"]
    for world, asked in (("1", 2), ("3", 2)):
        env = {**cli_env, "WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1 and f"WORLD_SIZE is {world}" in done.stderr, done.stderr
        assert f"torchrun --nproc-per-node {asked}" in done.stderr
    assert not (tmp_path / "runs").exists()
