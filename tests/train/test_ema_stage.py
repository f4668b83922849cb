"""A stage's checkpoints, from the recipe to the folder: those that stay, the average, and their merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.models.build import build_decoder
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.seeds import derive_seed
from tafkir.runlog.rundir import RunDir, StageDir
from tafkir.train.merge import merge_checkpoints
from tests.e2e.conftest import rows_of_sums, write_jsonl

OVERRIDES = (
    "threads=1",
    "data.max_steps=2",
    "sft=",
    "rlvr=",
    "eval=",
    "report=",
    "pretrain.steps=3",
    "pretrain.batch_problems=2",
    "pretrain.story_share=0",
    "pretrain.schedule=constant",
    "pretrain.validate_every=3",
    "pretrain.checkpoint_every=1",
    "pretrain.ema.decay=0.3",
)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    return f"data.sources=[{str(write_jsonl(tmp_path / 'sums.jsonl', rows_of_sums()))!r}]"


def run(folder: Path, *overrides: str) -> StageDir:
    loaded = resolve_recipe(load_recipe(["smoke"], [*OVERRIDES, *overrides]))
    directory = RunDir(folder)
    run_recipe(loaded, directory, select_stages(loaded.recipe))
    return directory.stage("pretrain")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).decoder.state_dict()


def test_a_stage_keeps_checkpoints_and_writes_its_average(tmp_path: Path, sums: str) -> None:
    stage = run(tmp_path / "average", sums)
    kept = sorted((stage.path / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-00000001", "step-00000002", "step-00000003"]
    recipe = load_recipe(["smoke"]).recipe
    states = [build_decoder(recipe.model, derive_seed(recipe.seed, "weights")).state_dict(), *map(weights, kept)]
    found = weights(stage.checkpoint_dir)
    for name, start in states[0].items():
        average = start.double()
        for t, state in enumerate(states[1:]):
            decay = min(0.3, (1 + t) / (10 + t))
            average = decay * average + (1 - decay) * state[name].double()
        torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-6)
    assert (found["norm.weight"] != states[-1]["norm.weight"]).any()
    manifest = load_checkpoint(stage.checkpoint_dir).manifest
    assert manifest is not None and manifest.lineage["ema_decay"] == 0.3
    assert '"validation/average_loss"' in stage.metrics_path.read_text()

    merge_checkpoints(kept, tmp_path / "merged")
    for name, value in weights(tmp_path / "merged").items():
        mean = sum(state[name].double() for state in states[1:]) / 3
        assert isinstance(mean, torch.Tensor)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_an_average_that_is_not_asked_for_leaves_the_checkpoint_alone(tmp_path: Path, sums: str) -> None:
    stage = run(tmp_path / "last", sums, "pretrain.ema.checkpoint=false")
    last = stage.path / "checkpoints" / "step-00000003"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tafkir.json"):
        assert (last / name).read_bytes() == (stage.checkpoint_dir / name).read_bytes()
