"""Every recipe that ships loads, fits the base it starts from, and runs every one of its stages for two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.recipe.bundled import bundled_recipes
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.schema import Recipe
from tafkir.runlog.rundir import RunDir

NAMES = sorted(bundled_recipes())

TWO_STEPS = {
    "pretrain": ("pretrain.steps=2", "pretrain.batch_problems=2", "pretrain.micro_batches=1"),
    "sft": ("sft.steps=2", "sft.batch_problems=2", "sft.micro_batches=1"),
    "rlvr": (
        "rlvr.steps=2",
        "rlvr.prompts_per_step=2",
        "rlvr.group_size=2",
        "rlvr.micro_batches=1",
        "rlvr.max_completion_tokens=8",
    ),
    "reward": ("reward.steps=2", "reward.batch_pairs=2", "preferences.made_up=40", "preferences.max_length=160"),
    "dpo": ("dpo.steps=2", "dpo.batch_pairs=2", "preferences.made_up=40", "preferences.max_length=160"),
    "rlhf": (
        "rlhf.steps=2",
        "rlhf.prompts_per_step=2",
        "rlhf.group_size=2",
        "rlhf.micro_batches=1",
        "rlhf.max_completion_tokens=8",
        "rlhf.guard.tolerance=100",
        "rlhf.guard.kl_budget=0",
    ),
    "mtp": ("mtp.steps=2", "mtp.batch_problems=2", "mtp.micro_batches=1", "mtp.validate_every=0"),
    "residual": ("lab.steps=2", "lab.depths=[1,2]", "lab.batch_sequences=2", "lab.validation_sequences=4"),
    "mismatch": (
        "lab.steps=2",
        "lab.rollouts=['nvfp4']",
        "lab.losses=['grpo','icepop','tis']",
        "lab.skip=[]",
        "lab.seeds=1",
        "lab.warm_start_steps=2",
        "lab.prompts_per_step=2",
        "lab.group_size=2",
    ),
    "trm": (
        "trm.steps=2",
        "trm.batch_size=4",
        "trm.warmup_steps=0",
        "trm.model.max_supervision_steps=2",
        "trm.model.num_latent_steps=2",
        "trm.model.hidden_size=64",
        "trm.puzzles.num_train=8",
        "trm.puzzles.num_validation=2",
        "trm.puzzles.num_test=2",
    ),
    "eval": ("eval.max_problems=2", "eval.samples=1", "eval.max_tokens=8"),
}
SMALL_ARC = (
    'trm.puzzles.path="mini-arc"',
    "trm.puzzles.train_paths=[]",
    "trm.puzzles.canvas=[5,5]",
    "trm.puzzles.num_copies=1",
    "trm.puzzles.num_validation=2",
    "trm.puzzles.num_test=2",
    "trm.model.hidden_size=64",
    "trm.model.puzzle_embedding_size=64",
    "trm.eval_batch_size=8",
)


def run_two_steps(name: str, runs_dir: Path, *overrides: str) -> tuple[Recipe, RunDir]:
    loaded = load_recipe([name])
    method = loaded.recipe.lab.method if loaded.recipe.lab else None
    short = [
        text
        for kind, texts in TWO_STEPS.items()
        if kind == method or getattr(loaded.recipe, kind, None)
        for text in texts
    ]
    if loaded.recipe.trm is not None and loaded.recipe.trm.puzzles.kind == "arc":
        short = [*(text for text in short if "puzzles.num" not in text), *SMALL_ARC]
    loaded = resolve_recipe(load_recipe([name], [*short, "threads=1", *overrides]))
    run = RunDir(runs_dir / name)
    run_recipe(loaded, run, select_stages(loaded.recipe))
    return loaded.recipe, run


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    recipe = load_recipe([name]).recipe
    assert recipe.name == name
    assert recipe.description, "`tafkir recipe ls` has nothing to say about it"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_describes_the_model_of_its_base(name: str) -> None:
    recipe = load_recipe([name]).recipe
    trains = recipe.pretrain or recipe.sft or recipe.rlvr
    if recipe.base is None or not trains:
        return
    # Multi-token-prediction layers may come on top of it.
    model = recipe.model.model_copy(update={"mtp": None})
    assert model == load_recipe([recipe.base]).recipe.model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    """A stand-in for the bundled base: same recipe, two steps."""
    return run_two_steps("base-tiny", tmp_path_factory.mktemp("base"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "smoke"])
def test_a_shipped_recipe_runs_for_two_steps(name: str, base: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = base
    if name != "base-tiny":
        stand_in = json.dumps(str(run.stage("pretrain").checkpoint_dir))
        own_base = load_recipe([name]).recipe.base
        recipe, run = run_two_steps(name, tmp_path, *([f"base={stand_in}"] if own_base else []))
    for kind in ("pretrain", "sft", "reward", "dpo", "rlvr", "rlhf", "mtp", "trm"):
        if getattr(recipe, kind):
            result = run.stage(kind).read_result()
            assert result is not None and result["steps"] == 2
            assert (run.stage(kind).checkpoint_dir / "model.safetensors").exists()
    if recipe.lab:
        result = run.stage("lab").read_result()
        assert result is not None and [variant["steps"] for variant in result["variants"]] == [2] * 6
    if recipe.report:
        assert run.report_html.stat().st_size > 1000
