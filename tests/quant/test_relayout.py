"""From one layout to the other and back: the same codes and scales, every value kept, and what cannot be, refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.main import app
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import quantize_fp8_blocks
from tafkir.quant.convert import quantize_checkpoint
from tafkir.quant.relayout import mxfp4_scales_as_nvfp4, relayout_checkpoint
from tafkir.recipe.quantize import QuantizeConfig
from tests.quant.peer_sources import write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    write_source("qwen3_moe", path)
    return path


def quantized(source: Path, path: Path, **settings: Any) -> Path:
    quantize_checkpoint(source, path, QuantizeConfig(**{"preset": "all-linear", **settings}))
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).decoder.state_dict()


def test_nvfp4_there_and_back(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "modelopt", kv_cache="fp8", input_scale=0.3)
    result = relayout_checkpoint(first, tmp_path / "ct", "compressed-tensors", max_shard_bytes=100_000)
    relayout_checkpoint(tmp_path / "ct", tmp_path / "back", "modelopt")
    one, two, three = (tensors_of(path) for path in (first, tmp_path / "ct", tmp_path / "back"))
    assert result.weights == {"nvfp4": 8 + 3 + 12} and len(list((tmp_path / "ct").glob("*.safetensors"))) > 1
    assert one.keys() == three.keys()
    for name, tensor in one.items():
        if name.endswith("weight_scale_2") or name.endswith("input_scale"):
            other = name.replace("weight_scale_2", "weight_global_scale").replace("input_scale", "input_global_scale")
            assert bits(two[other]) == bits(1 / tensor) and two[other].shape == (1,)
            assert three[name].shape == () and torch.allclose(three[name], tensor, rtol=1.2e-7, atol=0)
        else:
            renamed = f"{name}_packed" if f"{name}_scale" in one else name
            assert bits(two[renamed]) == bits(tensor) == bits(three[name])
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized" and config["kv_cache_scheme"]["num_bits"] == 8
    for path in (first, tmp_path / "ct"):
        for name, weight in weights_of(tmp_path / "back").items():
            assert torch.allclose(weight, weights_of(path)[name], rtol=3e-7, atol=0)
    manifest = json.loads((tmp_path / "ct" / "tafkir.json").read_text())
    assert manifest["lineage"]["converted_from"] == "modelopt"


@pytest.mark.parametrize("scheme", ["nvfp4_w4a16", "mxfp8", "fp8_channel", "fp8_block", "fp8"])
def test_the_other_formats_keep_every_value(scheme: str, source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "modelopt", scheme=scheme)
    relayout_checkpoint(first, tmp_path / "ct", "compressed-tensors")
    relayout_checkpoint(tmp_path / "ct", tmp_path / "back", "modelopt")
    for name, tensor in tensors_of(first).items():
        close = 1.2e-7 if name.endswith("scale_2") else 0
        found = tensors_of(tmp_path / "back")[name]
        assert found.dtype == tensor.dtype and torch.allclose(found.float(), tensor.float(), rtol=close, atol=0), name
    config = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())["quantization"]
    assert config == json.loads((first / "hf_quant_config.json").read_text())["quantization"]


def test_mxfp4_becomes_nvfp4_without_loss(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "mx", scheme="mxfp4", layout="compressed-tensors")
    relayout_checkpoint(first, tmp_path / "nv", "modelopt", cast="nvfp4")
    before, after = weights_of(first), weights_of(tmp_path / "nv")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    stored = tensors_of(tmp_path / "nv")
    gate, up = (stored[f"model.layers.1.mlp.experts.2.{part}_proj.weight_scale_2"] for part in ("gate", "up"))
    assert gate == up and gate.log2() == gate.log2().round()
    config = json.loads((tmp_path / "nv" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "W4A16_NVFP4"
    with pytest.raises(CheckpointError, match="modelopt has no place for mxfp4"):
        relayout_checkpoint(first, tmp_path / "no", "modelopt")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    tensors = tensors_of(first)
    tensors[name][3, 2] = tensors[name].max() - 18
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    (first / "tafkir.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 blocks are more than 2\^17 times smaller"):
        relayout_checkpoint(first, tmp_path / "no", "modelopt", cast="nvfp4")
    assert not (tmp_path / "no").exists()


def test_all_exponents_that_e4m3_holds() -> None:
    scale, exponent = mxfp4_scales_as_nvfp4(bytes(range(100, 118)), 117)
    values = torch.frombuffer(bytearray(scale), dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert (values * 2.0**exponent).tolist() == [2.0 ** (e - 127) for e in range(100, 118) for _ in range(2)]
    assert mxfp4_scales_as_nvfp4(bytes([99, 117]), 117)[0][:2] == b"\0\0"


def test_deepseeks_fp8_blocks(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "ds"
    write_source("deepseek_v3", path)
    tensors, made = tensors_of(path), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name.endswith("mqa.weight"):
            made[name], made[f"{name}_scale_inv"] = quantize_fp8_blocks(tensor)
        else:
            made[name] = tensor
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    relayout_checkpoint(path, tmp_path / "out", "modelopt")
    assert all(torch.equal(w, weights_of(path)[n]) for n, w in weights_of(tmp_path / "out").items())
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "FP8_PB_WO"


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        relayout_checkpoint(source, tmp_path / "out", "modelopt")
    first = quantized(source, tmp_path / "int8", scheme="int8", layout="compressed-tensors")
    with pytest.raises(CheckpointError, match="modelopt has no place for int8"):
        relayout_checkpoint(first, tmp_path / "out", "modelopt")
    with pytest.raises(CheckpointError, match="is compressed-tensors already"):
        relayout_checkpoint(first, tmp_path / "out", "compressed-tensors")
    dynamic = quantized(source, tmp_path / "fp8", scheme="fp8", layout="compressed-tensors")
    with pytest.raises(CheckpointError, match="its inputs have no scale"):
        relayout_checkpoint(dynamic, tmp_path / "out", "modelopt")
    file = first / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[struct.unpack("<Q", content[:8])[0] + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not hold the tensor that tafkir\.json describes"):
        relayout_checkpoint(first, tmp_path / "out", "compressed-tensors", cast="nvfp4")
    assert not (tmp_path / "out").exists()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = quantized(source, tmp_path / "one")
    arguments = ["convert", str(first), str(tmp_path / "two"), "--layout", "compressed-tensors"]
    app([*arguments, "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert said["weights"] == {"nvfp4": 23} and said["copied"] == 12
    app(["convert", str(tmp_path / "two"), str(tmp_path / "three"), "--layout", "modelopt"], standalone_mode=False)
    assert "23 in nvfp4, 12 tensors as they were" in capsys.readouterr().out
