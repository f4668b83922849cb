"""Each rank reads its own part of a checkpoint: the weights are those of a whole read, the bytes a share of them."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.residual import ResidualConfig
from tests.parallel.jobs import MODEL, read_shards, train
from tests.parallel.ranks import run_ranks
from tests.parallel.test_trajectory import assert_same_rows, assert_same_weights

MODELS: dict[str, dict[str, Any]] = {
    "ling": {},
    "qwen3": {"model_type": "qwen3", "num_experts": 0, "num_shared_experts": 0, "partial_rotary_factor": 1.0}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
    "glm with mtp and streams": {
        "model_type": "glm4_moe",
        "mtp": MtpConfig(depth=1),
        "residual": ResidualConfig(kind="deepseek_v4", num_streams=2),
        "vocab_size": 66,  # four ranks do not divide it: the tables are cut along their width
    },
}


def write(folder: Path, kind: str, **options: Any) -> Path:
    save_checkpoint(folder, build_decoder(ModelConfig.model_validate(MODEL.model_dump() | MODELS[kind]), 5), **options)
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        pytest.param("ling", {"data_parallel": 4}, {}, marks=SLOW),
        ("ling", {"data_parallel": 2, "expert_parallel": 2}, {"dtype": torch.bfloat16}),
        ("ling", {"tensor_parallel": 2}, {"max_shard_bytes": 100_000}),
        pytest.param("ling", {"expert_parallel": 2, "tensor_parallel": 2}, {}, marks=SLOW),
        pytest.param("qwen3", {"data_parallel": 2, "tensor_parallel": 2}, {}, marks=SLOW),
        pytest.param("glm with mtp and streams", {"data_parallel": 4}, {}, marks=SLOW),
    ],
)
def test_a_rank_reads_what_it_holds_and_nothing_else(
    kind: str, sizes: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    folder, world = write(tmp_path / "model", kind, **options), prod(sizes.values())
    found = run_ranks(world, read_shards, folder, sizes)
    wanted = load_checkpoint(folder).decoder.state_dict()
    assert found[0]["weights"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[0]["weights"][name], value), name
    size = options.get("dtype", torch.float32).itemsize
    for rank in found:
        in_float32 = ("expert_bias", "residual.")
        held = {k: n * (4 if any(part in k for part in in_float32) else size) for k, n in rank["held"].items()}
        # Multi-token-prediction layers repeat the tables, which are compared with them.
        again = held["embed_tokens.weight"] + held["lm_head.weight"] if "mtp" in kind else 0
        assert rank["bytes"] == sum(held.values()) + again
    if "tensor_parallel" not in sizes:  # tensor ranks hold the same tables
        stored = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
        assert max(rank["bytes"] for rank in found) < 1.05 * stored / world


def test_training_goes_on_from_the_parts_as_from_the_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "ling")
    table = {"steps": 2, "ema": {"decay": 0.9}}
    wanted = train(tmp_path / "alone", {}, table, source=folder)
    found = run_ranks(2, train, tmp_path / "many", {"expert_parallel": 2}, table, source=folder)[0]
    assert_same_rows(found["rows"], wanted["rows"])
    assert_same_weights(found["weights"], wanted["weights"])


def damage_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.attention.dense.weight"][3, 3] = torch.nan


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(8, 31)


def damage_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, r"model\.safetensors: model\.layers\.0\.attention\.dense\.weight: the weights are not finite"),
        (damage_shape, r"model\.layers\.1\.mlp\.gate\.weight: shape is \[8, 31\]; expected \[8, 32\] by config"),
        (damage_missing, r"model\.safetensors: 1 tensors missing: model\.norm\.weight"),
    ],
)
def test_damage_is_named(damage: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rank alone, which holds everything; the code is the one that all ranks run."""
    from tafkir.checkpoint.load import empty_decoder, outline_checkpoint, read_parts
    from tafkir.train.parallel.sharding import parts_of

    folder = write(tmp_path / "model", "ling")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tafkir.json").unlink()
    decoder = empty_decoder(outline_checkpoint(folder).config, torch.float32)
    with pytest.raises(CheckpointError, match=message):
        read_parts(folder, decoder, parts_of(decoder, {}))
