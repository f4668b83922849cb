"""What the planner recommends holds: its script runs, and its layouts shard into the bytes that it said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.plan.advise import advise
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout, weight_bytes_per_chip
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.serving import Deployment
from tafkir.plan.shapes import shape_of
from tafkir.plan.training import TrainJob, search_training, train_memory
from tafkir.plan.workload import WORKLOADS
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.parallel import ParallelSizes
from tafkir.recipe.presets import load_preset
from tafkir.runlog.rundir import RunDir
from tafkir.train.parallel.experts import place_experts
from tafkir.train.parallel.footprint import measure_rank
from tafkir.train.parallel.tensor import order_fused, place_parameter, split_heads_and_widths
from tests.conftest import Cli
from tests.e2e.conftest import rows_of_sums, write_jsonl
from tests.parallel.test_torchrun import RECIPE


@pytest.mark.slow
def test_a_planned_script_trains_on_two_processes(tmp_path: Path, here: Cli, cli_env: dict[str, str]) -> None:
    recipe = tmp_path / "many.toml"
    sums = write_jsonl(tmp_path / "sums.jsonl", rows_of_sums())
    recipe.write_text(RECIPE.partition("[trm]")[0].format(sums=str(sums)), encoding="utf-8")
    sizes = ("--tokens", "1e6", "--sequence", "128", "--batch-tokens", "4096")
    planned = here("plan", str(recipe), "--hardware", "cpu:2", "--train", *sizes, "--emit", "torchrun")
    assert planned.returncode == 0, planned.stderr
    assert "--nproc-per-node=2" in planned.stdout and "parallel.device=cpu" in planned.stdout
    env = {**cli_env, "PATH": f"{Path(sys.executable).parent}:{cli_env['PATH']}"}
    command = ["bash", "-c", planned.stdout, "train", "--set", "pretrain.steps=3", "--name", "planned"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = RunDir(tmp_path / "runs" / "planned").stage("pretrain")
    assert (stage.read_result() or {})["steps"] == 3


def _shard(model: ModelConfig, layout: Layout) -> Decoder:
    """Rank 0's part of a decoder on the meta device, by training's sharding code; tables split over tensor ranks."""
    with torch.device("meta"):
        decoder = Decoder(model)
    wide = layout.tp * layout.cp
    dense = init_device_mesh("cpu", (layout.pp, layout.dp, wide), mesh_dim_names=("stage", "copy", "tensor"))
    experts = init_device_mesh(
        "cpu", (layout.pp, layout.ep, layout.moe_tp), mesh_dim_names=("stage", "expert", "tensor")
    )
    if wide > 1:
        order_fused(decoder, wide)
        split_heads_and_widths(decoder, dense["tensor"])
    sizes = SimpleNamespace(expert=layout.ep, tensor=layout.moe_tp)
    meshes: Any = SimpleNamespace(sizes=sizes, expert=experts, dense={"tensor": experts["tensor"]})
    for module in list(decoder.modules()):
        if isinstance(module, Experts) and layout.ep * layout.moe_tp > 1:
            place_experts(module, meshes)
        for name, param in list(module.named_parameters(recurse=False)):
            if param.shape[0] == model.vocab_size and wide > 1:
                place_parameter(module, name, dense["tensor"], [Shard(0)])
    return decoder


def fullest_stage(model: ModelConfig, layout: Layout) -> int:
    """Parameters of the fullest pipeline stage on rank 0, under a fake process group of the layout's full size.

    Where there are fewer key-value heads than tensor ranks, each rank holds a copy of one, as engines do.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if model.attention_type == "gqa":
        model = model.model_copy(update={"num_key_value_heads": max(model.num_key_value_heads, layout.tp * layout.cp)})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.chips)
    try:
        stages = [0] * layout.pp
        size, longer = divmod(model.num_hidden_layers, layout.pp)
        first = [stage for stage in range(layout.pp) for _ in range(size + (stage < longer))]
        for name, param in _shard(model, layout).named_parameters():
            held = cast(DTensor, param).to_local() if isinstance(param, DTensor) else param
            words = name.split(".")
            if "layers" in words:
                stages[first[int(words[words.index("layers") + 1])]] += held.numel()
            elif "mtp" not in words[0]:
                stages[0 if "embed" in name else -1] += held.numel()
    finally:
        dist.destroy_process_group()
    return max(stages)


def recommended(preset: str, chip: str, chips: int, precision: str) -> list[Layout]:
    known = load_chips(own_only=True)[chip]
    shape = shape_of(load_preset(preset), preset)
    d = Deployment(shape, known, PRECISIONS[precision], Layout(), fitted_coefficients())
    options, _ = advise(d, WORKLOADS["chat"], chips)
    fleets = [option.fleet for option in options]
    layouts = {fleet.decode.layout for fleet in fleets} | {fleet.prompts.layout for fleet in fleets if fleet.prompts}
    return sorted(layouts, key=str)


@pytest.mark.parametrize(
    ("preset", "chip", "chips", "precision"),
    [
        ("ring-flash-2.0", "h20", 8, "fp8"),
        ("qwen3-30b-a3b", "h100", 4, "bf16"),
        ("deepseek-r1", "b200", 8, "nvfp4"),
        pytest.param("deepseek-r1", "h200", 16, "fp8", marks=pytest.mark.slow),
        pytest.param("ring-1t", "h200", 32, "fp8", marks=pytest.mark.slow),
    ],
)
def test_every_recommended_layout_shards_into_the_predicted_bytes(
    preset: str, chip: str, chips: int, precision: str
) -> None:
    model = load_preset(preset)
    layouts = recommended(preset, chip, chips, precision)
    assert len(layouts) >= 4
    for layout in layouts:
        said = sum(weight_bytes_per_chip(shape_of(model), PRECISIONS["bf16"], layout).values())
        assert said == pytest.approx(2 * fullest_stage(model, layout), rel=0.05), layout


def test_experts_on_144_chips_shard_into_the_predicted_bytes() -> None:
    """As DeepSeek serves V3: 256 experts do not divide, and the fullest chip holds two of them."""
    model, layout = load_preset("deepseek-v3"), Layout(dp=144, ep=144)
    said = sum(weight_bytes_per_chip(shape_of(model), PRECISIONS["bf16"], layout).values())
    assert said == pytest.approx(2 * fullest_stage(model, layout), rel=0.05)


def test_a_planned_training_layout_shards_into_the_predicted_bytes() -> None:
    model = load_preset("ring-flash-2.0")
    job = TrainJob(shape_of(model), load_chips(own_only=True)["h100"], 256, 1e12)
    able = [option.layout for option in search_training(job) if option.layout.pp == 1 and option.layout.shard == "fsdp"]
    layout = able[0]
    sizes = ParallelSizes(job.chips // (layout.ep * layout.tp), layout.ep, layout.tp)
    # Weights are bfloat16 in the plan, float32 where they are measured; tables are not split over tensor ranks.
    assert train_memory(job, layout)["weights"] / 2 == pytest.approx(measure_rank(model, sizes).weights / 4, rel=0.05)
