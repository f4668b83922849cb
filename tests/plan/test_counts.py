"""Parameters, bytes and FLOPs against what the models' makers and hubs publish (sources in docs/plan.md)."""

from __future__ import annotations

import pytest

from tafkir.errors import RecipeError
from tafkir.plan.precision import PRECISIONS, checkpoint_bytes, find_precision
from tafkir.plan.shapes import ModelShape, list_shapes, load_shape, shape_of
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.presets import list_presets, load_preset
from tafkir.recipe.residual import ResidualConfig


def shape(name: str) -> ModelShape:
    return load_shape(name) if name in list_shapes() else shape_of(load_preset(name), name)


@pytest.mark.parametrize("name", list_presets())
def test_parts_add_up_to_the_exact_count_of_the_config(name: str) -> None:
    """`parameter_counts` is held to the built decoder's tensors elsewhere."""
    config, parts = load_preset(name), shape(name)
    counts = config.parameter_counts()
    assert (parts.total, parts.active, parts.mtp) == (counts.total, counts.active, counts.mtp)
    assert parts.active_non_embedding == counts.active_non_embedding
    assert parts.kv_bytes_per_token() == config.kv_bytes_per_token(2)
    assert parts.forward_flops(512) == pytest.approx(config.flops_per_token(512), rel=2e-3)


def test_residual_streams_and_biases_are_counted_with_the_rest() -> None:
    config = ModelConfig(residual=ResidualConfig(kind="mhc"), attention_bias=True)
    assert shape_of(config).total == config.num_parameters()
    assert shape_of(config).streams == config.residual.num_streams


# Billions of parameters in all and met by a token, as published or computed from the published shape.
PUBLISHED = {
    "deepseek-r1": (671.03, 37.55),
    "kimi-k2": (1026.4, 32.9),
    "llama-3.1-405b": (405.85, 405.85),
    "ring-flash-2.0": (102.89, 6.15),
    "ring-mini-2.0": (16.26, 1.43),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-32b": (32.8, 32.8),
    "qwen3.5-397b-a17b": (397, 17.3),
    "minimax-m2.5": (229, 11),
    "gpt-oss-120b": (116.8, 5.7),
    "gpt-oss-20b": (20.9, 4.2),
    "qwen3-14b": (14.8, 14.8),
    "qwen3-4b": (4.02, 4.02),
    "qwen3-next-80b-a3b": (80, 3.9),
    "glm-4.5": (353, 33.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    total, active = PUBLISHED[name]
    assert shape(name).total / 1e9 == pytest.approx(total, rel=0.005)
    assert shape(name).active / 1e9 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [("deepseek-r1", 70272), ("llama-3.1-405b", 516096), ("qwen2.5-72b", 327680), ("ring-flash-2.0", 65536)],
)
def test_cache_of_a_token(name: str, size: int) -> None:
    assert shape(name).kv_bytes_per_token() == size


@pytest.mark.parametrize(("precision", "gigabytes"), [("fp8", 688.3), ("nvfp4-v1", 423.6), ("nvfp4", 413.3)])
def test_checkpoints_of_r1(precision: str, gigabytes: float) -> None:
    """Sizes of deepseek-ai/DeepSeek-R1 and of NVIDIA's two R1-0528-FP4."""
    r1 = shape("deepseek-r1")
    assert checkpoint_bytes(r1, PRECISIONS[precision]) / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_three_ways_of_counting_active_parameters() -> None:
    r1, ring = shape("deepseek-r1"), shape("ring-flash-2.0")
    assert [round(n / 1e9, 2) for n in (r1.active, r1.active_without_input)] == [37.55, 36.63]
    assert round(ring.active_non_embedding / 1e9, 2) == 4.86


def test_training_flops_of_a_token() -> None:
    """2505.09343: 250 GFLOP a token at 4,096 tokens, attention causal."""
    assert 3 * shape("deepseek-r1").forward_flops(2048) / 1e9 == pytest.approx(250.4, rel=1e-3)
    # Absorbed: 17.0 MFLOP more for every token that is seen.
    r1 = shape("deepseek-r1")
    assert r1.attention_flops(1, absorbed=True) / 1e6 == pytest.approx(17.0, rel=1e-2)


def test_windows_and_linear_layers_stop_growing() -> None:
    windowed, linear = shape("gpt-oss-120b"), shape("qwen3.5-397b-a17b")
    grows = windowed.sequence_bytes(4096) - windowed.sequence_bytes(2048)
    assert grows == 2048 * windowed.kv_bytes_per_token() == 2048 * 18 * 2 * 8 * 64 * 2
    assert linear.sequence_bytes(0) == linear.state_bytes == 45 * 64 * 128 * 128 * 4


def test_an_unknown_precision_names_the_nearest() -> None:
    assert find_precision("FP4").name == "nvfp4"
    with pytest.raises(RecipeError, match="did you mean fp8"):
        find_precision("f8")
