"""`tafkir quantize` at the command line: the table, the work, resuming after a real kill, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Cli


def test_the_table_then_the_work(cli: Cli, tmp_path: Path) -> None:
    done = cli("quantize", "base-tiny", "out", "--preset", "all-linear", "--scales", "mse", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "experts" in done.stdout and "times smaller, checked" in done.stdout.splitlines()[-1]
    shown = cli("model", "show", "out")
    assert shown.returncode == 0, shown.stderr


def test_choices_that_cannot_be(cli: Cli, tmp_path: Path) -> None:
    for options, message in (
        (("--rule", "*.nothing=keep"), "rule *.nothing=keep: the rule matches no tensor"),
        (("--scheme", "int4"), "has no place for int4; layout = 'compressed-tensors' does"),
    ):
        done = cli("quantize", "base-tiny", "out", "--dry-run", *options)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    (tmp_path / "mine.toml").write_text('preset = "all-linear"\nscheme = "fp8_block"\n')
    done = cli("quantize", "base-tiny", "out", "--dry-run", "--json", "--config", "mine.toml", "--scheme", "mxfp8")
    parts = {row["component"]: row for row in json.loads(done.stdout)["parts"]}
    assert parts["experts"]["format"] == "mxfp8" and parts["router"]["format"] == "keep"
    assert not (tmp_path / "out").exists()
