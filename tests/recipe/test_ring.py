"""The `ring` fragment: Ring-1T's published values (arXiv 2510.18855), laid under or over any recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import RecipeError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.rl import IcePop, NoAcceptance
from tafkir.runlog.rundir import RunDir


def test_the_values_are_the_papers() -> None:
    recipe = load_recipe(["wordmath-tiny", "ring"]).recipe
    sft, rlvr, rlhf = recipe.sft, recipe.rlvr, recipe.rlhf
    assert sft is not None and rlvr is not None and rlhf is not None
    assert (sft.learning_rate, sft.schedule, sft.warmup_steps, sft.weight_decay) == (2e-4, "cosine", 30, 0.1)
    assert (sft.epochs, sft.pack_tokens) == (3.0, 65536) and sft.select is not None
    assert (rlvr.learning_rate, rlvr.kl.coef, rlvr.temperature) == (2e-6, 0.0, 1.0)
    assert (rlvr.prompts_per_step, rlvr.group_size, rlvr.max_completion_tokens) == (480, 8, 65536)
    assert rlvr.acceptance == IcePop(alpha=0.5, beta=5.0) and rlvr.expert_bias_update_rate == 0.0
    assert (rlhf.learning_rate, rlhf.kl.coef, rlhf.temperature) == (3e-6, 0.0, 1.0)
    assert (rlhf.prompts_per_step, rlhf.group_size, rlhf.max_completion_tokens) == (80, 8, 32768)
    assert rlhf.acceptance == NoAcceptance() and rlhf.advantage == "grpo"
    for stage in (rlvr, rlhf):
        assert (stage.beta1, stage.beta2, stage.weight_decay) == (0.9, 0.999, 0.01)


def test_a_later_file_wins_and_the_model_stays_the_recipes() -> None:
    under, over = load_recipe(["ring", "wordmath-tiny"]), load_recipe(["wordmath-tiny", "ring"])
    assert under.recipe.model == over.recipe.model and under.recipe.name == over.recipe.name == "wordmath-tiny"
    assert under.recipe.rlvr is not None and under.recipe.rlvr.learning_rate == 3e-4
    assert "ring.toml" in over.origins["rlvr.learning_rate"]


def test_a_fragment_alone_is_no_recipe_and_is_listed_as_one_to_lay_over() -> None:
    with pytest.raises(RecipeError):
        load_recipe(["ring"])
    listed = CliRunner().invoke(app, ["recipe", "ls"])
    assert listed.exit_code == 0 and "fragment" in next(
        line for line in listed.stdout.splitlines() if line.startswith("ring ")
    )


@pytest.mark.slow
def test_the_chain_runs_on_a_tiny_model(tmp_path: Path) -> None:
    small = [
        "sft.epochs=0.02",
        "sft.checkpoint_every=1",
        "sft.select.problems=2",
        "sft.select.max_tokens=8",
        "rlvr.steps=1",
        "rlvr.prompts_per_step=2",
        "rlvr.group_size=2",
        "rlvr.max_completion_tokens=8",
        "rlhf.steps=1",
        "rlhf.prompts_per_step=2",
        "rlhf.group_size=2",
        "rlhf.max_completion_tokens=8",
        "reward.steps=1",
        "pretrain.steps=1",
        "preferences.made_up=20",
        "preferences.sources=[]",
        "preferences.max_length=300",
        "pretrain.story_share=0.0",
        "threads=1",
    ]
    loaded = resolve_recipe(load_recipe(["smoke", "ring"], small))
    run = RunDir(tmp_path / "ring")
    results = run_recipe(loaded, run, select_stages(loaded.recipe))
    assert list(results)[:6] == ["tokenizer", "pretrain", "sft", "reward", "rlvr", "rlhf"]
    # 600 problems of SVAMP, six visits each, in batches of four.
    assert results["sft"]["steps"] == 18
    assert [row["step"] for row in results["sft"]["select"]["candidates"]] == list(range(1, 19))
