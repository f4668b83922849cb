"""Real runs of the smoke recipe through the command line: killed ones, repeated ones, and the chat afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

TRAINING = ("--set", "eval=", "--set", "report=")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    place = tmp_path_factory.mktemp("unbroken")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command("smoke", place), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Chat with it:" in done.stdout
    return place / "smoke"


def command(recipe: str, runs_dir: Path) -> list[str]:
    return [sys.executable, "-m", "tafkir.cli.main", "run", recipe, "--runs-dir", str(runs_dir), *TRAINING]


def outcome(run: Path) -> dict[str, bytes]:
    """All that two runs of one recipe must share to the last bit."""
    files = [*run.glob("stages/*/metrics.jsonl"), *run.glob("stages/*/checkpoint/*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(files)}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(unbroken: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "smoke", *TRAINING).returncode == 0
    again = outcome(tmp_path / "runs" / "smoke")
    assert len(again) > 10 and again == outcome(unbroken)
    assert cli("run", "smoke", *TRAINING, "--set", "seed=1", "--name", "other").returncode == 0
    assert outcome(tmp_path / "runs" / "other") != again


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["01-tokenizer", "02-pretrain", "03-sft", "04-rlvr"])
def test_a_killed_run_ends_like_an_unbroken_one(
    unbroken: Path, tmp_path: Path, cli_env: dict[str, str], stage: str
) -> None:
    process = subprocess.Popen(command("smoke", tmp_path), env=cli_env, cwd=tmp_path, stderr=subprocess.DEVNULL)
    folder = tmp_path / "smoke" / "stages" / stage
    rows = folder / "metrics.jsonl"
    started = folder if stage == "01-tokenizer" else rows
    while process.poll() is None and not started.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists(), "the kill came too late to mean anything"
    done = subprocess.run(command("smoke", tmp_path), env=cli_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "smoke") == outcome(unbroken)
    assert not list((tmp_path / "smoke" / "stages").glob("*.old-*"))


@pytest.mark.slow
def test_a_finished_run_is_skipped_and_only_one_stage_can_be_redone(unbroken: Path, cli: Cli, tmp_path: Path) -> None:
    args = ("run", "smoke", "--runs-dir", str(unbroken.parent), *TRAINING)
    before = outcome(unbroken)
    done = cli(*args)
    assert done.stderr.count("already finished") == 4 and "starts" not in done.stderr
    redone = cli(*args, "--only", "rlvr", "--json")
    assert list(json.loads(redone.stdout)["stages"]) == ["rlvr"]
    assert (unbroken / "stages" / "04-rlvr.old-1").is_dir()
    assert {name: data for name, data in outcome(unbroken).items() if ".old-" not in name} == before


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, cli_env: dict[str, str]) -> None:
    process = subprocess.Popen(command("smoke", tmp_path), env=cli_env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "smoke" / "stages" / "02-pretrain").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted. Fix: the same command goes on where it stopped"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_chat_answers_each_question_of_a_pipe(unbroken: Path, cli_env: dict[str, str], tmp_path: Path) -> None:
    ask = [sys.executable, "-m", "tafkir.cli.main", "chat", str(unbroken), "--max-tokens", "8"]
    done = subprocess.run(
        ask, input="What is 3 + 4?\n\nTom has 2 pens.\n", env=cli_env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = subprocess.run(ask, input="What is 3 + 4?\n", env=cli_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(again.stdout) and len(done.stdout) > len(again.stdout)
    refused = subprocess.run(
        ask, input="pens " * 2000, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1 and "the prompt has" in refused.stderr and "Traceback" not in refused.stderr


def test_chat_with_what_is_not_a_checkpoint_is_one_line(cli: Cli, tmp_path: Path) -> None:
    for name, message in (("absent", "no such checkpoint"), (str(tmp_path), "config.json")):
        done = cli("chat", name)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
