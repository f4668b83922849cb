"""The `quantize` stage of a run: a checkpoint that `eval` scores beside the one that it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafkir.checkpoint import load_checkpoint
from tafkir.cli.completer import checkpoint_of
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import RecipeError
from tafkir.eval import stage as eval_stage
from tafkir.quant.stage import run_quantize
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.load import load_recipe
from tafkir.recipe.stage import StageContext
from tafkir.runlog.rundir import RunDir

RECIPE = """
name = "shrink"
threads = 1
kernels = "torch"
base = "base-tiny"

[data]
sources = ["svamp"]

[quantize]
preset = "all-linear"
scheme = "nvfp4"
scales = "max"
layout = "modelopt"
input_scale = 1.0
kv_cache = "fp8"

[quantize.calibration]
text = "task"
tokens = 300
window = 128
ranges = "percentile"
percentile = 99.9
gptq = false
damping = 0.01
act_order = false
cold_experts = "force"
min_expert_tokens = 2

[[quantize.rules]]
tensors = "*.0.mlp.*_proj.weight"
format = "fp8_block"

[eval]
stages = ["quantize"]
samples = 1
max_tokens = 4
max_problems = 2
"""


def test_a_run_shrinks_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "shrink.toml").write_text(RECIPE)
    loaded = load_recipe([str(tmp_path / "shrink.toml")])
    run = RunDir(tmp_path / "run")
    found = run_recipe(loaded, run, select_stages(loaded.recipe, only="quantize"))["quantize"]
    assert found["ratio"] == pytest.approx(3.1, abs=0.1) and 0 < found["logits"]["kl_mean"] < 1
    assert {"nvfp4", "fp8_block", "BF16"} <= {row["format"] for row in found["parts"]}
    assert found["calibration"]["tokens"] == 300 and 0 < found["calibration"]["smallest_range"] < 20
    out = run.stage("quantize").checkpoint_dir
    context = StageContext(loaded.recipe, run, run.stage("eval"), find_checkpoint("base-tiny"), 0)
    assert loaded.recipe.eval and eval_stage._checkpoints(context, loaded.recipe.eval) == {"quantize": out}
    assert out.parent.name == "10-quantize" and load_checkpoint(out).manifest is not None
    nested = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert nested["kv_cache_quant_algo"] == "FP8" and nested["quant_algo"] == "MIXED_PRECISION"
    lineage = json.loads((out / "tafkir.json").read_text())["lineage"]
    assert lineage["quantized_from"] == "base-tiny" and lineage["quantize"]["preset"] == "all-linear"
    # What a run is served from is the model that it trained; the copy is asked for by its folder.
    assert checkpoint_of(str(out)) == out


def test_without_a_checkpoint_there_is_nothing_to_quantize(tmp_path: Path) -> None:
    (tmp_path / "shrink.toml").write_text(RECIPE)
    recipe = load_recipe([str(tmp_path / "shrink.toml")]).recipe
    run = RunDir(tmp_path / "run")
    with pytest.raises(RecipeError, match="nothing to quantize"):
        run_quantize(StageContext(recipe, run, run.stage("quantize"), None, 0))
