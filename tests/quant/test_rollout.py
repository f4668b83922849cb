"""Rollout weights: which tensors take few bits, what becomes of them, and that an exact engine stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tafkir.checkpoint.save import save_checkpoint
from tafkir.cli.completer import CompleterBuilder, build_completer, completer_builder
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError, RecipeError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.ops.fp8 import dequantize_fp8_blocks_reference, quantize_fp8_blocks_reference
from tafkir.ops.moe import moe_experts_reference, swiglu_reference
from tafkir.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from tafkir.quant.activations import QuantizedExperts, quantize_inputs
from tafkir.quant.rollout import RolloutWeights, describe_rollouts, is_quantized, prepare_decoder, rollout_formats
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.presets import load_preset
from tafkir.recipe.rollout import RolloutConfig, RolloutPrecision
from tafkir.records import Completion, Request, SamplingParams

EOS = 3
CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=3,
    head_dim=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_experts=8,
    max_position_embeddings=128,
)
PRECISIONS: tuple[RolloutPrecision, ...] = ("bfloat16", "fp8", "nvfp4", "nvfp4_w4a4")


def build(seed: int = 0, **changes: object) -> Decoder:
    decoder = build_decoder(CONFIG.model_copy(update=changes), seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # fresh weights give nearly uniform logits
    return decoder


def engine_of(decoder: Decoder, **rollout: object) -> Engine:
    config = RolloutConfig.model_validate(rollout)
    own = build(1)
    own.load_state_dict(decoder.state_dict())
    prepare = RolloutWeights(config, seed=7)
    engine = Engine(prepare_decoder(own, config), eos_ids=(EOS,), prepare_weights=prepare, record_experts=True)
    engine.load_weights(decoder.state_dict().items(), 3)
    return engine


def requests(count: int, length: int = 12) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(4, 320, (4 + i,), generator=generator).tolist()) for i in range(count)]
    return [Request(str(i), prompt, SamplingParams(seed=i, max_tokens=length)) for i, prompt in enumerate(prompts)]


def complete(engine: Engine, asked: list[Request]) -> list[Completion]:
    done = {completion.request_id: completion for completion in engine.complete(asked)}
    return [done[request.id] for request in asked]


# ---- which tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["ring-flash-2.0", "deepseek-r1", "qwen3-30b-a3b", "glm-4.5-air"])
def test_every_tensor_of_the_published_families_has_a_rule(preset: str) -> None:
    with torch.device("meta"):
        model = load_preset(preset).model_copy(update={"num_hidden_layers": 4})
        shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(model).state_dict().items()}
    formats = rollout_formats(shapes, "nvfp4")
    for name, format in formats.items():
        kept = any(part in name for part in ("embed_tokens", "lm_head", "norm", "router", "bias", "mtp"))
        assert format == ("float32" if kept else "nvfp4"), name
    assert sum(format == "nvfp4" for format in formats.values()) >= 4 * 4


def test_the_result_names_every_tensor_and_what_share_is_narrow() -> None:
    told = describe_rollouts(CONFIG, RolloutConfig(precision="nvfp4_w4a4", noise=0.1))
    assert told["precision"] == "nvfp4_w4a4" and told["noise"] == 0.1 and told["activations"] == "nvfp4"
    assert told["formats"].keys() == build().state_dict().keys()
    assert told["formats"]["layers.1.mlp.experts.down_proj"] == "nvfp4"
    assert told["formats"]["layers.1.mlp.router.weight"] == told["formats"]["embed_tokens.weight"] == "float32"
    assert sum(told["share_of_weights"].values()) == pytest.approx(1)
    assert describe_rollouts(CONFIG, RolloutConfig(precision="bfloat16"))["formats"]["norm.weight"] == "bfloat16"


def test_a_tensor_without_a_rule_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no rule"):
        is_quantized("layers.0.surprise.weight")


def test_rows_without_whole_blocks_are_refused_by_name() -> None:
    weights = build(moe_intermediate_size=24).state_dict().items()
    with pytest.raises(RecipeError, match="blocks of 16") as refused:
        list(RolloutWeights(RolloutConfig(precision="nvfp4"), 0)(weights, 0))
    assert "down_proj" in str(refused.value)
    assert dict(RolloutWeights(RolloutConfig(precision="fp8"), 0)(weights, 0))


def test_replay_of_a_dense_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="no experts to replay"):
        prepare_decoder(build(num_experts=0), RolloutConfig(replay_experts=True))


# ---- what becomes of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "nvfp4_w4a4"])
def test_matrices_are_quantized_and_the_rest_is_the_same_tensor(precision: RolloutPrecision) -> None:
    weights = build().state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    prepare = RolloutWeights(RolloutConfig(precision=precision), 0)
    found = dict(prepare(weights.items(), 0))
    assert list(found) == list(weights) == list(prepare.formats)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name])
        if not is_quantized(name):
            assert found[name] is tensor
        elif precision == "fp8":
            assert torch.equal(found[name], dequantize_fp8_blocks_reference(*quantize_fp8_blocks_reference(tensor)))
        elif tensor.dim() == 2:
            assert torch.equal(found[name], dequantize_nvfp4(*quantize_nvfp4(tensor)))
        else:
            for expert, alone in zip(found[name], tensor, strict=True):
                assert torch.equal(expert, dequantize_nvfp4(*quantize_nvfp4(alone)))


def test_noise_is_drawn_by_seed_version_and_name_at_the_size_asked_for() -> None:
    weights = build().state_dict()

    def draw(seed: int, version: int) -> dict[str, Tensor]:
        return dict(RolloutWeights(RolloutConfig(noise=0.05), seed)(weights.items(), version))

    first, again, later, other = draw(1, 4), draw(1, 4), draw(1, 5), draw(2, 4)
    for name, tensor in weights.items():
        assert torch.equal(first[name], again[name])
        if is_quantized(name):
            assert not torch.equal(first[name], later[name]) and not torch.equal(first[name], other[name])
            error = (first[name] - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
            assert float(error) == pytest.approx(0.05, rel=0.1)
        else:
            assert first[name] is tensor


@torch.no_grad()
def test_quantized_experts_compute_what_quantized_inputs_give() -> None:
    torch.manual_seed(0)
    experts = next(module for module in build().modules() if isinstance(module, Experts))
    x, ids, weights = torch.randn(9, 32), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    expected = torch.zeros(9, 32)
    for token in range(9):
        for slot in range(2):
            gate_up, down = experts.gate_up_proj[ids[token, slot]], experts.down_proj[ids[token, slot]]
            hidden = swiglu_reference(gate_up @ quantize_inputs(x[token : token + 1])[0])
            expected[token] += weights[token, slot] * (down @ quantize_inputs(hidden[None])[0])
    found = QuantizedExperts(experts)(x, ids, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    exact = moe_experts_reference(x, experts.gate_up_proj, experts.down_proj, ids, weights)
    assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.3


# ---- engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_in_few_bits_samples_close_to_the_exact_one(precision: RolloutPrecision) -> None:
    decoder = build()
    engine = engine_of(decoder, precision=precision)
    done = complete(engine, requests(6))
    exact = Engine(decoder, eos_ids=(EOS,))
    gaps = []
    for request, completion in zip(requests(6), done, strict=True):
        own = exact.score([request.prompt_ids + completion.token_ids])[0][len(request.prompt_ids) - 1 :]
        gaps.append((own - torch.tensor(completion.logprobs)).abs())
        assert completion.policy_version == 3
    assert 0 < float(torch.cat(gaps).mean()) < 1.5
    for mine, router in zip(engine.decoder.routers, decoder.routers, strict=True):
        assert mine.weight.dtype == torch.float32 and torch.equal(mine.weight, router.weight)


@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_w4a4"])
def test_tokens_do_not_depend_on_who_else_runs(precision: RolloutPrecision) -> None:
    engine = engine_of(build(), precision=precision)
    together = complete(engine, requests(5))
    for request, completion in zip(requests(5), together, strict=True):
        alone = complete(engine, [request])[0]
        assert alone.token_ids == completion.token_ids
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("rollout") / "checkpoint"
    save_checkpoint(path, build(), tokenizer=Tokenizer.train(["12 + 3 = 15"], 320))
    yield path


@pytest.mark.parametrize("rollout", [None, RolloutConfig()])
def test_the_default_is_the_engine_without_any_of_this(checkpoint: Path, rollout: RolloutConfig | None) -> None:
    engine = build_completer(checkpoint, rollout)
    assert engine.prepare_weights is None
    plain = Engine(build(), eos_ids=engine.eos_ids)
    assert complete(engine, requests(4)) == complete(plain, requests(4))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_built_completer_quantizes_from_the_start_and_at_every_refresh(
    checkpoint: Path, precision: RolloutPrecision
) -> None:
    engine = build_completer(checkpoint, RolloutConfig(precision=precision))
    first = {name: tensor.clone() for name, tensor in engine.decoder.state_dict().items()}
    engine.load_weights(build().state_dict().items(), 1)
    expected = RolloutWeights(RolloutConfig(precision=precision), 0)(build().state_dict().items(), 1)
    for name, tensor in expected:
        assert torch.equal(first[name], tensor)
        assert torch.equal(engine.decoder.state_dict()[name], tensor)


def test_a_stage_builds_with_the_rollout_of_its_own_table() -> None:
    recipe = load_recipe(["wordmath-tiny"], overrides=["rlvr.rollout.precision=nvfp4"]).recipe
    assert completer_builder(recipe, "rlvr").rollout == RolloutConfig(precision="nvfp4")
    assert completer_builder(recipe, "eval").rollout is None


def test_a_call_may_ask_for_another_rollout(checkpoint: Path) -> None:
    builder = CompleterBuilder(RolloutConfig(precision="fp8"), seed=1)
    own, other = builder(checkpoint), builder(checkpoint, RolloutConfig(precision="nvfp4"))
    assert isinstance(own.prepare_weights, RolloutWeights) and own.prepare_weights.config.precision == "fp8"
    assert isinstance(other.prepare_weights, RolloutWeights) and other.prepare_weights.config.precision == "nvfp4"
