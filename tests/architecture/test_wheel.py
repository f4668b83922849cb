"""The wheel carries everything and works outside the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the unpacked wheel, built from the source tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "tests", "benchmarks", ".*", "runs", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("tafkir-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix() for path in paths}

    expected = files(ROOT / "src" / "tafkir") | {f"recipes/{name}" for name in files(ROOT / "recipes")}
    assert files(installed / "tafkir") == expected
    assert {"datasets/gsm8k/LICENSE", "datasets/svamp/LICENSE"} <= expected
    assert list(installed.glob("tafkir-*.dist-info/licenses/LICENSE"))


@pytest.mark.slow
def test_the_installed_package_lists_copies_and_plans_recipes(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import tafkir; print(tafkir.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    assert "wordmath-tiny" in run(installed, tmp_path, "-m", "tafkir.cli.main", "recipe", "ls")
    assert run(installed, tmp_path, "-m", "tafkir.cli.main", "recipe", "copy", "smoke").strip() == "smoke.toml"
    assert "# Parameters" in run(installed, tmp_path, "-m", "tafkir.cli.main", "run", "smoke.toml", "--dry-run")


@pytest.mark.slow
def test_the_installed_package_finds_its_data_and_checkpoints(installed: Path, tmp_path: Path) -> None:
    script = (
        "from tafkir.data.sources import BUNDLED_SETS, read_source\n"
        "from tafkir.recipe.bundled import bundled_checkpoints\n"
        "print(sum(len(read_source(name)[0]) for name in BUNDLED_SETS), sorted(bundled_checkpoints()))\n"
    )
    count, _, names = run(installed, tmp_path, "-c", script).partition(" ")
    assert int(count) > 7000
    shipped = sorted(path.parent.name for path in (ROOT / "src/tafkir/checkpoints").glob("*/config.json"))
    assert names.strip() == str(shipped)
