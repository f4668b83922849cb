"""Whole checkpoints by the compiled kernels alone: the same bytes as by torch, without torch, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tafkir.checkpoint import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.ops.fp8 import quantize_fp8_blocks
from tafkir.quant import native_jobs
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.quantize import QuantizeConfig
from tests.quant.test_convert import CONFIG

CONFIGS: dict[str, dict[str, Any]] = {
    "tafkir": {},
    "nemotron": {"preset": "nemotron", "scales": "mse"},
    "all-linear": {"preset": "all-linear", "scales": "max", "input_scale": 0.5},
    "peer": {"preset": "all-linear", "layout": "compressed-tensors", "scales": "max", "input_scale": 3.0},
    "peer-searched": {"preset": "all-linear", "layout": "compressed-tensors", "scheme": "nvfp4_w4a16", "scales": "mse"},
    "mixed": {"rules": [{"tensors": "*.o_proj.weight", "format": "mxfp8"}]},  # which is torch's business
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in BF16 with a manifest, in float32, and in FP8 blocks with E8M0 scales."""
    root = tmp_path_factory.mktemp("sources")
    decoder = build_decoder(CONFIG, seed=0)
    for name, dtype in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        save_checkpoint(root / name, decoder, dtype=dtype)
    (root / "FP8").mkdir()
    tensors = load_file(root / "BF16" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes, scale = quantize_fp8_blocks(tensors[name], ue8m0=True)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale.to(torch.float8_e8m0fnu)
    save_file(tensors, root / "FP8" / "model.safetensors")
    hf_config = json.loads((root / "BF16" / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    (root / "FP8" / "config.json").write_text(json.dumps(hf_config | {"quantization_config": fp8}))
    return {path.name: path for path in root.iterdir()}


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["BF16", "F32", "FP8"])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_the_same_bytes_as_by_torch(
    config: str, kind: str, sources: dict[str, Path], native_library: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = {}
    for arithmetic in ("torch", "native"):
        monkeypatch.setenv("TAFKIR_KERNELS", arithmetic)
        quantize_checkpoint(sources[kind], tmp_path / arithmetic, QuantizeConfig(**CONFIGS[config]), workers=2)
        made[arithmetic] = content_of(tmp_path / arithmetic)
    assert made["torch"] == made["native"]


def test_what_is_not_held_is_read_twice(
    sources: dict[str, Path], native_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAFKIR_KERNELS", "native")
    for kind in ("BF16", "FP8"):
        quantize_checkpoint(sources[kind], tmp_path / f"{kind}-held", QuantizeConfig())
        with monkeypatch.context() as patch:
            patch.setattr(native_jobs, "HELD_BYTES", 0)
            patch.setattr(native_jobs, "CHUNK_BYTES", 1000)
            quantize_checkpoint(sources[kind], tmp_path / f"{kind}-read", QuantizeConfig())
        assert content_of(tmp_path / f"{kind}-held") == content_of(tmp_path / f"{kind}-read")


def test_bad_numbers_and_changed_bytes_are_named(
    sources: dict[str, Path], native_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAFKIR_KERNELS", "native")
    expert, scale = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"
    cases: list[tuple[str, str, Any, str]] = [
        ("BF16", expert, float("nan"), "weights are not finite"),
        ("F32", "model.norm.weight", float("-inf"), "weights are not finite"),
        ("BF16", expert, 0.5, r"does not hold the tensor that tafkir\.json describes"),
        ("F32", "model.norm.weight", 0.5, r"does not hold the tensor that tafkir\.json describes"),
        ("FP8", expert, float("nan"), "weights are not finite"),
        ("FP8", "model.layers.0.self_attn.q_proj.weight", float("nan"), "weights are not finite"),
        ("FP8", scale, float("nan"), "scales are not finite and positive"),
        ("FP8", "model.embed_tokens.weight", float("inf"), "weights are not finite"),
    ]
    for number, (kind, name, value, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in sources[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[7 if tensors[name].numel() > 7 else 0] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message) as caught:
            quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig())
        assert name in str(caught.value)


def test_torch_is_not_imported(
    sources: dict[str, Path], native_library: Path, cli_env: dict[str, str], tmp_path: Path
) -> None:
    script = (
        "import atexit, sys\nfrom tafkir.cli.main import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy'} & set(sys.modules))))\nmain()"
    )
    command = [sys.executable, "-c", script, "quantize", str(sources["FP8"]), str(tmp_path / "out")]
    env = cli_env | {"TAFKIR_KERNELS": "native"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "out" / "config.json").exists()
