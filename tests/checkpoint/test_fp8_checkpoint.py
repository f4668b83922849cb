"""DeepSeek-style FP8 checkpoints: dequantized on the way in, and refused where codes and scales do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tafkir.checkpoint.read as read_module
from tafkir.checkpoint import load_checkpoint, load_config, save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.ops.fp8 import dequantize_fp8_blocks_reference, quantize_fp8_blocks
from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=144,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=80,
    intermediate_size=136,
    moe_intermediate_size=8,
    num_experts=4,
    n_group=2,
)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
DOWN = "model.layers.0.mlp.down_proj.weight"


def quantized(name: str) -> bool:
    """What Ling's FP8 checkpoints quantize: attention and MLP matrices; not the router, norms, embedding and head."""
    return name.endswith("proj.weight") or ".attention.query_key_value" in name or ".attention.dense" in name


def quantize_folder(
    folder: Path, *, ue8m0: bool = False, scale_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Turn a checkpoint into an FP8 one, in place; returns what its weights are worth."""
    tensors = load_file(folder / "model.safetensors")
    worth: dict[str, Tensor] = {}
    for name, tensor in list(tensors.items()):
        worth[name] = tensor
        if quantized(name):
            tensors[name], scale = quantize_fp8_blocks(tensor, ue8m0=ue8m0)
            tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
            worth[name] = dequantize_fp8_blocks_reference(tensors[name], scale)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tafkir.json").unlink()
    set_quantization(folder, QUANTIZATION | ({"scale_fmt": "ue8m0"} if ue8m0 else {}))
    return worth


def set_quantization(folder: Path, quantization: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", build_decoder(CONFIG, seed=0))
    return tmp_path / "model"


@pytest.fixture
def fp8_folder(folder: Path) -> Path:
    quantize_folder(folder)
    return folder


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ue8m0", "scale_dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.float8_e8m0fnu)],
    ids=["float scales", "powers of two", "E8M0 scales"],
)
def test_weights_are_code_times_scale(
    ue8m0: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    chunk_bytes: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read_module, "CHUNK_BYTES", max(chunk_bytes, 16))
    worth = quantize_folder(folder, ue8m0=ue8m0, scale_dtype=scale_dtype)
    decoder = load_checkpoint(folder, dtype=dtype).decoder
    save_checkpoint(tmp_path / "plain", decoder, dtype=dtype)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == worth.keys()
    for name, tensor in worth.items():
        assert torch.equal(plain[name], tensor if "expert_bias" in name else tensor.to(dtype)), name
    # What is written is no longer FP8, and does not say so.
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_the_config_is_read_without_the_weights(fp8_folder: Path) -> None:
    assert load_config(fp8_folder) == CONFIG


def reshape_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"].flatten().clone()


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        changed = tensors[name].float()
        changed[-1, -1] = value
        tensors[name] = changed.to(tensors[name].dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}_scale_inv"), rf"{DOWN}: the FP8 tensor has no scale; expected {DOWN}_scale_inv"),
        (lambda t: t.pop(DOWN), rf"{DOWN}_scale_inv: a scale, but {DOWN} is missing"),
        (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), rf"{DOWN}_scale_inv: a scale, but {DOWN} is BF16, not FP8"),
        (reshape_scale, rf"{DOWN}_scale_inv: shape is \[4\]; expected \[2, 2\], one scale for each 128x128 block"),
        (poison(DOWN, torch.nan), rf"{DOWN}: the weights are not finite"),
        (poison(f"{DOWN}_scale_inv", torch.inf), rf"{DOWN}_scale_inv: the scales are not finite and positive"),
        (poison(f"{DOWN}_scale_inv", torch.nan), rf"{DOWN}_scale_inv: the scales are not finite and positive"),
        (poison(f"{DOWN}_scale_inv", -1.0), rf"{DOWN}_scale_inv: the scales are not finite and positive"),
        (lambda t: t.update({DOWN: t[DOWN].reshape(-1)}), rf"{DOWN}: the FP8 tensor has shape \[19584\]; .*2 dims"),
        (lambda t: t.update({DOWN: t[DOWN].view(torch.uint8)}), rf"{DOWN}_scale_inv: .* {DOWN} is U8, not FP8"),
    ],
    ids="no-scale no-tensor not-FP8 scale-shape NaN-code inf-scale NaN-scale negative 1-D U8".split(),
)
def test_codes_and_scales_that_do_not_fit_are_refused(
    fp8_folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(fp8_folder, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: " + message):
        load_checkpoint(fp8_folder)


def test_a_product_that_overflows_the_wanted_dtype_is_refused(fp8_folder: Path) -> None:
    edit(fp8_folder, lambda tensors: tensors[f"{DOWN}_scale_inv"].fill_(1e4))
    load_checkpoint(fp8_folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"{DOWN}: the weights overflow in float16"):
        load_checkpoint(fp8_folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("fp8", "not a JSON object"),
        ({"quant_method": "awq"}, r"quant_method = 'awq' is not supported; expected 'fp8'"),
        (QUANTIZATION | {"fmt": "e5m2"}, r"fmt = 'e5m2' is not supported; expected 'e4m3'"),
        (QUANTIZATION | {"scale_fmt": "log"}, r"scale_fmt = 'log' is not supported"),
        (QUANTIZATION | {"weight_block_size": None}, r"weight_block_size = None is not supported"),
        (QUANTIZATION | {"weight_block_size": [0, 128]}, r"weight_block_size = \[0, 128\] is not supported"),
        (None, r"model\.safetensors: model\.layers\..*: the tensor is FP8, and config\.json does not say"),
    ],
)
def test_a_quantization_that_we_do_not_read_is_refused(fp8_folder: Path, quantization: Any, message: str) -> None:
    set_quantization(fp8_folder, quantization)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(fp8_folder)


def test_a_config_that_speaks_of_fp8_needs_fp8_weights(folder: Path) -> None:
    """Codes that were cast without their scales look like this."""
    set_quantization(folder, QUANTIZATION)
    with pytest.raises(CheckpointError, match=r"says that weights are FP8, but none is"):
        load_checkpoint(folder)


def test_blocks_of_another_size(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN], tensors[f"{DOWN}_scale_inv"] = quantize_fp8_blocks(tensors[DOWN], (1, 32))
    expected = dequantize_fp8_blocks_reference(tensors[DOWN], tensors[f"{DOWN}_scale_inv"], (1, 32))
    save_file(tensors, folder / "model.safetensors")
    (folder / "tafkir.json").unlink()
    set_quantization(folder, QUANTIZATION | {"weight_block_size": [1, 32]})
    decoder = load_checkpoint(folder).decoder
    assert torch.equal(decoder.state_dict()["layers.0.mlp.down_proj.weight"], expected)
