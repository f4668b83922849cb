"""`trm.precision = "auto"`: what it means here, and that a run keeps what it began with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tafkir.recipe import resolve
from tafkir.recipe.load import LoadedRecipe, load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog import rundir


def asked(*overrides: str) -> LoadedRecipe:
    return load_recipe(["trm-sudoku4"], ["threads=1", 'kernels="torch"', *overrides])


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_what_auto_means(monkeypatch: pytest.MonkeyPatch, units: bool, expected: str) -> None:
    monkeypatch.setattr(resolve, "has_bfloat16_units", lambda: units)
    loaded = resolve_recipe(asked('trm.precision="auto"'))
    assert loaded.recipe.trm is not None and loaded.recipe.trm.precision == expected
    assert loaded.origins["trm.precision"] == "auto"
    kept = resolve_recipe(asked('trm.precision="auto"'), precision="float32").recipe.trm
    assert kept is not None and kept.precision == "float32"
    said = resolve_recipe(asked('trm.precision="float32"'), precision="bfloat16").recipe.trm
    assert said is not None and said.precision == "float32"


@pytest.mark.parametrize(("flags", "expected"), [("fpu amx_bf16", True), ("avx512_bf16 avx2", True), ("avx2", False)])
def test_units_are_read_from_the_processors_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    monkeypatch.setattr(rundir, "Path", lambda _: tmp_path / "cpuinfo")
    assert rundir.has_bfloat16_units() is expected


def test_a_gpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "has_bfloat16_units", lambda: False)
    resolved = resolve_recipe(asked('trm.precision="auto"', 'parallel.device="cuda"')).recipe.trm
    assert resolved is not None and resolved.precision == "bfloat16"
