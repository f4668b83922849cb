"""The command line as people meet it: what it prints, how fast, and how errors end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tafkir.cli import doctor
from tafkir.recipe.bundled import bundled_fragments, bundled_recipes
from tafkir.recipe.load import load_recipe
from tests.conftest import ROOT, Cli


def only_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_help_costs_little_more_than_typer(cli_env: dict[str, str], tmp_path: Path) -> None:
    sides = {"help": ["-m", "tafkir.cli.main", "--help"], "typer": ["-c", "import typer"]}
    took: dict[str, list[float]] = {side: [] for side in sides}
    shown = ""
    for side, arguments in [*sides.items()] * 3:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took[side].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        shown += done.stdout
    assert all(f"\n  {name} " in shown for name in ("run", "recipe", "doctor", "report"))
    assert min(took["help"]) < 4 * min(took["typer"])


@pytest.mark.parametrize(
    "args",
    [["--help"], ["run", "--help"], ["recipe", "ls"], ["recipe", "show", "smoke"], ["run", "smoke", "--dry-run"]],
)
def test_no_torch_where_it_is_not_needed(args: list[str], cli_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tafkir.cli.main", *args]
    done = subprocess.run(command, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tafkir.cli.loading" in imported
    assert {"torch", "transformers", "numpy"} & imported == set()


def test_version(here: Cli) -> None:
    import tafkir

    assert here("--version").stdout == f"tafkir {tafkir.__version__}\n"


def test_recipe_commands(here: Cli, tmp_path: Path) -> None:
    names = [*bundled_recipes(), *bundled_fragments()]
    assert [line.split()[0] for line in here("recipe", "ls").stdout.splitlines()] == names
    assert set(json.loads(here("recipe", "ls", "--json").stdout)) == set(bundled_recipes())
    shown = here("recipe", "show", "smoke", "--set", "seed=4").stdout
    assert "seed = 4" in shown and "# --set" in shown and "# default" in shown
    assert "# Optimiser steps." in here("recipe", "show", "smoke", "--explain").stdout
    as_json = json.loads(here("recipe", "show", "smoke", "--json").stdout)
    assert as_json["recipe"]["sft"]["steps"] == 6 and as_json["origins"]["sft.beta1"] == "default"
    assert here("recipe", "check", "smoke").stdout.startswith("smoke: valid; tokenizer → pretrain → sft")
    assert "seed" not in here("recipe", "diff", "smoke", "base-tiny").stdout
    assert 'name: "smoke" → "base-tiny"' in here("recipe", "diff", "smoke", "base-tiny").stdout
    assert json.loads(here("recipe", "diff", "smoke", "smoke", "--json").stdout) == []


def test_recipe_copy(here: Cli, tmp_path: Path) -> None:
    assert here("recipe", "copy", "smoke").stdout == "smoke.toml\n"
    assert (tmp_path / "smoke.toml").read_bytes() == bundled_recipes()["smoke"].read_bytes()
    assert "there is a file already" in only_line(here("recipe", "copy", "smoke"), 2)
    assert here("recipe", "copy", "smoke", "mine.toml").returncode == 0
    assert load_recipe([tmp_path / "mine.toml"]).recipe.name == "smoke"
    assert here("recipe", "copy", "smoke", "--force").returncode == 0


def test_dry_run_shows_the_recipe_with_origins_and_an_estimate(here: Cli, tmp_path: Path) -> None:
    out = here("run", "smoke", "--dry-run", "--set", "sft.steps=50").stdout
    assert "steps = 50" in out and "# --set" in out
    assert "# Parameters: " in out and "# Assumed: " in out
    plan = json.loads(here("run", "smoke", "--dry-run", "--json").stdout)
    assert list(plan["stages"]) == ["tokenizer", "pretrain", "sft", "rlvr", "eval", "report"]
    assert plan["parameters"] == load_recipe(["smoke"]).recipe.model.num_parameters()
    assert plan["recipe"]["threads"] == 1 and plan["seconds"] > 0
    assert os.listdir(tmp_path) == []


def test_errors_of_a_recipe_are_one_line_with_exit_code_2(here: Cli, tmp_path: Path) -> None:
    assert "did you mean sft.learning_rate?" in only_line(here("run", "smoke", "--set", "sft.lerning_rate=1"), 2)
    assert 'got "x" (string); expected a valid integer' in only_line(here("run", "smoke", "--set", "seed=x"), 2)
    assert "did you mean the bundled 'smoke'?" in only_line(here("run", "smok"), 2)
    (tmp_path / "bad.toml").write_text('name = "x"\n[sft\n')
    assert "bad.toml:2: not valid TOML" in only_line(here("run", "bad.toml"), 2)
    assert "the recipe has no stage 'x'" in only_line(here("run", "smoke", "--only", "x"), 2)
    assert not (tmp_path / "runs").exists()


def test_errors_of_the_run_directory_are_one_line(here: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "a part of the path is a file" in only_line(here("run", "smoke", "--runs-dir", "file"), 1)
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    (tmp_path / "runs" / "smoke" / "mine.txt").write_text("")
    assert "holds files that are not a run's" in only_line(here("run", "smoke"), 1)
    assert "tokenizer is not finished" in only_line(here("run", "smoke", "--name", "other", "--only", "rlvr"), 1)
    assert "no such run directory" in only_line(here("report", "absent"), 1)


def test_a_base_that_is_not_there_is_one_line(here: Cli, tmp_path: Path) -> None:
    line = only_line(here("run", "smoke", "--set", "tokenizer=", "--set", "base=absent"), 1)
    assert "absent: no such checkpoint" in line
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_says_so(here: Cli) -> None:
    done = here("trian")
    assert done.returncode == 2 and "No such command 'trian'" in done.stderr and "Traceback" not in done.stderr


def test_doctor_says_what_the_machine_can_do(here: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    done = here("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    assert found["cores_physical"] >= 1 and found["memory_bytes"] > 0 and found["disk_free_bytes"] > 0
    assert found["torch"]["version"].startswith("2.")
    assert "dev" in found["missing"]
    doctor.show(found)
    shown = capsys.readouterr().out
    assert f"torch         {found['torch']['version']}" in shown and "\n+ dev" in shown


def test_doctor_prints_commands_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask_torch", lambda: {"cuda": None, "hip": None, "accelerators": []})
    found = doctor.examine(Path.cwd())
    monkeypatch.setattr("sys.executable", "/opt/my python")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    bare = found | {"compiler": None, "kernels": False, "browser": None, "problems": ["typer is not installed"]}
    bare |= {"missing": {"dev": ["pytest"], "trm-web": ["onnx"], "eval": [], "ray": ["ray"]}, "sandbox": None}
    lines = [line.partition("   #")[0].removeprefix("sudo ") for line in doctor.fixes(bare)]
    assert lines == [
        "'/opt/my python' -m pip install typer",
        "apt-get install -y g++",
        "'/opt/my python' -m tafkir.native.build",
        *(["apt-get install -y bubblewrap"] if sys.platform == "linux" else []),
        "'/opt/my python' -m pip install 'tafkir[trm-web,ray]'",
        "apt-get install -y chromium",
    ]
    there = dict.fromkeys(("compiler", "browser", "sandbox", "kernels"), "there")
    whole = found | there | {"missing": {}, "problems": []}
    assert doctor.fixes(whole) == ["# nothing is missing"]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert doctor.fixes(whole) == [f"make -C {ROOT} clean install TORCH=cu130"]


def test_the_package_is_a_command_and_completes(cli_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tafkir", "--version"]
    done = subprocess.run(command, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tafkir ")
    asked = {"_TAFKIR_COMPLETE": "complete_bash", "COMP_WORDS": "tafkir quan", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['tafkir']; from tafkir.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_env | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["quantize"]


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_every_shipped_recipe_can_be_planned(here: Cli, name: str) -> None:
    assert here("run", name, "--dry-run").returncode == 0
    assert bundled_recipes()[name].parent == ROOT / "recipes"


def test_an_error_ends_the_real_process_without_a_traceback(cli: Cli) -> None:
    assert "did you mean the bundled 'smoke'?" in only_line(cli("run", "smok"), 2)
