"""Which tensor gets which format: every published shape has a rule for every tensor, and nothing goes unsaid."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tafkir.errors import CheckpointError, RecipeError
from tafkir.models.decoder import Decoder
from tafkir.models.hf.convert import repeated_names, resolve_names, table_for
from tafkir.quant.policy import component_of, decide, sibling_group
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.presets import list_presets, load_preset
from tafkir.recipe.quantize import PRESETS, QuantizeConfig, RuleConfig


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, from its config alone."""
    with torch.device("meta"):
        decoder = Decoder(config)
    tensors, shapes = decoder.state_dict(), {}
    for names in resolve_names(decoder):
        shape = tuple(tensors[names.name].shape)[1 if names.stacked else 0 :]
        for group in names.parts:
            rows = names.rows or (shape[0] // len(group),) * len(group) if shape else ()
            for i, name in enumerate(group):
                shapes[name] = (rows[i], *shape[1:]) if len(group) > 1 else shape
    for name, (ours, written) in repeated_names(decoder, table_for(config)).items():
        if written:
            shapes[name] = tuple(tensors[ours].shape)
    return shapes


@pytest.fixture(scope="module")
def r1() -> dict[str, tuple[int, ...]]:
    return checkpoint_shapes(load_preset("deepseek-r1"))


def formats(shapes: dict[str, tuple[int, ...]], layers: int, **config: Any) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for decision in decide(shapes, QuantizeConfig(**config), layers):
        found.setdefault(decision.component, Counter())[decision.format] += 1
    return found


@pytest.mark.parametrize("name", [name for name in list_presets() if "r1" not in name])
def test_every_tensor_of_every_published_shape_has_a_rule(name: str) -> None:
    config = load_preset(name)
    small = config.model_copy(update={"num_hidden_layers": min(4, config.num_hidden_layers)})
    parts = {component_of(tensor, small.num_hidden_layers) for tensor in checkpoint_shapes(small)}
    assert {"attention", "attention_out", "embedding", "norm"} <= parts and "other" not in parts


def test_the_published_r1_checkpoints(r1: dict[str, tuple[int, ...]]) -> None:
    first, second = (formats(r1, 61, preset=preset) for preset in ("r1-fp4", "r1-fp4-v2"))
    assert first["experts"] == {"nvfp4": 58 * 256 * 3} and first["shared_experts"] == {"nvfp4": 58 * 3}
    assert first["mlp"] == {"nvfp4": 9} and first["router"]["keep"] == 2 * 59
    assert first["attention"] == {"keep": 61 * 3} and first["attention_out"] == {"keep": 61}
    assert second["attention_out"] == {"nvfp4": 61} and second["attention_kv_b"] == {"keep": 61}
    # The layer of multi-token prediction: its matrices, experts and all, stay as they are.
    assert (
        first["mtp"] == {"keep": 5 + 1 + 257 * 3} and first["head"] == {"keep": 2} and first["embedding"] == {"keep": 2}
    )
    ours = formats(r1, 61, preset="tafkir")
    assert ours["mtp"] == {"fp8_block": 777} and ours["attention_kv_b"] == {"fp8_block": 61}
    assert formats(r1, 61, preset="nemotron")["shared_experts"] == {"fp8_channel": 58 * 3}


def test_the_published_sizes(r1: dict[str, tuple[int, ...]]) -> None:
    """DeepSeek-R1's 688 GB of FP8 become 423 GB (1.63 times less), 413 GB and 400 GB (1.72)."""
    bits = {"nvfp4": 4.5, "fp8_block": 8 + 32 / 128**2, "keep": 16}
    source = sum(_numel(shape) * (1 if len(shape) == 2 and _is_fp8(name) else 2) for name, shape in r1.items())
    ratios = []
    for preset in ("r1-fp4", "r1-fp4-v2", "tafkir"):
        decisions = decide(r1, QuantizeConfig(preset=preset), 61)
        ratios.append(source / (sum(d.numel * bits[d.format] for d in decisions) / 8))
    assert source == pytest.approx(688e9, rel=0.003)
    assert ratios == [pytest.approx(1.63, abs=0.01), pytest.approx(1.67, abs=0.01), pytest.approx(1.72, abs=0.01)]


def _is_fp8(name: str) -> bool:
    return component_of(name, 61) not in ("embedding", "head", "router") and not name.endswith("eh_proj.weight")


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.mlp.gate_proj.weight": (24, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 24),
    "model.norm.weight": (32,),
}


def rules(*pairs: tuple[str, str]) -> tuple[RuleConfig, ...]:
    return tuple(RuleConfig(tensors=tensors, format=format) for tensors, format in pairs)  # type: ignore[arg-type]


def test_rules_go_before_the_preset_and_the_first_counts() -> None:
    mine = rules(("*.mlp.gate*", "fp8_block"), ("*.mlp.*", "keep"))
    found = {d.name: d.format for d in decide(SHAPES, QuantizeConfig(preset="all-linear", rules=mine), 1)}
    assert found["model.layers.0.mlp.gate_proj.weight"] == "fp8_block"
    assert found["model.layers.0.mlp.down_proj.weight"] == "keep"
    assert found["model.layers.0.self_attn.q_proj.weight"] == "nvfp4"


def test_a_shape_without_blocks_is_kept_and_said() -> None:
    (down,) = [d for d in decide(SHAPES, QuantizeConfig(), 1) if "down" in d.name]
    assert (down.format, down.reason) == ("keep", "rows of 24 do not split into blocks of 16")
    with pytest.raises(RecipeError, match="cannot be nvfp4: rows of 24"):
        decide(SHAPES, QuantizeConfig(rules=rules(("*down*", "nvfp4"))), 1)
    with pytest.raises(RecipeError, match=r"cannot be fp8_block: its shape is \[32\]"):
        decide(SHAPES, QuantizeConfig(rules=rules(("model.norm.weight", "fp8_block"))), 1)


def test_what_goes_unsaid_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        decide(SHAPES, QuantizeConfig(rules=rules(("*.experts.*", "keep"))), 1)
    odd = SHAPES | {"model.layers.0.magic.weight": (32, 32)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.magic\.weight: no rule.*--rule"):
        decide(odd, QuantizeConfig(), 1)
    (magic,) = [d for d in decide(odd, QuantizeConfig(rules=rules(("*magic*", "fp8_block"))), 1) if "magic" in d.name]
    assert (magic.component, magic.format) == ("other", "fp8_block")


def test_siblings_need_one_format() -> None:
    with pytest.raises(RecipeError, match=r"q_proj.* would be nvfp4, and .*k_proj.* keep"):
        decide(SHAPES, QuantizeConfig(preset="all-linear", rules=rules(("*k_proj*", "keep"))), 1)
    groups = [sibling_group(f"model.layers.3.mlp.experts.7.{part}_proj.weight") for part in ("gate", "up", "down")]
    assert groups[0] == groups[1] != groups[2]
    assert sibling_group("a.q_a_proj.weight") == sibling_group("a.kv_a_proj_with_mqa.weight")


def test_a_layout_has_no_place_for_some_formats() -> None:
    with pytest.raises(ValidationError, match="no place for mxfp4; layout = 'compressed-tensors' does"):
        QuantizeConfig(scheme="mxfp4")
    assert QuantizeConfig(scheme="mxfp4", layout="compressed-tensors").component_formats["experts"] == "mxfp4"
    assert QuantizeConfig().scale_choice == "four_over_six" and QuantizeConfig(preset="r1-fp4").scale_choice == "max"
    assert QuantizeConfig(scales="mse").scale_choice == "mse"
    assert all(set(preset) == set(PRESETS["tafkir"]) for preset in PRESETS.values())
