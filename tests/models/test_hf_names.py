"""Names and config keys of Ling 2.0: reversible, strict, and the same bytes after a round trip."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.hf import config_from_hf, config_to_hf, read_hf_tensors, resolve_names, write_hf_tensors
from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=19,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=6,
    moe_intermediate_size=3,
    num_experts=4,
    n_group=2,
)

# Ling-mini-2.0's config.json as published, with the sizes of CONFIG.
PUBLISHED: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 6,
    "max_position_embeddings": 32768,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 3,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_rmsnorm": True,
    "head_dim": 4,
    "num_shared_experts": 1,
    "use_cache": True,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
    "norm_softmax": False,
    "output_dropout": 0.0,
    "vocab_size": 19,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_group": 2,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": 3,
}


def published_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint as Ling 2.0 ships it: names and shapes written down by hand, random bytes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (19, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (19, 8),
    }
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            f"{layer}input_layernorm.weight": (8,),
            f"{layer}post_attention_layernorm.weight": (8,),
            f"{layer}attention.query_key_value.weight": (16, 8),
            f"{layer}attention.dense.weight": (8, 8),
            f"{layer}attention.query_layernorm.weight": (4,),
            f"{layer}attention.key_layernorm.weight": (4,),
        }
    for mlp, width in (("layers.0.mlp", 6), ("layers.1.mlp.shared_experts", 3)):
        shapes |= {
            f"model.{mlp}.gate_proj.weight": (width, 8),
            f"model.{mlp}.up_proj.weight": (width, 8),
            f"model.{mlp}.down_proj.weight": (8, width),
        }
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}"
        shapes |= {f"{name}.{part}_proj.weight": (3, 8) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (8, 3)
    shapes["model.layers.1.mlp.gate.weight"] = (4, 8)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["model.layers.1.mlp.gate.expert_bias"] = torch.randn(4, generator=generator)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_theirs_to_ours_to_theirs_is_byte_identical(dtype: torch.dtype) -> None:
    theirs = published_tensors(dtype)
    decoder = Decoder(config_from_hf(PUBLISHED))
    read_hf_tensors(decoder, theirs, theirs.__getitem__)
    back = dict(write_hf_tensors(decoder, dtype))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype, name
        assert back[name].is_contiguous()
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_parts_land_where_the_architecture_says() -> None:
    theirs = published_tensors(torch.float32)
    decoder = Decoder(config_from_hf(PUBLISHED))
    read_hf_tensors(decoder, theirs, theirs.__getitem__)
    state = decoder.state_dict()
    experts = state["layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(experts[2, :3], theirs["model.layers.1.mlp.experts.2.gate_proj.weight"])
    assert torch.equal(experts[2, 3:], theirs["model.layers.1.mlp.experts.2.up_proj.weight"])
    assert torch.equal(state["layers.0.mlp.gate_up_proj.weight"][6:], theirs["model.layers.0.mlp.up_proj.weight"])
    qkv = state["layers.0.attention.qkv_proj.weight"]
    assert torch.equal(qkv, theirs["model.layers.0.attention.query_key_value.weight"])


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG.model_copy(update={"tie_word_embeddings": True, "num_shared_experts": 0, "use_qk_norm": False})],
    ids=["default", "few parts"],
)
def test_every_tensor_of_ours_has_its_own_name(config: ModelConfig) -> None:
    decoder = build_decoder(config, 0)
    resolved = resolve_names(decoder)
    assert [names.name for names in resolved] == list(decoder.state_dict())
    theirs = [name for names in resolved for parts in names.parts for name in parts]
    assert len(theirs) == len(set(theirs))


def test_config_survives_the_round_trip() -> None:
    for config in (CONFIG, CONFIG.model_copy(update={"rotary_dim": 2, "tie_word_embeddings": True})):
        assert config_from_hf(config_to_hf(config)) == config


def test_published_config_is_read() -> None:
    config = config_from_hf(PUBLISHED)
    assert (config.rotary_size, config.rope_theta, config.model_type) == (2, 6e5, "bailing_moe_v2")


def test_rotary_dim_wins_where_the_factor_is_absent() -> None:
    keys = {key: value for key, value in PUBLISHED.items() if key != "partial_rotary_factor"}
    assert config_from_hf(keys | {"rotary_dim": 4}).rotary_size == 4


def test_rope_parameters_of_transformers_5_are_read() -> None:
    keys = {key: value for key, value in PUBLISHED.items() if key not in ("partial_rotary_factor", "rope_theta")}
    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0}
    config = config_from_hf(keys)
    assert (config.rope_theta, config.rotary_size) == (1e5, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported.*BailingMoeV2ForCausalLM"),
        ({"architectures": None}, "architecture none .model_type 'bailing_moe'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported.*'silu'"),
        ({"use_bias": True}, "use_bias = True"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"rope_scaling\.original_max_position_embeddings is missing.*before stretching",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type 'linear'.*'yarn'"),
        ({"rope_scaling": 4.0}, "rope_scaling is not a table"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "attn_factor": 1}},
            r"unknown keys: rope_scaling\.attn_factor",
        ),
        ({"moe_shared_expert_intermediate_size": 4}, "moe_shared_expert_intermediate_size = 4.*expected 3"),
        ({"tafkir": {"residual": {}}}, "model_type is 'bailing_moe'"),
        (
            {"tafkir": {"residual": {"kind": "mhc"}}, "model_type": "tafkir_bailing_moe_v2"},
            "'tafkir' describes parts.*expected architecture TafkirBailingMoeV2ForCausalLM",
        ),
        ({"head_dim": None}, "head_dim"),
        ({"score_function": "softmax"}, "score_function"),
        ({"sliding_window": 4096}, "unknown keys: sliding_window"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_we_do_not_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(PUBLISHED | changes, "somewhere/config.json")
    assert re.search(message, str(caught.value))
    assert str(caught.value).startswith("somewhere/config.json: ")


@pytest.mark.parametrize("key", ["n_group", "rope_theta", "partial_rotary_factor"])
def test_a_missing_key_is_named(key: str) -> None:
    keys = {name: value for name, value in PUBLISHED.items() if name != key}
    with pytest.raises(CheckpointError, match=key):
        config_from_hf(keys)


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    theirs = published_tensors(torch.float32)
    decoder = Decoder(CONFIG)
    lost = theirs.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        read_hf_tensors(decoder, theirs, theirs.__getitem__)
    theirs["model.layers.1.mlp.experts.3.up_proj.weight"] = lost
    theirs["model.layers.2.enorm.weight"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"1 tensors not in the model: model\.layers\.2\.enorm\.weight"):
        read_hf_tensors(decoder, theirs, theirs.__getitem__)
    del theirs["model.layers.2.enorm.weight"]
    theirs["lm_head.weight"] = torch.zeros(18, 8)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: shape is \[18, 8\]; expected \[19, 8\]"):
        read_hf_tensors(decoder, theirs, theirs.__getitem__)


def test_a_tensor_that_no_rule_names_is_an_error() -> None:
    decoder = Decoder(CONFIG)
    decoder.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match="extra: BailingMoeV2ForCausalLM has no name"):
        resolve_names(decoder)
