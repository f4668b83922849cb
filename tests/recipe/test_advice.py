"""Warnings about recipes that are valid and known to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tafkir.recipe.advice import advise
from tafkir.recipe.bundled import bundled_recipes
from tafkir.recipe.load import load_recipe


def advice(*overrides: str) -> list[str]:
    return advise(load_recipe(["smoke"], overrides).recipe)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("rlvr.acceptance.beta=2.0",), "rlvr.acceptance.beta = 2: Ring's authors saw"),
        (("rlvr.surrogate=gspo",), "rlvr.clip_eps_high = 0.2 hardly clips GSPO"),
        (("rlvr.surrogate=cispo",), "caps CISPO's weights at 1.2"),
        (("rlvr.surrogate=reinforce", "rlvr.updates_per_rollout=2"), "REINFORCE takes every update"),
        (("rlvr.max_resamples=1", "rlvr.drop_zero_variance=false"), "keeps those without a signal"),
    ],
)
def test_each_warning(overrides: tuple[str, ...], words: str) -> None:
    found = advice(*overrides)
    assert len(found) == 1 and words in found[0]


def test_the_defaults_and_the_papers_values_are_quiet() -> None:
    assert advice() == []
    assert advice("rlvr.acceptance.beta=4.0") == []
    assert advice("rlvr.surrogate=gspo", "rlvr.clip_eps_low=3e-4", "rlvr.clip_eps_high=4e-4") == []
    assert advice("rlvr.surrogate=cispo", "rlvr.clip_eps_low=1.0", "rlvr.clip_eps_high=4.0") == []
    assert advice("rlvr=") == []


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_no_shipped_recipe_is_warned_about(name: str) -> None:
    assert advise(load_recipe([name]).recipe) == []


def test_the_command_line_says_it(cli_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tafkir.cli.main", "recipe", "check", "smoke", "--set", "rlvr.acceptance.beta=2.0"]
    done = subprocess.run(command, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("smoke: valid") and len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith("warning: rlvr.acceptance.beta = 2: ")
