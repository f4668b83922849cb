"""Building the kernels, choosing them, and what is said where that cannot be done."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafkir.cli import doctor
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import BackendUnavailable, RecipeError
from tafkir.native import build as building
from tafkir.native import compiled
from tafkir.ops import native
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tests.conftest import ROOT


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.OVERRIDE, raising=False)
    compiled.kernels_path.cache_clear()
    yield tmp_path / "cache"
    compiled.kernels_path.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A compiler that is a shell script; `$OUT` is what it is to write."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nfor OUT; do :; done\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_name_changes_with_source_flags_and_processor(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_source = empty_cache.parent / "kernels.cpp"
    other_source.write_text("int x;")
    names = {compiled.kernels_path()}
    changes = {"SOURCES": (other_source,), "flags": lambda: ("-O1",), "_processor": lambda: "another"}
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, value)
            compiled.kernels_path.cache_clear()
            names.add(compiled.kernels_path())
    assert len(names) == 4 and all(path.parent == empty_cache / "tafkir" for path in names)


def test_a_build_is_whole_or_not_there(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(empty_cache.parent, 'echo half > "$OUT"; echo no such flag >&2; exit 1'))
    with pytest.raises(BackendUnavailable, match="no such flag"):
        building.build()
    assert list((empty_cache / "tafkir").iterdir()) == []
    monkeypatch.setenv("CXX", compiler(empty_cache.parent, 'echo whole > "$OUT"'))
    assert building.build().read_text() == "whole\n"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert building.build().read_text() == "whole\n"
    assert [path.name for path in (empty_cache / "tafkir").iterdir()] == [compiled.kernels_path().name]


def test_a_file_that_is_no_library_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.kernels_path().parent.mkdir(parents=True)
    compiled.kernels_path().write_text("nothing")
    monkeypatch.setattr(native._State, "library", None)
    with pytest.raises(BackendUnavailable, match=compiled.BUILD_COMMAND):
        native.select_kernels("native")


def test_a_library_without_a_kernel_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.kernels_path().parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, compiled.kernels_path())
    monkeypatch.setattr(native._State, "library", None)
    with pytest.raises(BackendUnavailable, match=f"undefined symbol: tafkir_.*{compiled.BUILD_COMMAND}"):
        native.select_kernels("native")


def test_without_a_compiler_one_line_says_what_to_do(empty_cache: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CXX": "/nowhere/c++"}
    command = [sys.executable, "-m", "tafkir.native.build"]
    for extra, code in (([], 1), (["--optional"], 0)):
        done = subprocess.run([*command, *extra], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert (
            len(done.stdout.splitlines()) == 1
            and "install g++" in done.stdout
            and compiled.BUILD_COMMAND in done.stdout
        )


def test_choices_and_the_override(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.resolve_kernels("auto") == "torch"
    with pytest.raises(BackendUnavailable, match=compiled.BUILD_COMMAND):
        compiled.resolve_kernels("native")
    compiled.kernels_path().parent.mkdir(parents=True)
    compiled.kernels_path().touch()
    assert compiled.resolve_kernels("auto") == "native"
    assert compiled.resolve_kernels("torch") == "torch"
    monkeypatch.setenv(compiled.OVERRIDE, "torch")
    assert (compiled.resolve_kernels("auto"), compiled.resolve_kernels("native")) == ("torch", "native")
    monkeypatch.setenv(compiled.OVERRIDE, "cuda")
    with pytest.raises(RecipeError, match="auto, native or torch"):
        compiled.resolve_kernels("auto")


def test_a_recipe_says_what_auto_became_and_a_run_keeps_it(empty_cache: Path) -> None:
    smoke = load_recipe(["smoke"])
    resolved = resolve_recipe(smoke)
    assert (resolved.recipe.kernels, resolved.origins["kernels"]) == ("torch", "auto")
    with pytest.raises(BackendUnavailable):
        resolve_recipe(smoke, kernels="native")
    compiled.kernels_path().parent.mkdir(parents=True)
    compiled.kernels_path().touch()
    assert resolve_recipe(smoke).recipe.kernels == "native"
    assert resolve_recipe(smoke, kernels="torch").recipe.kernels == "torch"
    asked = resolve_recipe(load_recipe(["smoke"], ['kernels="torch"']), kernels="native")
    assert (asked.recipe.kernels, asked.origins["kernels"]) == ("torch", "--set")


def test_the_shipped_base_keeps_its_arithmetic() -> None:
    assert load_recipe(["base-tiny"]).recipe.kernels == "torch"


def test_the_doctor_names_the_command(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = {"version": "0", "cuda": None, "hip": None, "threads": 1, "cpu_capability": "", "accelerators": []}
    monkeypatch.setattr(doctor, "_ask_torch", lambda: torch)
    found = doctor.examine(ROOT)
    assert found["kernels"] is False
    doctor.show(found)
    assert compiled.BUILD_COMMAND in capsys.readouterr().out
    compiled.kernels_path().parent.mkdir(parents=True)
    compiled.kernels_path().touch()
    doctor.show(doctor.examine(ROOT))
    said = capsys.readouterr().out
    assert "native" in said and compiled.BUILD_COMMAND not in said


def test_a_run_says_which_kernels_it_used(
    native_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    before, call = native.kernels_in_use(), native.call
    monkeypatch.setattr(native, "call", lambda name, *args, **more: names.add(name) or call(name, *args, **more))
    short = ["sft=", "rlvr=", "eval=", "report=", "pretrain.steps=2", "data.max_steps=2", "pretrain.story_share=0"]
    losses = []
    for kernels in ("native", "torch"):
        names.clear()
        loaded = resolve_recipe(load_recipe(["smoke"], [*short, "threads=1", f'kernels="{kernels}"']))
        run = RunDir(tmp_path / kernels)
        run_recipe(loaded, run, select_stages(loaded.recipe))
        env = json.loads(run.env_path.read_text())
        assert env["kernels"] == kernels
        assert env["library"] == (native_library.name if kernels == "native" else None)
        pretrain = run.stage("pretrain")
        assert (pretrain.read_result() or {})["kernels"] == kernels
        assert len(names) == (13 if kernels == "native" else 0)
        losses.append([json.loads(line)["train/loss"] for line in pretrain.metrics_path.read_text().splitlines()])
    native.select_kernels(before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
