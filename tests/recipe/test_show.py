"""A recipe that is written and read again is the same recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.recipe.bundled import bundled_recipes
from tafkir.recipe.load import describe_keys, load_recipe
from tafkir.recipe.schema import Recipe
from tafkir.recipe.show import diff_recipes, dump_toml


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_written_recipes_read_back_equal(tmp_path: Path, name: str) -> None:
    loaded = load_recipe([name])
    path = tmp_path / "again.toml"
    path.write_text(dump_toml(loaded.recipe, loaded.origins), encoding="utf-8")
    assert load_recipe([path]).recipe == loaded.recipe


@given(st.text())
def test_any_string_survives(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return
    written = dump_toml(Recipe(name="x", description=text))
    assert tomllib.loads(written)["description"] == text


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_float_survives(value: float) -> None:
    recipe = load_recipe(["smoke"], [f"sft.learning_rate={value!r}"]).recipe
    assert tomllib.loads(dump_toml(recipe))["sft"]["learning_rate"] == value


def test_origins_stand_beside_the_values() -> None:
    loaded = load_recipe(["smoke"], ["seed=7"])
    lines = dump_toml(loaded.recipe, loaded.origins).splitlines()
    assert next(line for line in lines if line.startswith("seed = 7")).endswith("# --set")
    assert next(line for line in lines if line.startswith("beta1")).endswith("# default")
    assert next(line for line in lines if line.startswith("threads = 1")).rpartition(":")[0].endswith("smoke.toml")


def test_every_key_is_documented() -> None:
    fixed_by_type = {"model.model_type", "model.score_function"}
    assert [path for path, text in describe_keys().items() if not text and path not in fixed_by_type] == []


def test_diff_names_what_differs_and_nothing_else() -> None:
    left, right = load_recipe(["smoke"]).recipe, load_recipe(["smoke"], ["seed=3", "report=", "sft.beta1=0.8"]).recipe
    differences = [(d.path, d.left, d.right) for d in diff_recipes(left, right)]
    assert differences == [("seed", "0", "3"), ("sft.beta1", "0.9", "0.8"), ("report.sample_chains", "2", None)]
    assert diff_recipes(left, left) == []
