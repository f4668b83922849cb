"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tafkir.errors import RunDirError
from tafkir.runlog.atomic import read_json, write_bytes, write_json, write_text


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": [1, "٣"]})
    write_json(path, {"a": [2]})
    assert read_json(path) == {"a": [2]}
    assert os.listdir(path.parent) == ["x.json"]


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == 1


def test_errors_of_reading_say_where(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"absent\.json: no such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(RunDirError, match=r"x\.json:2: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_place_that_is_not_a_directory_is_a_run_dir_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="a part of the path is a file"):
        write_bytes(tmp_path / "file" / "x", b"")


_WRITER = """
import sys
from pathlib import Path
from tafkir.runlog.atomic import write_bytes
number = 0
while True:
    number += 1
    write_bytes(Path(sys.argv[1]), bytes([65 + number % 26]) * 300_000)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, cli_env: dict[str, str]) -> None:
    path = tmp_path / "x"
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], env=cli_env)
        while not path.exists():
            time.sleep(0.002)
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1
        path.unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    from tafkir.runlog.metrics import JsonlWriter

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(RunDirError, match=r"metrics\.jsonl: the disk is full\. Fix: free some space"):
        writer.write(1, {"a": 1.0})
