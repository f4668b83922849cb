"""Fake quantization of a decoder: bit for bit the checkpoint that `tafkir quantize` writes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.cli.completer import build_completer
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.quant.convert import quantize_checkpoint
from tafkir.quant.fake import FakeQuantizer, fake_quantize
from tafkir.quant.rollout import describe_rollouts
from tafkir.quant.served import load_served
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.rollout import RolloutConfig
from tafkir.records import Request, SamplingParams

# Ling's names (one matrix for q, k and v) with routed and shared experts, and Qwen3's (three matrices).
LING = ModelConfig(
    vocab_size=300,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=64,
)
QWEN = LING.model_copy(
    update={
        "model_type": "qwen3",
        "num_experts": 0,
        "num_shared_experts": 0,
        "partial_rotary_factor": 1.0,
        "intermediate_size": 160,
        "tie_word_embeddings": False,
    }
)
SETTINGS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "nvfp4": (LING, {"preset": "all-linear", "scales": "max"}),
    "nvfp4 of three matrices": (QWEN, {"preset": "all-linear", "scales": "max"}),
    "four over six, FP8 blocks": (LING, {"preset": "tafkir"}),
    "best scales": (QWEN, {"preset": "r1-fp4-v2", "scales": "mse", "scheme": "nvfp4_w4a16"}),
    "the peer's arithmetic": (LING, {"preset": "all-linear", "layout": "compressed-tensors", "scales": "max"}),
    "the peer's reciprocal": (QWEN, {"preset": "tafkir", "layout": "compressed-tensors", "scales": "four_over_six"}),
    "mxfp4": (LING, {"preset": "all-linear", "scheme": "mxfp4", "layout": "compressed-tensors"}),
    "mxfp8": (QWEN, {"preset": "all-linear", "scheme": "mxfp8"}),
    "fp8": (QWEN, {"preset": "all-linear", "scheme": "fp8", "layout": "compressed-tensors"}),
    "fp8 by rows": (LING, {"preset": "nemotron"}),
    "int8": (QWEN, {"preset": "all-linear", "scheme": "int8", "layout": "compressed-tensors"}),
    "int4": (LING, {"preset": "r1-fp4", "scheme": "int4", "layout": "compressed-tensors"}),
}


def decoder_of(config: ModelConfig) -> Decoder:
    decoder = build_decoder(config, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # fresh weights give nearly uniform logits
    return decoder


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(25), torch.arange(15)])
    return decoder.logits(decoder(ids, positions, VarlenCausal([0, 25, 40])).hidden_ND)


@pytest.mark.parametrize("setting", ["nvfp4", "best scales", "the peer's arithmetic", "mxfp4"])
def test_parameters_are_worth_what_is_written_of_a_bfloat16_checkpoint(tmp_path: Path, setting: str) -> None:
    (shape, keys), dtype = SETTINGS[setting], torch.bfloat16
    config = QuantizeConfig.model_validate(keys)
    decoder = decoder_of(shape)
    save_checkpoint(tmp_path / "own", decoder, dtype=dtype)
    quantize_checkpoint(tmp_path / "own", tmp_path / "small", config)
    written = load_checkpoint(tmp_path / "small").decoder.state_dict()
    exact = dict(decoder.named_parameters())
    found = {name: tensor.detach() for name, tensor in exact.items()} | FakeQuantizer(decoder, config, dtype)(exact)
    for name, tensor in found.items():
        assert torch.equal(tensor, written[name].float()), name
    changed = [name for name in exact if not torch.equal(found[name], exact[name])]
    assert any("down_proj" in name for name in changed)


@pytest.mark.parametrize("setting", ["four over six, FP8 blocks", "best scales"])
def test_the_written_checkpoint_computes_what_was_trained(tmp_path: Path, setting: str) -> None:
    shape, keys = SETTINGS[setting]
    config = QuantizeConfig.model_validate({**keys, "input_scale": 0.5})
    decoder = decoder_of(shape)
    plain = logits(decoder)
    save_checkpoint(tmp_path / "own", decoder)
    quantize_checkpoint(tmp_path / "own", tmp_path / "small", config)
    quantizer = fake_quantize(decoder, config)
    decoder.load_state_dict(decoder.state_dict() | quantizer(dict(decoder.named_parameters())))
    found = logits(decoder)
    torch.testing.assert_close(found, logits(load_served(tmp_path / "small")), rtol=0, atol=1e-6)
    assert 1e-3 < float((found - plain).norm() / plain.norm()) < 0.7
    if config.component_formats["mlp"] == "nvfp4":
        # The inputs are a part of it.
        assert not torch.allclose(found, logits(load_checkpoint(tmp_path / "small").decoder), atol=1e-3)


def test_a_search_that_cuts_weights_off_says_where() -> None:
    decoder = decoder_of(QWEN)
    with torch.no_grad():
        decoder.layers[0].mlp.down_proj.weight[0, :16] = 1.0
        decoder.layers[0].mlp.down_proj.weight[0, 0] = 1.3  # the others weigh more than it
    quantizer = FakeQuantizer(decoder, QuantizeConfig(preset="all-linear", scales="mse"))
    worth = quantizer(dict(decoder.named_parameters()))
    name = "layers.0.mlp.down_proj.weight"
    inside = quantizer.inside[name]
    lost = decoder.get_parameter(name).abs() > worth[name].abs() * 7 / 6
    biggest = worth[name].unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
    assert torch.equal(~inside & lost, ~inside)
    assert bool((worth[name].abs()[~inside] == biggest[~inside]).all())
    assert (
        FakeQuantizer(decoder, QuantizeConfig(preset="all-linear", scales="max"))(dict(decoder.named_parameters()))
        and not FakeQuantizer(decoder, QuantizeConfig(preset="all-linear", scales="max")).inside
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_completer_samples_with_the_checkpoint_that_would_be_written(tmp_path: Path, setting: str) -> None:
    """At once, and again whenever it is handed new weights."""
    shape, keys = SETTINGS[setting]
    rollout = RolloutConfig(quantize=QuantizeConfig.model_validate(keys))
    assert rollout.quantize is not None and not rollout.is_exact
    first, second = decoder_of(shape), decoder_of(shape)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.07)
    save_checkpoint(tmp_path / "first", first, tokenizer=Tokenizer.train(["1 + 2 = 3"], 300))
    engine = build_completer(tmp_path / "first", rollout)
    for version, decoder in enumerate((first, second)):
        if version:
            engine.load_weights(decoder.state_dict().items(), version)
        save_checkpoint(tmp_path / f"own-{version}", decoder)
        quantize_checkpoint(tmp_path / f"own-{version}", tmp_path / f"small-{version}", rollout.quantize)
        served = load_served(tmp_path / f"small-{version}")
        assert torch.equal(logits(engine.decoder), logits(served))
        for name, tensor in engine.decoder.state_dict().items():
            assert torch.equal(tensor, served.state_dict()[name]), name
        sampled = next(iter(engine.complete([Request("0", (5, 6, 7), SamplingParams(seed=1, max_tokens=5))])))
        assert sampled.policy_version == version and sampled.token_ids
    told = describe_rollouts(shape, rollout)
    assert set(told["formats"].values()) >= {rollout.quantize.component_formats["mlp"], "float32"}
    assert (told["activations"] == "nvfp4") == ("nvfp4" in told["formats"].values())


def test_rollouts_are_quantized_in_one_way_or_the_other() -> None:
    for keys in ({"precision": "nvfp4"}, {"noise": 0.1}, {"quantize": {"calibration": {"tokens": 512}}}):
        with pytest.raises(ValidationError, match=r"rollout\.quantize stands|calibration"):
            RolloutConfig.model_validate({"quantize": {}} | keys)
