"""The whole way: a checkpoint without MTP layers gets them in a stage of their own, and keeps every other byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import CheckpointError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tests.e2e.conftest import rows_of_sums, write_jsonl

SHORT = (
    "threads=1",
    "data.max_steps=2",
    "rlvr=",
    "eval=",
    "report=",
    "sft.steps=2",
    "sft.batch_problems=2",
    "sft.story_share=0",
)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    return f"data.sources=[{str(write_jsonl(tmp_path / 'sums.jsonl', rows_of_sums()))!r}]"


def run(folder: Path, *overrides: str) -> RunDir:
    loaded = resolve_recipe(load_recipe(["smoke"], [*SHORT, *overrides]))
    directory = RunDir(folder)
    run_recipe(loaded, directory, select_stages(loaded.recipe))
    return directory


def test_a_chat_checkpoint_without_mtp_gets_one_and_keeps_every_other_byte(tmp_path: Path, sums: str) -> None:
    first = run(tmp_path / "base", sums, "pretrain.steps=2", "pretrain.story_share=0", "sft=")
    base = first.stage("pretrain").checkpoint_dir
    from_base = (sums, f"base={json.dumps(str(base))}", "tokenizer=", "pretrain=")
    drafts = ("mtp.steps=2", "mtp.batch_problems=2", "mtp.story_share=0", "mtp.depth=2")
    second = run(tmp_path / "mtp", *from_base, "sft=", *drafts, "mtp.validate_every=2")
    stage = second.stage("mtp")
    result = stage.read_result()
    assert result is not None and 0 <= result["mtp"]["mtp_acceptance/1"] <= 1
    assert '"validation/mtp_acceptance/1"' in (stage.path / "metrics.jsonl").read_text()

    config = json.loads((stage.checkpoint_dir / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2
    loaded = load_checkpoint(stage.checkpoint_dir)
    assert loaded.decoder.mtp is not None
    with (
        safe_open(base / "model.safetensors", framework="np") as old,
        safe_open(stage.checkpoint_dir / "model.safetensors", framework="np") as new,
    ):
        for name in old.keys():  # noqa: SIM118  # not a mapping
            assert old.get_tensor(name).tobytes() == new.get_tensor(name).tobytes(), name
        added = set(new.keys()) - set(old.keys())
    layer = f"model.layers.{loaded.config.num_hidden_layers}."
    assert all(name.startswith((layer, layer.replace(".2.", ".3."))) for name in added)
    assert {f"{layer}{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")} <= added

    with pytest.raises(CheckpointError, match=r"mtp=None \(recipe: \{'depth': 1"):
        run(tmp_path / "rl", *from_base, "sft=", "rlvr.steps=1", "model.mtp.depth=1")
    with pytest.raises(CheckpointError, match=r"mtp=\{'depth': 2.*\(recipe: None\)"):
        run(tmp_path / "other", sums, f"base={json.dumps(str(stage.checkpoint_dir))}", "tokenizer=", "pretrain=")
