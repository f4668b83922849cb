"""Training against published runs: hours, utilisation, failures, and what lies on a chip."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.hardware import load_chips
from tafkir.plan.references import find_shape
from tafkir.plan.training import Failures, TrainJob, TrainLayout, goodput, search_training, train_memory, train_step

CHIPS = load_chips(own_only=True)
V3 = TrainJob(find_shape("deepseek-v3"), CHIPS["h800"], 2048, 14.8e12, batch_tokens=15360 * 4096, fp8=True)


def test_deepseek_v3_without_being_told_its_utilisation() -> None:
    """2.664 million H800 hours; 38.9 % of the bfloat16 peak with causal attention (arXiv 2412.19437)."""
    best = search_training(V3)[0]
    assert 0.30 <= best.mfu <= 0.45
    assert best.chip_hours * best.goodput == pytest.approx(2.664e6, rel=0.15)


def test_deepseek_v3_given_its_utilisation() -> None:
    best = search_training(replace(V3, mfu=0.391))[0]
    assert best.chip_hours * best.goodput == pytest.approx(2.664e6, rel=0.01)
    assert best.dollars is not None and best.dollars[1] == pytest.approx(best.chip_hours * 2)
    assert best.tokens_per_s_per_chip == pytest.approx(1543, rel=0.01)


def test_llama_405b() -> None:
    """380 to 430 TFLOPS of an H100's 989 (arXiv 2407.21783); the model card's 30.84 million hours."""
    best = search_training(TrainJob(find_shape("llama-3.1-405b"), CHIPS["h100"], 16384, 15.6e12, 8192))[0]
    assert 0.32 < best.mfu < 0.45
    assert best.chip_hours == pytest.approx(30.84e6, rel=0.2)


def test_goodput_of_llamas_cluster() -> None:
    """Over 90 % effective; 80 % if checkpoints took two minutes and restarts ten."""
    assert goodput(Failures(), 2048)[0] == pytest.approx(0.90, abs=0.003)
    assert goodput(Failures(checkpoint_s=120, restart_s=600), 2048)[0] == pytest.approx(0.80, abs=0.005)
    # Young's interval is the best one.
    share, every = goodput(Failures(), 2048)
    between = 86400 / (2048 * Failures().per_node_day)
    for other in (0.7 * every, 1.4 * every):
        assert 1 - 30 / other - other / (2 * between) - 300 / between < share


def test_sixteen_bytes_a_parameter_are_the_floor() -> None:
    """R1's states: 10.7 TB with float32 gradients 12.1; the rumoured R2's do not fit on 200 x 64 GB."""
    layout = TrainLayout(tp=1, pp=16, ep=64)
    held = train_memory(V3, layout)
    states = sum(held[name] for name in ("weights", "gradients", "optimizer")) * 2048
    total = V3.shape.total + V3.shape.mtp
    assert states == pytest.approx(18 * total, rel=0.05)
    small = TrainJob(find_shape("r2-rumoured"), CHIPS["ascend-910b3"], 192, 1e12)
    with pytest.raises(CapacityError, match=r"does not fit.*21\.65 TB: at least 360 chips"):
        search_training(small)


def test_recompute_streams_and_multi_token_prediction_cost_time() -> None:
    layout = TrainLayout(tp=1, pp=16, ep=16, shard="zero1")

    def seconds(job: TrainJob, what: TrainLayout = layout) -> float:
        return sum(term.seconds for term in train_step(job, what))

    full = replace(layout, recompute="full")
    # Four forwards' worth in place of three, on all but communication.
    assert 1.15 < seconds(V3, full) / seconds(V3) < 4 / 3
    assert train_memory(V3, full)["activations"] < 0.2 * train_memory(V3, layout)["activations"]
    streams = replace(V3, shape=replace(V3.shape, streams=4))
    assert seconds(streams) / seconds(V3) == pytest.approx(1.067, rel=0.005)
    without = replace(V3, shape=replace(V3.shape, mtp=0, mtp_active=0, mtp_depth=0))
    assert seconds(without) < seconds(V3)
    assert seconds(replace(V3, engine="torchtitan")) > 2 * seconds(V3)


def test_an_unknown_engine() -> None:
    with pytest.raises(RecipeError, match="one of megatron"):
        search_training(replace(V3, engine="deepspeed"))
