"""A stage's fingerprint changes with what its result depends on, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.records import StageName

# The stages of the smoke recipe.
CHAIN: tuple[StageName, ...] = ("tokenizer", "pretrain", "sft", "rlvr", "eval", "report")


def changed(*overrides: str, base: Path | None = None, other: Path | None = None) -> list[str]:
    before = fingerprint_stages(load_recipe(["smoke"]).recipe, base)
    after = fingerprint_stages(load_recipe(["smoke"], overrides).recipe, other or base)
    return [kind for kind in CHAIN if before[kind] != after[kind]]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=1", "tokenizer"),
        ("threads=2", "tokenizer"),
        ("data.max_steps=3", "tokenizer"),
        ("model.hidden_size=64", "tokenizer"),
        ("sft.steps=7", "sft"),
        ("rlvr.acceptance.alpha=0.4", "rlvr"),
        ("eval.samples=3", "eval"),
        ("report.sample_chains=1", "report"),
    ],
)
def test_a_change_reaches_its_stage_and_all_later_ones(override: str, first: str) -> None:
    assert changed(override) == list(CHAIN[CHAIN.index(first) :])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override",
    ["description=other", "name=other", "sft.save_every=5", "rlvr.keep_rollouts=none", "track=['tensorboard']"],
)
def test_what_has_no_effect_on_results_changes_nothing(override: str) -> None:
    assert changed(override) == []


def test_the_base_and_ones_own_data_count_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, text in ((one, "{}"), (two, '{"a": 1}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    assert changed(base=one) == []
    assert changed(base=one, other=two) == list(CHAIN)
    rows = tmp_path / "mine.jsonl"
    recipe = load_recipe(["smoke"], [f'data.sources=["{rows}"]']).recipe
    rows.write_text("1\n")
    before = fingerprint_stages(recipe, None)
    rows.write_text("2\n")
    assert before["sft"] != fingerprint_stages(recipe, None)["sft"]


def test_the_lab_counts_its_own_table_and_the_bytes_of_its_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    prints = []
    for content, depths in (("1", "[2]"), ("2", "[2]"), ("2", "[3]"), ("2", "[3]")):
        text.write_text(content)
        recipe = load_recipe(["smoke"], [f"lab.text={str(text)!r}", f"lab.depths={depths}"]).recipe
        prints.append(fingerprint_stages(recipe, None))
    assert len({each["eval"] for each in prints}) == 1
    assert len({each["lab"] for each in prints}) == len({each["report"] for each in prints}) == 3
    assert prints[2] == prints[3]
