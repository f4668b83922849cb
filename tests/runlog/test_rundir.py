"""The run directory: where things lie, who may write, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tafkir.errors import RunDirError
from tafkir.records import STAGES
from tafkir.runlog.rundir import RunDir, available_cores, memory_bytes, physical_cores


def test_stages_are_numbered_by_their_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    assert [run.stage(kind).path.name for kind in STAGES] == [
        "01-tokenizer",
        "02-pretrain",
        "03-sft",
        "04-reward",
        "05-dpo",
        "06-rlvr",
        "07-rlhf",
        "08-qat",
        "09-mtp",
        "10-quantize",
        "11-eval",
        "12-lab",
        "13-trm",
        "14-report",
    ]
    assert not run.path.exists()


def test_a_stage_keeps_the_number_that_an_older_run_gave_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    (run.stages_dir / "04-rlvr").mkdir(parents=True)
    (run.stages_dir / "03-rlvr.old-1").mkdir()
    assert run.stage("rlvr").path.name == "04-rlvr"


def test_create_makes_a_run_and_takes_it_again(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "deep" / "r")
    run.stage("sft").make()
    assert RunDir.create(run.path).stage("sft").path.is_dir()
    assert RunDir.open(run.path).path == run.path


def test_results_and_files_of_a_stage(tmp_path: Path) -> None:
    stage = RunDir.create(tmp_path / "r").stage("sft")
    stage.make()
    assert stage.read_result() is None
    stage.write_result({"finished": True})
    assert stage.read_result() == {"finished": True}
    stage.write_json("x.json", [1])
    assert stage.read_json("x.json") == [1]


def test_what_is_set_aside_is_kept(tmp_path: Path) -> None:
    stage = RunDir.create(tmp_path / "r").stage("sft")
    for number in (1, 2):
        stage.make()
        stage.write_result({"number": number})
        aside = stage.set_aside()
        assert aside.name == f"03-sft.old-{number}"
        assert json.loads((aside / "result.json").read_text()) == {"number": number}
        assert not stage.path.exists()


def test_a_place_that_cannot_be_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for path, message in (
        (tmp_path / "file", "is a file, not a run directory"),
        (tmp_path / "file" / "r", "a part of the path is a file"),
        (tmp_path / "mine", "holds files that are not a run's"),
    ):
        with pytest.raises(RunDirError, match=message):
            RunDir.create(path)
    with pytest.raises(RunDirError, match="no such run directory"):
        RunDir.open(tmp_path / "absent")
    with pytest.raises(RunDirError, match="not a run directory"):
        RunDir.open(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that nobody may write to")
def test_an_unwritable_place_is_one_line() -> None:
    with pytest.raises(RunDirError, match=r"/proc/nobody/r: .*Fix: .*--runs-dir"):
        RunDir.create(Path("/proc/nobody/r"))


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "r")
    with run.lock(), pytest.raises(RunDirError, match=f"process {os.getpid()} is writing this run"), run.lock():
        pass
    with run.lock():
        pass


_HOLDER = """
import os, sys, time
from pathlib import Path
from tafkir.runlog.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    if os.fork() == 0:
        os.setsid()
        time.sleep(20)  # a worker that outlives its parent
        os._exit(0)
    print("locked", flush=True)
    time.sleep(20)
"""


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path, cli_env: dict[str, str]) -> None:
    run = RunDir.create(tmp_path / "r")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(run.path)], env=cli_env, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(RunDirError, match=f"process {holder.pid} is writing this run"), run.lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.lock():
        pass


def test_the_environment_is_described(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "r")
    run.write_env()
    env = json.loads(run.env_path.read_text())
    assert env["python"] == sys.version.split()[0]
    assert env["torch"].startswith("2.")
    assert env["cpu"] and env["memory_bytes"] > 1 << 28
    assert 1 <= physical_cores() <= available_cores()
    assert memory_bytes() == env["memory_bytes"]
