"""A checkpoint whose weights stay as they are stored computes what the expanded one computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.packed import load_packed
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.few_tokens import FewTokens
from tafkir.models.packed import PackedDecoder
from tafkir.ops import native
from tafkir.ops.integers import dequantize_int8, quantize_int8
from tafkir.ops.packed import FEW_ROWS
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8,
}  # fmt: skip
# Ling 2.0: groups, sigmoid scores with a bias, a shared expert, a dense first layer, partial RoPE.
LING = ModelConfig.model_validate({**SIZES, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2})
QWEN = ModelConfig.model_validate({
    **SIZES, "model_type": "qwen3_moe", "num_shared_experts": 0, "n_group": 1, "topk_group": 1,
    "use_expert_bias": False, "score_function": "softmax", "num_experts_per_tok": 2, "first_k_dense_replace": 0,
    "partial_rotary_factor": 1.0, "routed_scaling_factor": 1.0,
})  # fmt: skip
MLA = ModelConfig.model_validate({
    **SIZES, "model_type": "deepseek_v3", "attention_type": "mla", "head_dim": 32, "num_key_value_heads": 4,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "use_qk_norm": False, "partial_rotary_factor": 1.0,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
})  # fmt: skip


@pytest.fixture(autouse=True)
def native_kernels(native_library: object) -> Iterator[None]:
    before = native.kernels_in_use()
    native.select_kernels("native")
    yield
    native.select_kernels(before)


def logprobs(decoder: Decoder, count: int) -> torch.Tensor:
    ids = torch.randint(0, 96, (FEW_ROWS + 8,), generator=torch.Generator().manual_seed(3))[:count]
    with torch.inference_mode():
        output = decoder(ids, torch.arange(count), VarlenCausal([0, count]))
        return decoder.logits(output.hidden_ND).log_softmax(-1)


@pytest.mark.parametrize("config", [LING, QWEN, MLA], ids=["ling", "qwen", "mla"])
@pytest.mark.parametrize(
    "scheme",
    [
        "bfloat16",
        "nvfp4 modelopt",
        "nvfp4 compressed-tensors",
        "int8 compressed-tensors",
        "fp8_block modelopt",
        "mxfp8 modelopt",
    ],
)
def test_packed_equals_expanded(config: ModelConfig, scheme: str, tmp_path: Path) -> None:
    decoder = build_decoder(config, seed=1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_checkpoint(tmp_path / "model", decoder, dtype=torch.bfloat16)
    folder = tmp_path / "model"
    if scheme != "bfloat16":
        folder = tmp_path / "q"
        kind, layout = scheme.split()
        asked = QuantizeConfig.model_validate({"scheme": kind, "preset": "all-linear", "layout": layout})
        quantize_checkpoint(tmp_path / "model", folder, asked)
    expanded, packed = load_checkpoint(folder).decoder, load_packed(folder).decoder
    assert isinstance(packed, PackedDecoder) and FewTokens.takes(packed) == (config is not MLA)
    assert sum(p.numel() for p in packed.parameters()) < sum(p.numel() for p in expanded.parameters()) / 8
    for count in (1, 5, FEW_ROWS, FEW_ROWS + 8):
        torch.testing.assert_close(logprobs(packed, count), logprobs(expanded, count), rtol=0, atol=1e-5)
    with native.rows_alone():
        assert config is MLA or torch.equal(logprobs(packed, FEW_ROWS + 8)[:5], logprobs(packed, 5))
    native.select_kernels("torch")
    torch.testing.assert_close(logprobs(packed, 5), logprobs(expanded, 5), rtol=0, atol=1e-5)


def test_a_scale_of_minus_nothing_is_nothing(tmp_path: Path) -> None:
    wide = QWEN.model_copy(update={"hidden_size": 256})  # for the kernel that multiplies bytes
    save_checkpoint(tmp_path / "model", build_decoder(wide, seed=1), dtype=torch.bfloat16)
    quantize_checkpoint(tmp_path / "model", tmp_path / "q", QuantizeConfig.model_validate({"preset": "all-linear"}))
    (file,) = (tmp_path / "q").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        tensors, said = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn and name.endswith("weight_scale"):
            tensor.view(torch.uint8)[0, 0] = 0x80
    save_file(tensors, file, said)
    expanded = load_checkpoint(tmp_path / "q", verify_hashes=False).decoder
    packed = load_packed(tmp_path / "q", verify_hashes=False).decoder
    torch.testing.assert_close(logprobs(packed, 1), logprobs(expanded, 1), rtol=0, atol=1e-5)


def test_an_int8_head_is_a_copy_that_makes_logits_alone(tmp_path: Path) -> None:
    decoder = build_decoder(QWEN, seed=1)
    save_checkpoint(tmp_path / "model", decoder, dtype=torch.bfloat16)
    plain, other = (load_packed(tmp_path / "model", int8_head=head).decoder for head in (False, True))
    hidden = torch.randn(3, QWEN.hidden_size)
    codes, scales = quantize_int8(plain.head_weight)
    assert torch.equal(plain.embed_tokens(torch.arange(9)), other.embed_tokens(torch.arange(9)))
    expected = hidden @ dequantize_int8(codes, scales).t()
    torch.testing.assert_close(other.logits(hidden), expected, rtol=0, atol=1e-5)
    assert 1e-5 < (other.logits(hidden) - plain.logits(hidden)).abs().max() < 1e-2 * expected.abs().max()
