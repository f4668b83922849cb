"""Reinforcement learning over a Ray cluster: the run of one process bit for bit, also when its trainer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.build import build_decoder
from tafkir.recipe.load import load_recipe
from tafkir.runlog.rollouts import RolloutLog
from tafkir.runlog.rundir import RunDir
from tests.cluster.trainer import NUM_GROUP, NUM_PROMPTS, NUM_STEPS, train
from tests.conftest import ROOT
from tests.e2e.conftest import rows_of_sums, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ALONE = ["cluster.num_rollout_workers=0", "cluster.num_verifiers=0", "cluster.prompts_per_call=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    torch.set_num_threads(1)
    rows = rows_of_sums()
    write_jsonl(folder / "sums.jsonl", rows)
    tokenizer = Tokenizer.train([row["question"] for row in rows], 400)
    save_checkpoint(folder / "base", build_decoder(load_recipe(["smoke"]).recipe.model, 3), tokenizer=tokenizer)
    return folder


def outcome(run: RunDir) -> dict[str, bytes]:
    """What equal runs share: weights, metrics and every rollout."""
    stage = run.stage("rlvr").path
    paths = [*stage.glob("checkpoint/*"), stage / "metrics.jsonl", *stage.glob("rollouts/*")]
    return {path.relative_to(stage).as_posix(): path.read_bytes() for path in paths}


def test_a_killed_trainer_goes_on_and_ends_as_one_process_does(ray_address: str, folder: Path) -> None:
    alone = train(folder, "alone", ALONE)
    spread = [
        f'cluster.address="{ray_address}"',
        "cluster.num_rollout_workers=2",
        "cluster.num_verifiers=1",
        "cluster.prompts_per_call=2",
    ]
    command = [sys.executable, "-m", "tests.cluster.trainer", str(folder), "spread", *spread]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=500, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = folder / "spread"
    done = RolloutLog(RunDir(half).stage("rlvr").rollouts_dir)
    assert done.steps() == [1, 2]
    run = train(folder, "spread", spread)
    counted = Counter(
        (row["step"], row["group"], row["completion"]) for step in done.steps() for row in done.read(step)
    )
    assert len(counted) == NUM_STEPS * NUM_PROMPTS * NUM_GROUP and set(counted.values()) == {1}
    assert outcome(run) == outcome(alone)
