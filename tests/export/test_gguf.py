"""GGUF files: read back by the gguf package and held against the weights, and opened by llama.cpp where it is there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.read import open_weights
from tafkir.checkpoint.save import save_checkpoint
from tafkir.cli.main import app
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError
from tafkir.export.gguf_files import export_gguf, repack_mxfp4, repack_nvfp4
from tafkir.export.gguf_meta import architecture_of
from tafkir.models.decoder import Decoder
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.residual import ResidualConfig
from tafkir.records import Request, SamplingParams
from tests.export.families import BASE, FAMILIES, build_family

gguf = pytest.importorskip("gguf")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> Any:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def test_4_bit_codes_mean_the_same_in_ggufs_order() -> None:
    stream = np.random.RandomState(0)
    packed = stream.randint(0, 256, (6, 64)).astype(np.uint8)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
    plain = magnitudes[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(6, 128)
    scale = stream.randint(1, 0x7F, (6, 8)).astype(np.uint8)
    of_scale = torch.from_numpy(scale).view(torch.float8_e4m3fn).float().numpy()
    found = gguf.quants.dequantize(repack_nvfp4(packed, scale).reshape(6, -1), gguf.GGMLQuantizationType.NVFP4)
    assert np.array_equal(found, plain * of_scale.repeat(16, axis=1))
    scale = stream.randint(90, 140, (6, 4)).astype(np.uint8)
    found = gguf.quants.dequantize(repack_mxfp4(packed, scale).reshape(6, -1), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(found, plain * np.float32(2) ** (scale.astype(np.float32) - 127).repeat(32, axis=1))


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_a_checkpoint_in_each_type(type: Any, tmp_path: Path) -> None:
    result = export_gguf(BASE, tmp_path / "model.gguf", type)
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == result.architecture == "bailingmoe2"
    assert fields["bailingmoe2.rope.dimension_count"] == 16 and fields["bailingmoe2.expert_gating_func"] == 2
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and "<|im_start|>" in fields["tokenizer.chat_template"]
    assert fields["tokenizer.ggml.tokens"][2] == "<|im_end|>" and len(fields["tokenizer.ggml.tokens"]) == 1024
    with open_weights(BASE) as files:
        qkv = files.read("model.layers.2.attention.query_key_value.weight").float().numpy()
        up = torch.stack([files.read(f"model.layers.1.mlp.experts.{i}.up_proj.weight").float() for i in range(32)])
    assert tensors["blk.1.ffn_up_exps.weight"].shape.tolist() == [128, 64, 32]
    for name, expected in (("blk.2.attn_qkv.weight", qkv), ("blk.1.ffn_up_exps.weight", up.numpy())):
        if type == "q8_0":
            theirs = gguf.quants.quantize(expected, gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(tensors[name].data.reshape(theirs.shape), theirs)
        else:
            assert np.array_equal(values(tensors[name]).reshape(expected.shape), expected)
    assert all(tensors[n].tensor_type.name == "F32" for n in tensors if "norm" in n or "gate_inp" in n)
    assert len(tensors) == sum(result.types.values()) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("scheme", "layout"), [("nvfp4", "modelopt"), ("mxfp4", "compressed-tensors")])
def test_quantized_checkpoints_stay_what_they_are(scheme: Any, layout: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_family("qwen3_moe"), tokenizer_dir=BASE)
    config = QuantizeConfig(preset="r1-fp4", scheme=scheme, layout=layout)
    quantize_checkpoint(tmp_path / "model", tmp_path / "q", config)
    result = export_gguf(tmp_path / "q", tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    name = "model.layers.2.mlp.experts.{}.down_proj.weight"
    with open_weights(tmp_path / "q", packed=layout) as files:
        expected = torch.stack([files.read(name.format(i)) for i in range(32)]).numpy()
    stored = tensors["blk.2.ffn_down_exps.weight"]
    assert stored.tensor_type.name == scheme.upper() and result.types[scheme.upper()] == 9
    found = values(stored).reshape(expected.shape)
    if scheme == "nvfp4":
        found = found * tensors["blk.2.ffn_down_exps.scale"].data.reshape(32, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)


def test_nvfp4_becomes_bf16_where_llama_cpp_would_forget_its_global_scale(tmp_path: Path) -> None:
    quantize_checkpoint(BASE, tmp_path / "q", QuantizeConfig(preset="r1-fp4"))
    assert "NVFP4" not in export_gguf(tmp_path / "q", tmp_path / "model.gguf").types


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tafkir.json").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="has no name for how this tokenizer splits text"):
        export_gguf(folder, tmp_path / "model.gguf")
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    streams = config.model_copy(update={"residual": ResidualConfig(kind="mhc")})
    with pytest.raises(CheckpointError, match=r"llama\.cpp has one stream"):
        architecture_of(streams, "config.json")
    assert not list(tmp_path.glob("*.gguf"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["export", "gguf", "base-tiny", str(tmp_path / "m.gguf"), "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert said["architecture"] == "bailingmoe2" and said["types"]["BF16"] == 31 and said["left_out"] == 0
    with pytest.raises(CheckpointError, match="is there already"):
        app(["export", "gguf", "base-tiny", str(tmp_path / "m.gguf")], standalone_mode=False)


# ---- llama.cpp itself -----------------------------------------------------------------------------------------------

_ASK = """
import json, sys, urllib.request, xllamacpp
path, prompts, count, texts = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)

def ask(place, content):
    request = urllib.request.Request(server.listening_address + place, json.dumps(content).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))

found = []
for ids in prompts:
    said = ask("/completion", {"prompt": ids, "n_predict": count, "temperature": 0.0, "n_probs": 1,
                               "cache_prompt": False, "ignore_eos": True, "return_tokens": True})
    # A control token is generated, but has no entry among the probabilities.
    told, steps = said["completion_probabilities"], []
    for token in said["tokens"]:
        known = told and told[0]["id"] == token
        steps.append([token, told.pop(0)["logprob"] if known else None])
    found.append(steps)
tokens = [ask("/tokenize", {"content": text})["tokens"] for text in texts]
print("FOUND " + json.dumps([found, tokens]), flush=True)
"""


def llama_cpp(path: Path, prompts: list[list[int]], count: int, texts: list[str]) -> tuple[list[Any], list[Any]]:
    """Greedy tokens with their log-probabilities, and texts as tokens; by xllamacpp, here or where a variable says."""
    python = os.environ.get("TAFKIR_LLAMA_PYTHON")
    if python is None and importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install xllamacpp, or TAFKIR_LLAMA_PYTHON=python of an environment")
    asked = json.dumps([str(path), prompts, count, texts])
    command = [python or sys.executable, "-c", _ASK, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found, tokens = json.loads(line.removeprefix("FOUND "))
    return found, tokens


TEXTS = [
    "Tom has 12 apples and buys 30 more. How many apples has Tom?",
    "  Ali's book costs $4.50; it's (nearly) free!\n\nA: \\boxed{42} = \\frac{84}{2}",
    "تفكير 123 + 7",
]


def compare(path: Path, decoder: Decoder, count: int, close: float, exact: bool) -> None:
    """llama.cpp's greedy tokens have the log-probabilities that they have here; texts become the same tokens."""
    tokenizer = Tokenizer.load(BASE)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    found, tokens = llama_cpp(path, prompts, count, TEXTS)
    assert tokens == prompts
    engine, params = Engine(decoder, eos_ids=()), SamplingParams(temperature=0.0, max_tokens=count)
    requests = [Request(str(i), tuple(ids), params) for i, ids in enumerate(prompts)]
    ours = {completion.request_id: completion.token_ids for completion in engine.complete(requests)}
    for index, (ids, steps) in enumerate(zip(prompts, found, strict=True)):
        theirs = [token for token, _ in steps]
        scored = engine.score([[*ids, *theirs]])[0][len(ids) - 1 :]
        # llama.cpp may not end here, so where ours would it takes the next best token.
        until = next((i for i, token in enumerate(ours[str(index)]) if token in (0, 2)), count)
        assert len(theirs) == count
        for mine, (_, logprob) in zip(scored[:until].tolist(), steps, strict=False):
            assert logprob is None or mine == pytest.approx(logprob, abs=close)
        assert not exact or theirs[:until] == list(ours[str(index)][:until])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family(family: str, tmp_path: Path) -> None:
    decoder = build_family(family)
    save_checkpoint(tmp_path / "model", decoder, tokenizer_dir=BASE)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    compare(tmp_path / "model.gguf", decoder, 8, 2e-3, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f32", "q8_0", "mxfp4", "nvfp4"])
def test_llama_cpp_says_the_same(type: str, tmp_path: Path) -> None:
    folder = BASE
    if type == "nvfp4":
        folder = tmp_path / "model"
        # Dense, because a rounding may send a token to another expert.
        save_checkpoint(folder, build_family("qwen3"), tokenizer_dir=BASE)
    if type in ("nvfp4", "mxfp4"):
        layout = "modelopt" if type == "nvfp4" else "compressed-tensors"
        config = QuantizeConfig.model_validate({"preset": "r1-fp4", "scheme": type, "layout": layout})
        quantize_checkpoint(folder, tmp_path / "q", config)
        folder = tmp_path / "q"
    export_gguf(folder, tmp_path / "model.gguf", "auto" if folder != BASE else type)  # type: ignore[arg-type]
    # llama.cpp multiplies quantized matrices by activations in 8 bits.
    exact = type == "f32"
    compare(tmp_path / "model.gguf", load_checkpoint(folder).decoder, 24, 2e-3 if exact else 0.25, exact)
