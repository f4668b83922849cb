"""Real runs of the smoke recipe through the command line: killed ones, repeated ones, and the chat afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.recipe.load import load_recipe
from tafkir.records import STAGES
from tests.conftest import ROOT, Cli

# The stages of the smoke recipe by the numbers of their folders.
NOT_THERE = ("reward", "dpo", "rlhf", "quantize", "lab", "trm")
NUMBERED = [(number, kind) for number, kind in enumerate(STAGES, start=1) if kind not in NOT_THERE]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    place = tmp_path_factory.mktemp("unbroken")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command("smoke", place), env=env, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Chat with it:" in done.stdout and "held-out accuracy" in done.stdout
    return place / "smoke"


def command(recipe: str, runs_dir: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "tafkir.cli.main", "run", recipe, "--runs-dir", str(runs_dir), *args]


def outcome(run: Path) -> dict[str, bytes]:
    """All that two runs of one recipe must share to the last bit: metrics, weights, answers."""
    stages = [run / "stages" / f"{number:02d}-{kind}" for number, kind in NUMBERED]
    files = [path for stage in stages for path in (stage / "metrics.jsonl", *stage.glob("checkpoint/*"))]
    files += run.glob("eval/*.jsonl")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(files) if path.exists()}


@pytest.mark.slow
def test_every_stage_leaves_what_the_next_one_and_the_reader_need(unbroken: Path) -> None:
    for number, kind in NUMBERED:
        result = json.loads((unbroken / "stages" / f"{number:02d}-{kind}" / "result.json").read_text())
        assert result["finished"] is True and result["stage"] == kind
    for name in ("recipe.resolved.toml", "env.json", "log.jsonl", "report.html", "report.md"):
        assert (unbroken / name).stat().st_size > 100
    resolved = load_recipe([unbroken / "recipe.resolved.toml"]).recipe
    assert resolved.kernels in ("native", "torch")
    assert resolved == load_recipe(["smoke"]).recipe.model_copy(update={"kernels": resolved.kernels})
    names = set(outcome(unbroken))
    assert {f"stages/{stage}/metrics.jsonl" for stage in ("02-pretrain", "03-sft", "06-rlvr")} <= names
    assert "stages/06-rlvr/checkpoint/model.safetensors" in names and len(list(unbroken.glob("eval/*.jsonl"))) == 2


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_like_an_unbroken_one(
    unbroken: Path, tmp_path: Path, cli_env: dict[str, str]
) -> None:
    """Kill -9 once in each stage, always going on with the same command: not one bit may differ."""
    run = tmp_path / "smoke"
    sign_of_life = {
        "01-tokenizer": "inputs.json",
        "02-pretrain": "metrics.jsonl",
        "03-sft": "metrics.jsonl",
        "06-rlvr": "metrics.jsonl",
        "09-eval": "inputs.json",
    }
    for stage, file in sign_of_life.items():
        with subprocess.Popen(command("smoke", tmp_path), env=cli_env, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (run / "stages" / stage / file).exists():
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert not (run / "stages" / stage / "result.json").exists(), "the kill came too late to mean anything"
    done = subprocess.run(command("smoke", tmp_path), env=cli_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert outcome(run) == outcome(unbroken)
    assert not list((run / "stages").glob("*.old-*"))


@pytest.mark.slow
def test_another_seed_gives_other_weights(unbroken: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "smoke", "--set", "seed=1", "--set", "rlvr=", "--set", "eval=", "--set", "report=")
    assert done.returncode == 0, done.stderr
    weights = "stages/03-sft/checkpoint/model.safetensors"
    assert (tmp_path / "runs" / "smoke" / weights).read_bytes() != (unbroken / weights).read_bytes()


@pytest.mark.slow
def test_a_finished_run_is_skipped_and_one_stage_can_be_redone(unbroken: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "smoke")
    args = ("run", "smoke", "--runs-dir", str(tmp_path))
    done = cli(*args)
    assert done.stderr.count("already finished") == len(NUMBERED) and "starts" not in done.stderr
    redone = cli(*args, "--only", "rlvr", "--json")
    assert list(json.loads(redone.stdout)["stages"]) == ["rlvr"]
    assert (tmp_path / "smoke" / "stages" / "06-rlvr.old-1").is_dir()
    assert outcome(tmp_path / "smoke") == outcome(unbroken)


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
def test_chat_takes_a_run_and_answers_each_line_of_a_pipe(unbroken: Path, cli_env: dict[str, str]) -> None:
    ask = [sys.executable, "-m", "tafkir.cli.main", "chat", str(unbroken), "--max-tokens", "8"]
    done = subprocess.run(ask, input="What is 3 + 4?\n\nTom has 2 pens.\n", env=cli_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    refused = subprocess.run(ask, input="pens " * 2000, env=cli_env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "the prompt has" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_eval_scores_one_checkpoint_and_compare_reads_the_runs(unbroken: Path, cli: Cli, tmp_path: Path) -> None:
    checkpoint = str(unbroken / "stages" / "03-sft" / "checkpoint")
    few = ("--set", 'data.sources=["svamp"]', "--set", "eval.max_problems=4", "--set", "eval.max_tokens=4")
    done = cli("eval", checkpoint, *few, "--set", "threads=1")
    assert done.returncode == 0, done.stderr
    assert "(4 problems)" in done.stdout and "baseline sum_of_numbers" in done.stdout
    assert (tmp_path / "runs" / "eval-smoke-sft" / "report.html").exists()
    compared = json.loads(cli("compare", str(unbroken), str(unbroken), "--json").stdout)
    assert {row["stage"] for row in compared["rows"]} == {"sft", "rlvr"}
    assert "pooled over 2 runs" in cli("compare", "--pool", str(unbroken), str(unbroken)).stdout
    refused = cli("compare", str(unbroken))
    assert refused.returncode == 2 and refused.stderr.startswith("error: compare: 1 runs given")


def test_chat_with_what_is_not_a_checkpoint_is_one_line(cli: Cli, tmp_path: Path) -> None:
    for name, message in (("absent", "no such checkpoint"), (str(tmp_path), "no tokenizer")):
        done = cli("chat", name)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own whose size can be chosen; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let the test mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_wherever_it_strikes_and_the_run_goes_on_with_more_space(
    small_disk: Path, cli: Cli
) -> None:
    command = ("run", "smoke", "--runs-dir", str(small_disk), "--set", "rlvr=", "--set", "eval=", "--set", "report=")
    for size in ("4k", "12k", "400k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        done = cli(*command)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "Logging error" not in done.stderr
        assert "the disk is full. Fix: free some space" in done.stderr.splitlines()[-1]
        assert not [path for path in small_disk.rglob("*") if path.name.endswith(".tmp")], "a half-written file is left"
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert not list(small_disk.glob("smoke/stages/*.old-*"))
