"""Every family against its transformers class: a tiny random checkpoint in, the same function, the same bytes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.models.hf import (
    architecture_of,
    config_from_hf,
    config_to_hf,
    drop_absent_mtp,
    read_hf_tensors,
    write_hf_tensors,
)
from tafkir.recipe.model import ModelConfig, MtpConfig, YarnConfig
from tafkir.recipe.residual import ResidualConfig

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "initializer_range": 0.12,
    "max_position_embeddings": 256,
    "use_cache": False,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}
GROUPED = EXPERTS | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
MLA = GROUPED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4,
    "beta_slow": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3 tied, biased": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3 yarn": ("Qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 8, "norm_topk_prob": True}),
    "qwen3_moe unnormalised, some dense": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 8, "mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "glm4_moe": ("Glm4Moe", GROUPED | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}),
    "glm4_moe biased, QK-norm": (
        "Glm4Moe",
        GROUPED | {"attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": ("DeepseekV3", MLA),
    "deepseek_v3 yarn mscale": ("DeepseekV3", MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    "deepseek_v3 halves, no q_lora": ("DeepseekV3", MLA | {"rope_interleave": False, "q_lora_rank": None}),
    "deepseek_v3 biased, wide values": ("DeepseekV3", MLA | {"attention_bias": True, "v_head_dim": 26}),
}
IDS_BT = torch.randint(0, 67, (2, 21), generator=torch.Generator().manual_seed(5))
LABELS_N = torch.randint(0, 67, (42,), generator=torch.Generator().manual_seed(6))


def build_theirs(case: str) -> Any:
    """A model with random norms, biases and expert biases as well, so that nothing hides behind ones and zeros."""
    name, changes = CASES[case]
    torch.manual_seed(0)
    base = {key: value for key, value in BASE.items() if key != "head_dim" or "kv_lora_rank" not in changes}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(base | changes)))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif "bias" in key:
                tensor.uniform_(-0.3, 0.3)
    return model.float().eval()


def their_tensors(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the model holds, under the names that it has on disk."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def logits_of(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    docs, length = ids_BT.shape
    state = VarlenCausal(range(0, docs * length + 1, length))
    out = decoder(ids_BT.flatten(), torch.arange(length).repeat(docs), state)
    return decoder.logits(out.hidden_ND)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_gradients_equal_the_oracle(case: str, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    their_tensors(theirs, tmp_path / "in")
    decoder = load_checkpoint(tmp_path / "in").decoder
    expected_NV = theirs(IDS_BT).logits.flatten(0, 1)
    got_NV = logits_of(decoder, IDS_BT)
    assert expected_NV.abs().max() > 0.5
    torch.testing.assert_close(got_NV, expected_NV, rtol=0, atol=1e-5)

    F.cross_entropy(expected_NV, LABELS_N, reduction="sum").backward()
    F.cross_entropy(got_NV, LABELS_N, reduction="sum").backward()
    for model in (theirs, decoder):
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
    wanted = their_tensors(theirs, tmp_path / "grads")
    grads = dict(write_hf_tensors(decoder, torch.float32))
    assert grads.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (grads[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"


def assert_same_bytes(back: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> None:
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_theirs_to_ours_to_theirs_is_byte_identical_and_loads(case: str, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    original = their_tensors(theirs, tmp_path / "in")
    checkpoint = load_checkpoint(tmp_path / "in")
    save_checkpoint(tmp_path / "out", checkpoint.decoder)
    assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), original)

    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_from_hf(hf_config) == checkpoint.config
    assert config_from_hf(config_to_hf(checkpoint.config)) == checkpoint.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(IDS_BT).logits, theirs(IDS_BT).logits)


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_bfloat16_stays_byte_identical_and_router_biases_float32(case: str, tmp_path: Path) -> None:
    theirs = build_theirs(case)
    biases = {name: buffer.clone() for name, buffer in theirs.named_buffers() if "bias" in name}
    theirs.to(torch.bfloat16)
    for name, buffer in biases.items():
        theirs.get_buffer(name).data = buffer
    original = their_tensors(theirs, tmp_path / "in")
    save_checkpoint(tmp_path / "out", load_checkpoint(tmp_path / "in").decoder, dtype=torch.bfloat16)
    assert {tensor.dtype for name, tensor in original.items() if "correction_bias" in name} <= {torch.float32}
    assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), original)


def test_a_tied_checkpoint_may_repeat_the_head(tmp_path: Path) -> None:
    """Qwen3-0.6B ships its output head beside the embeddings that it is tied to."""
    theirs = build_theirs("qwen3 tied, biased")
    tensors = their_tensors(theirs, tmp_path)
    config = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    read_hf_tensors(Decoder(config), tensors, tensors.__getitem__)
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from embed_tokens\.weight"):
        read_hf_tensors(Decoder(config), tensors, tensors.__getitem__)


LING = ModelConfig(
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
    mtp=MtpConfig(),
)
DEEPSEEK = ModelConfig.model_validate(
    LING.model_dump()
    | {
        "model_type": "deepseek_v3",
        "attention_type": "mla",
        "num_key_value_heads": 2,
        "use_qk_norm": False,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 2,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
    }
)


def filled(config: ModelConfig) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A decoder with random numbers everywhere, and its tensors under their names."""
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            tensor.normal_(generator=generator)
    return decoder, dict(write_hf_tensors(decoder, torch.float32))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LING, {"enorm", "hnorm", "eh_proj", "final_layernorm", "attention.query_key_value", "mlp.experts.3.up_proj"}),
        (
            DEEPSEEK,
            {
                "enorm",
                "hnorm",
                "eh_proj",
                "shared_head.norm",
                "shared_head.head",
                "embed_tokens",
                "self_attn.kv_b_proj",
            },
        ),
    ],
    ids=["Ling-base", "DeepSeek-V3"],
)
def test_mtp_layers_stand_behind_the_decoders_own(config: ModelConfig, names: set[str]) -> None:
    decoder, tensors = filled(config)
    there = {name for name in tensors if name.startswith("model.layers.2.")}
    assert {f"model.layers.2.{name}.weight" for name in names} <= there
    assert tensors["model.layers.2.eh_proj.weight"].shape == (8, 16)
    again = Decoder(config)
    read_hf_tensors(again, tensors, tensors.__getitem__)
    for (name, ours), back in zip(decoder.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, back), name
    assert config_from_hf(config_to_hf(config)) == config
    assert config_to_hf(config)["num_nextn_predict_layers"] == 1


def test_a_repeated_embedding_must_be_the_decoders_own() -> None:
    decoder, tensors = filled(DEEPSEEK)
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.layers.2.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.embed_tokens\.weight: differs from embed_tokens"):
        read_hf_tensors(decoder, tensors, tensors.__getitem__)
    for name in ("embed_tokens", "shared_head.head"):
        del tensors[f"model.layers.2.{name}.weight"]
    read_hf_tensors(decoder, tensors, tensors.__getitem__)


def test_mtp_layers_that_transformers_left_out_are_known_to_be_absent() -> None:
    _, tensors = filled(LING)
    assert drop_absent_mtp(LING, tensors) == LING
    main = [name for name in tensors if not name.startswith("model.layers.2.")]
    assert drop_absent_mtp(LING, main) == LING.model_copy(update={"mtp": None})
    half = [*main, "model.layers.2.enorm.weight"]
    assert drop_absent_mtp(LING, half) == LING  # damage: reading will name what is missing


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": ResidualConfig(kind="mhc")},
        {"mtp": MtpConfig(depth=2, input_state="pre_norm")},
        {"model_type": "qwen3_moe", "mtp": MtpConfig()},
    ],
    ids=["mHC", "other MTP", "MTP on Qwen3-MoE"],
)
def test_parts_of_our_own_are_written_down_and_not_passed_off_as_the_family(changes: dict[str, Any]) -> None:
    qwen = {
        "score_function": "softmax",
        "use_expert_bias": False,
        "num_shared_experts": 0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 1.0,
    }
    base = LING.model_dump() | {"mtp": None} | (qwen if "model_type" in changes else {})
    config = ModelConfig.model_validate(base | {key: value for key, value in changes.items()})
    hf = config_to_hf(config)
    assert hf["architectures"][0].startswith("Tafkir")
    assert hf["model_type"].startswith("tafkir_")
    assert hf.get("num_nextn_predict_layers", 0) == 0
    assert config_from_hf(hf) == config
    assert architecture_of(hf, "config.json").name == hf["architectures"][0].removeprefix("Tafkir")
    with pytest.raises(ValueError, match="tafkir_"):
        transformers.AutoConfig.for_model(**hf)
    strange = hf | {"tafkir": hf["tafkir"] | {"magic": 1}}
    with pytest.raises(CheckpointError, match=r"unknown keys: tafkir\.magic"):
        config_from_hf(strange)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "Qwen3ForCausalLM has no keys for .*num_experts=4"),
        ({"attention_bias": True}, "BailingMoeV2ForCausalLM has no keys for attention_bias=True"),
        ({"score_function": "softmax"}, "has no keys for score_function=softmax"),
        ({"mlp_only_layers": (1,)}, r"has no keys for mlp_only_layers=\(1,\)"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(changes: dict[str, Any], message: str) -> None:
    config = ModelConfig.model_validate(LING.model_dump() | {"mtp": None} | changes)
    with pytest.raises(CheckpointError, match=message):
        config_to_hf(config)


def test_rope_scaling_survives_the_round_trip() -> None:
    scaling = YarnConfig(factor=4.0, original_max_position_embeddings=64, attention_factor=1.1)
    config = LING.model_copy(update={"rope_scaling": scaling, "rotary_dim": 2})
    hf = config_to_hf(config)
    assert hf["rope_scaling"]["type"] == "yarn"
    assert "partial_rotary_factor" not in hf
    assert config_from_hf(hf) == config
