"""Many ranks train as one process does: the same losses, gradient norms, loads and weights."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.recipe.model import MtpConfig
from tests.parallel.jobs import LATENT, LEARNING_RATE, MODEL, train, train_in_float32
from tests.parallel.ranks import run_ranks

TOLERANCE = 1e-5


def name_sizes(sizes: dict[str, int]) -> str:
    return "-".join(f"{name.split('_')[0]}{size}" for name, size in sizes.items())


def assert_same_rows(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (ours["step"], key)


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE, atol=LEARNING_RATE / 100, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("alone"), {}, {})


@pytest.mark.parametrize(
    "sizes",
    [
        {"data_parallel": 2, "expert_parallel": 2},
        pytest.param({"data_parallel": 2, "tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param({"expert_parallel": 2, "tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=name_sizes,
)
def test_many_ranks_follow_the_trajectory_of_one(sizes: dict[str, int], alone: dict[str, Any], tmp_path: Path) -> None:
    world = 1
    for size in sizes.values():
        world *= size
    found = run_ranks(world, train, tmp_path, sizes, {})
    assert_same_rows(found[0]["rows"], alone["rows"])
    assert_same_weights(found[0]["weights"], alone["weights"])
    assert [r["weights"] for r in found[1:]] == [None] * (world - 1)
    assert found[0]["tokens"] == alone["tokens"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data_parallel": 2, "tensor_parallel": 2},
        pytest.param({"expert_parallel": 2, "tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=name_sizes,
)
def test_latent_attention_splits_its_heads(sizes: dict[str, int], tmp_path: Path) -> None:
    wanted = train(tmp_path / "alone", {}, {"steps": 3}, model=LATENT)
    found = run_ranks(2 ** len(sizes), train, tmp_path / "many", sizes, {"steps": 3}, model=LATENT)
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data_parallel": 2, "expert_parallel": 2}, marks=pytest.mark.slow),
        {"tensor_parallel": 2},
    ],
    ids=name_sizes,
)
def test_muon_sees_whole_matrices(sizes: dict[str, int], tmp_path: Path) -> None:
    """In float32: the iteration's bfloat16 turns differences in the last bit of a gradient into ones of 1 in 256."""
    table = {"steps": 3, "optimizer": "muon", "muon_learning_rate": LEARNING_RATE}
    wanted = train_in_float32(tmp_path / "alone", {}, table)
    found = run_ranks(2 ** len(sizes), train_in_float32, tmp_path / "many", sizes, table)
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data_parallel": 4}, marks=pytest.mark.slow),
        {"expert_parallel": 2},
        pytest.param({"tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=name_sizes,
)
def test_multi_token_prediction_trains_along(sizes: dict[str, int], tmp_path: Path) -> None:
    """The second depth has no row in some ranks' documents; they compute it with the others all the same."""
    model = MODEL.model_copy(update={"mtp": MtpConfig(depth=2)})
    table = {"steps": 3, "mtp_loss_weight": 0.3, "expert_bias_update_rate": 0.01}
    wanted = train(tmp_path / "alone", {}, table, model=model, longest=5)
    found = run_ranks(prod(sizes.values()), train, tmp_path / "many", sizes, table, model=model, longest=5)
    assert {"train/mtp_loss/1", "train/mtp_loss/2"} <= wanted["rows"][0].keys()
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_parallel": 2},
        pytest.param({"data_parallel": 2, "tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=name_sizes,
)
def test_added_layers_learn_what_the_frozen_decoder_predicts(sizes: dict[str, int], tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"mtp": MtpConfig(depth=2)})
    table = {"steps": 3, "expert_bias_update_rate": 0.01}
    wanted = train(tmp_path / "alone", {}, table, method="mtp_distill", model=model, longest=5)
    found = run_ranks(
        prod(sizes.values()), train, tmp_path / "many", sizes, table, method="mtp_distill", model=model, longest=5
    )
    assert {"train/mtp_kl/1", "train/mtp_kl/2"} <= wanted["rows"][0].keys()
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_parallel": 2},
        pytest.param({"data_parallel": 2, "tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=name_sizes,
)
def test_reward_models_learn_from_pairs_that_are_shared_out(sizes: dict[str, int], tmp_path: Path) -> None:
    table = {"steps": 3, "ema": {"decay": 0.9}}
    wanted = train(tmp_path / "alone", {}, table, method="reward")
    found = run_ranks(prod(sizes.values()), train, tmp_path / "many", sizes, table, method="reward")
    assert {"reward/accuracy", "reward/std", "validation/1000-4"} <= wanted["rows"][-1].keys()
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    ("sizes", "latent"),
    [
        ({"data_parallel": 2, "tensor_parallel": 2}, False),
        pytest.param({"tensor_parallel": 2}, True, marks=pytest.mark.slow),
    ],
)
def test_biases_of_split_attention_stay_those_of_one_process(
    sizes: dict[str, int], latent: bool, tmp_path: Path
) -> None:
    shape = LATENT if latent else MODEL
    model = shape.model_copy(update={"attention_bias": True, "attention_output_bias": True})
    wanted = train(tmp_path / "alone", {}, {"steps": 3}, model=model)
    found = run_ranks(prod(sizes.values()), train, tmp_path / "many", sizes, {"steps": 3}, model=model)
    moved = {name: value for name, value in wanted["weights"].items() if name.endswith("proj.bias")}
    assert len(moved) == (6 if latent else 4) and all(bool(value.any()) for value in moved.values())
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])


@pytest.mark.parametrize(
    ("sizes", "loss"),
    [
        ({"data_parallel": 2}, "kto"),
        pytest.param({"data_parallel": 4}, "sigmoid", marks=pytest.mark.slow),
        pytest.param({"expert_parallel": 2, "tensor_parallel": 2}, "ipo", marks=pytest.mark.slow),
    ],
)
def test_preferences_are_learned_from_pairs_that_are_shared_out(
    sizes: dict[str, int], loss: str, tmp_path: Path
) -> None:
    """The reference is asked by all ranks together; two held-out pairs leave some of four ranks without one."""
    table = {"steps": 3, "loss": loss, "beta": 0.5, "micro_batches": 1}
    wanted = train(tmp_path / "alone", {}, table, method="dpo")
    found = run_ranks(prod(sizes.values()), train, tmp_path / "many", sizes, table, method="dpo")
    assert {"dpo/accuracy", "heldout/3"} <= wanted["rows"][0].keys()
    assert_same_rows(found[0]["rows"], wanted["rows"])
    assert_same_weights(found[0]["weights"], wanted["weights"])
