"""The `[parallel]` table: sizes that fit are resolved, others are refused with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tafkir.errors import BackendUnavailable, RecipeError
from tafkir.ops.device import choose_device, collective_backend, find_devices
from tafkir.recipe.parallel import ParallelSizes, check_parallel, check_shapes, resolve_sizes
from tafkir.recipe.schema import ParallelConfig, Recipe
from tests.conftest import ROOT
from tests.parallel.jobs import MODEL


@pytest.mark.parametrize(
    ("table", "world", "sizes"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (4, 1, 1)),
        ({"expert_parallel": 2}, 8, (4, 2, 1)),
        ({"data_parallel": 2, "expert_parallel": 2, "tensor_parallel": 2}, 8, (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_rest(table: dict[str, int], world: int, sizes: tuple[int, int, int]) -> None:
    found = resolve_sizes(ParallelConfig.model_validate(table), world)
    assert (found.data, found.expert, found.tensor) == sizes
    assert found.world == world and found.data_shards == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("table", "world", "processes"),
    [({"expert_parallel": 2}, 1, 2), ({"expert_parallel": 2}, 5, 4), ({"data_parallel": 2}, 1, 2)],
)
def test_another_number_of_processes_says_how_to_launch(table: dict[str, int], world: int, processes: int) -> None:
    with pytest.raises(RecipeError, match=f"WORLD_SIZE is {world}.*torchrun --nproc-per-node {processes} ") as caught:
        resolve_sizes(ParallelConfig.model_validate(table), world)
    assert caught.value.where == "parallel" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "change", "named"),
    [
        (ParallelSizes(expert=3), {}, "3 does not divide model.num_experts = 8"),
        (ParallelSizes(expert=2), {"num_experts": 0}, "no experts"),
        (ParallelSizes(tensor=4), {}, "4 does not divide model.num_key_value_heads = 2"),
        (ParallelSizes(data=3, tensor=2), {}, "3 does not divide model.hidden_size = 32"),
        (ParallelSizes(data=4, tensor=2), {"kv_lora_rank": 6}, "4 does not divide model.kv_lora_rank = 6"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(
    sizes: ParallelSizes, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        check_shapes(MODEL.model_copy(update=change), sizes)


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        (
            {"rlvr": {"prompts_per_step": 3}},
            "rlvr.prompts_per_step: 3 are too few for 4 processes; expected at least 4",
        ),
        ({"rlvr": {"long_tail": {"token_budget": 9}}}, "rlvr.long_tail.token_budget: a pool .* is one process's"),
        (
            {"rlvr": {}, "cluster": {}},
            "cluster: with torchrun, every process of rlvr samples with an engine of its own",
        ),
        ({"rlhf": {"prompts_per_step": 3}}, "rlhf.prompts_per_step: 3 are too few for 4 processes"),
        ({"dpo": {"batch_pairs": 3}}, "dpo.batch_pairs: 3 .*at least 4"),
        ({"reward": {"batch_pairs": 7, "micro_batches": 2}}, "reward.batch_pairs: 7 .*at least 8"),
        ({"sft": {"batch_problems": 3}}, "sft.batch_problems: 3 .*at least 4"),
        ({"rlvr": {}, "parallel": {"device": "cuda"}}, "parallel.device: rlvr samples on the processor"),
    ],
)
def test_what_many_processes_cannot_do_is_refused_by_name(tables: dict[str, Any], named: str) -> None:
    recipe = Recipe.model_validate({"name": "x", "model": MODEL, **tables})
    with pytest.raises(RecipeError, match=named):
        check_parallel(recipe, ParallelSizes(data=4))
    if "parallel" not in tables:
        check_parallel(recipe, ParallelSizes())


def test_devices_are_chosen_by_one_function() -> None:
    found = find_devices()
    assert found[-1] == "cpu"
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == found[0]
    assert collective_backend(choose_device("cpu")) == "gloo"
    for kind in {"cuda", "npu", "mps"} - set(found):
        with pytest.raises(BackendUnavailable, match=f"no {kind} device"):
            choose_device(kind)


def test_an_accelerator_talks_through_its_own_library() -> None:
    import torch

    assert collective_backend(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"


def test_no_code_asks_for_cuda_by_name() -> None:
    calls = [".cuda(", "torch.cuda.", 'device="cuda"', '"cuda:0', '"cuda:{']
    # The doctor asks torch in a process of its own what is there; graphs and Blackwell's products are CUDA's alone.
    named = {ROOT / "src" / "tafkir" / file for file in
             ("ops/device.py", "cli/doctor.py", "engine/static_steps.py", "ops/nvfp4_scaled.py")}  # fmt: skip
    found = [
        f"{path.name}: {call}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        if path not in named
        for call in calls
        if call in path.read_text(encoding="utf-8")
    ]
    assert found == []


def test_one_process_never_loads_the_distributed_code(tmp_path: Path, cli_env: dict[str, str]) -> None:
    code = (
        "import sys, tafkir.train.stages\n"
        "bad = [m for m in sys.modules if m.startswith(('tafkir.train.parallel', 'torch.distributed.fsdp',"
        " 'torch.distributed.checkpoint', 'torch.distributed.tensor.parallel'))]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=cli_env, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
