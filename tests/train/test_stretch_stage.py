"""A recipe stretches the context of the checkpoint that it starts from, and says so in what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafkir.checkpoint.load import load_config
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import CheckpointError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tests.e2e.conftest import rows_of_sums, write_jsonl

SHORT = ("threads=1", "data.max_steps=2", "rlvr=", "eval=", "report=", "pretrain.steps=2", "pretrain.story_share=0")
SHORT_SFT = ("sft.steps=2", "sft.batch_problems=2", "sft.story_share=0", "tokenizer=", "pretrain=")
YARN = ("model.rope_scaling.factor=4", "model.rope_scaling.original_max_position_embeddings=512")


def run(folder: Path, *overrides: str) -> RunDir:
    loaded = resolve_recipe(load_recipe(["smoke"], [*SHORT, *overrides]))
    directory = RunDir(folder)
    run_recipe(loaded, directory, select_stages(loaded.recipe))
    return directory


def test_a_recipe_stretches_its_base_once(tmp_path: Path) -> None:
    sums = f"data.sources=[{str(write_jsonl(tmp_path / 'sums.jsonl', rows_of_sums()))!r}]"
    base = run(tmp_path / "base", sums, "sft=").stage("pretrain").checkpoint_dir
    assert load_config(base).rope_scaling is None
    from_base = (sums, *SHORT_SFT, f"base={json.dumps(str(base))}")
    stretched = run(tmp_path / "long", *from_base, *YARN, "model.max_position_embeddings=2048").stage("sft")
    config = load_config(stretched.checkpoint_dir)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.max_position_embeddings) == (4.0, 2048)
    with pytest.raises(CheckpointError, match="rope_scaling="):
        run(tmp_path / "back", sums, *SHORT_SFT, f"base={json.dumps(str(stretched.checkpoint_dir))}")
