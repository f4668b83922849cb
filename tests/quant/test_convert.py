"""Whole checkpoints, quantized on disk: every byte against the formats, resumed after a kill, refused where bad."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.read import open_weights
from tafkir.errors import CapacityError, CheckpointError
from tafkir.models.build import build_decoder
from tafkir.ops.fp8 import dequantize_fp8_blocks, quantize_fp8_blocks
from tafkir.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from tafkir.ops.nvfp4_scales import quantize_nvfp4_inverse, search_nvfp4
from tafkir.quant import convert
from tafkir.quant.convert import calibration_folder, quantize_checkpoint, refuse_finished
from tafkir.quant.layouts import excluded_modules
from tafkir.quant.policy import decide
from tafkir.quant.validate import validate_checkpoint
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=48,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    partial_rotary_factor=1.0,
    intermediate_size=160,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    num_shared_experts=0,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=0,
    mlp_only_layers=(0,),
    score_function="softmax",
    use_expert_bias=False,
    routed_scaling_factor=1.0,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    save_checkpoint(path, build_decoder(CONFIG, seed=0), dtype=torch.bfloat16)
    (path / "tokenizer.json").write_text("{}")
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
    )


def test_modelopts_layout(source: Path, tmp_path: Path) -> None:
    result = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(preset="all-linear"))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    stem = "model.layers.1.self_attn."
    amax = max(before[f"{stem}{part}_proj.weight"].abs().max() for part in "qkv").float()
    for part in "qkv":
        name = f"{stem}{part}_proj.weight"
        packed, scale, total = quantize_nvfp4(before[name], amax=amax)
        assert same(after[name], packed) and same(after[f"{name}_scale"], scale)
        assert same(after[f"{name}_scale_2"], total)
        assert after[f"{stem}{part}_proj.input_scale"] == 1
    gate, up = (after[f"model.layers.1.mlp.experts.3.{part}_proj.weight_scale_2"] for part in ("gate", "up"))
    assert gate == up != after["model.layers.1.mlp.experts.3.down_proj.weight_scale_2"]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight", "lm_head.weight"):
        assert same(after[name], before[name])
    quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("NVFP4", 16)
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"} <= set(quantization["exclude_modules"])
    flat = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert flat["quant_method"] == "modelopt" and flat["ignore"] == quantization["exclude_modules"]
    assert result.source_bytes / result.output_bytes > 3 and (tmp_path / "out" / "tokenizer.json").exists()


def test_compressed_tensors_layout(source: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(preset="all-linear", layout="compressed-tensors", input_scale=0.5)
    quantize_checkpoint(source, tmp_path / "out", config)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    packed, scale, total = quantize_nvfp4_inverse(before[name])
    assert same(after[f"{name}_packed"], packed) and same(after[f"{name}_scale"], scale)
    assert same(after[f"{name}_global_scale"], total.reshape(1)) and name not in after
    assert after["model.layers.0.mlp.down_proj.input_global_scale"].tolist() == [2.0]
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "nvfp4-pack-quantized" and "lm_head" in quantization["ignore"]


def test_mixed_precision(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    name = "model.layers.2.self_attn.o_proj.weight"
    codes, scale = quantize_fp8_blocks(before[name])
    assert same(after[name], codes) and after[f"{name}_scale"].shape == (1, 1, 1, 1)
    assert after[f"{name}_scale"].flatten().tolist() == scale.flatten().tolist()
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    assert same(after[name], search_nvfp4(before[name], "four_over_six").packed)
    nested = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert nested["quant_algo"] == "MIXED_PRECISION"
    assert nested["quantized_layers"][name.removesuffix(".weight")] == {"quant_algo": "NVFP4", "group_size": 16}
    assert nested["quantized_layers"]["model.layers.2.self_attn.o_proj"]["quant_algo"] == "FP8_PB_WO"


LAYOUTS = [
    *(("modelopt", scheme) for scheme in ("nvfp4", "nvfp4_w4a16", "mxfp8", "fp8_channel", "fp8_block")),
    *(("compressed-tensors", s) for s in ("nvfp4", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block", "int8")),
]


@pytest.mark.parametrize(("layout", "scheme"), LAYOUTS)
def test_what_is_written_is_loaded(layout: Any, scheme: Any, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(preset="all-linear", layout=layout, scheme=scheme))
    before, after = (load_checkpoint(path).decoder.state_dict() for path in (source, tmp_path / "out"))
    worst = {"nvfp4": 0.012, "nvfp4_w4a16": 0.012, "mxfp4": 0.02}.get(scheme, 1.5e-3)
    changed = 0
    for name, tensor in before.items():
        error = float((after[name] - tensor).square().sum() / tensor.square().sum().clamp_min(1e-30))
        assert error < worst, name
        changed += error > 0
    assert changed == 3 * 2 + 2 + 2 * 2  # q/k/v and o in every layer, one MLP, the experts of two layers
    # A narrower dtype, and a hash that does not match, are seen as for any other checkpoint.
    assert load_checkpoint(tmp_path / "out", dtype=torch.bfloat16).decoder.embed_tokens.weight.dtype == torch.bfloat16
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not hold the tensor that tafkir\.json describes"):
        load_checkpoint(tmp_path / "out")


def test_fp8_blocks_as_source(source: Path, tmp_path: Path) -> None:
    tensors, folder = tensors_of(source), tmp_path / "fp8"
    folder.mkdir()
    worth = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        codes, scale = quantize_fp8_blocks(tensors[name])
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        worth[name] = dequantize_fp8_blocks(codes, scale, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    hf_config = json.loads((source / "config.json").read_text())
    hf_config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(hf_config))
    quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig())
    after = tensors_of(tmp_path / "out")
    # FP8 blocks that stay FP8 are not touched; what becomes NVFP4 is brought to BF16 first.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert same(after[name], tensors[name])
    assert after[f"{name}_scale"].flatten().tolist() == tensors[f"{name}_scale_inv"].flatten().tolist()
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    assert same(after[name], search_nvfp4(worth[name], "four_over_six").packed)
    quantize_checkpoint(folder, tmp_path / "kept", QuantizeConfig(preset="r1-fp4"))
    kept = tensors_of(tmp_path / "kept")["model.layers.0.self_attn.q_proj.weight"]
    assert same(kept, worth["model.layers.0.self_attn.q_proj.weight"])


def test_workers_and_shards_change_no_byte(source: Path, tmp_path: Path) -> None:
    config = QuantizeConfig()
    quantize_checkpoint(source, tmp_path / "one", config)
    quantize_checkpoint(source, tmp_path / "many", config, workers=3, max_shard_bytes=30_000)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(same(one[name], many[name]) for name in one)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    with open_weights(tmp_path / "many", packed="modelopt") as opened:
        gate, up = (f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up"))
        assert opened.tensors[gate].file == opened.tensors[f"{up}_scale"].file
    assert not list(tmp_path.glob(".*"))


def test_a_killed_run_goes_on_where_it_was(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = QuantizeConfig(), tmp_path / "out"
    quantize_checkpoint(source, tmp_path / "whole", config, max_shard_bytes=20_000)
    run, calls = convert._run, []

    def dying(job: Any, *rest: Any) -> Any:
        calls.append(job)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return run(job, *rest)

    monkeypatch.setattr(convert, "_run", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, config, max_shard_bytes=20_000)
    assert not out.exists()
    staging = tmp_path / ".out.quantizing"
    finished = sorted(json.loads((staging / ".progress.json").read_text())["finished"])
    assert len(finished) >= 2
    # One of them was damaged meanwhile: it is done again, and the other is not.
    damaged = bytearray((staging / finished[0]).read_bytes())
    damaged[-5] ^= 4
    (staging / finished[0]).write_bytes(damaged)
    calls.clear()
    calls.extend([None] * 100)
    result = quantize_checkpoint(source, out, config, max_shard_bytes=20_000)
    redone = {job.file for job in calls[100:]}
    assert finished[0] in redone and finished[1] not in redone and result.resumed_bytes > 0
    one, other = tensors_of(tmp_path / "whole"), tensors_of(out)
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match=r"out: a finished checkpoint \(.* MB\) is there already.*: rm -r .*/out"):
        quantize_checkpoint(source, out, config)


def test_killed_between_its_name_and_its_end_it_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(path: Path) -> None:
        raise KeyboardInterrupt

    out, config = tmp_path / "out", QuantizeConfig()
    whole = quantize_checkpoint(source, tmp_path / "whole", config)
    for again in (config, QuantizeConfig(preset="all-linear")):
        with monkeypatch.context() as patch:
            patch.setattr(convert, "_tidy", dying)
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, out, config)
        assert (out / ".progress.json").exists() and (out / ".lock").exists()
        if again is config:
            assert quantize_checkpoint(source, out, again).resumed_bytes == whole.output_bytes
        else:
            with pytest.raises(CheckpointError, match="a finished checkpoint"):
                quantize_checkpoint(source, out, again)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
        }
        shutil.rmtree(out)


def test_what_was_begun_otherwise_is_not_taken_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / ".out.quantizing"
    staging.mkdir()
    (staging / ".progress.json").write_text('{"fingerprint": "another", "finished": {"model.safetensors": {}}}')
    (staging / "model.safetensors").write_bytes(b"old")
    result = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())
    assert result.resumed_bytes == 0 and load_checkpoint(tmp_path / "out")


def test_bad_sources_and_full_disks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = tensors_of(source)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*not finite"):
        quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig())
    assert not (tmp_path / "out").exists()
    content = (source / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig())
    dense = {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(dense))
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantizes nothing"):
        quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig())
    usage = convert.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CapacityError, match=r"the disk has 0\.00 GB free"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


def test_a_source_that_changes_is_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = convert._run

    def touching(*args: Any) -> Any:
        os.utime(source / "model.safetensors", ns=(1, len(os.listdir(tmp_path))))
        return run(*args)

    monkeypatch.setattr(convert, "_run", touching)
    with pytest.raises(CheckpointError, match="the source changed"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeConfig())


def test_validation_finds_what_must_not_be_published(source: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(preset="all-linear")
    quantize_checkpoint(source, tmp_path / "out", config)
    path = tmp_path / "out"
    with open_weights(source) as files:
        decisions = decide({name: files.shape(name) for name in files.names}, config, 3)
    validate_checkpoint(path, decisions, config)
    good = tensors_of(path)
    name = "model.layers.0.self_attn.k_proj"
    for part, value, message in (
        ("weight_scale", 0.0, "zero or not finite"),
        ("weight_scale", float("nan"), "zero or not finite"),
        ("weight_scale_2", 3.0, "global scales of their own"),
        ("input_scale", 0.0, "zero or not finite"),
        ("input_scale", None, "the scale of its inputs is missing"),
    ):
        bad = {key: tensor.clone() for key, tensor in good.items()}
        if value is None:
            del bad[f"{name}.{part}"]
        else:
            bad[f"{name}.{part}"].view(-1)[0] = value
        save_file(bad, path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            validate_checkpoint(path, decisions, config)
    save_file({key: tensor for key, tensor in good.items() if key != "lm_head.weight"}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the weight is missing"):
        validate_checkpoint(path, decisions, config)
    assert "lm_head" in excluded_modules(decisions)


def test_worth_is_code_times_scales(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(preset="all-linear"))
    after = tensors_of(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    worth = dequantize_nvfp4(after[name], after[f"{name}_scale"], after[f"{name}_scale_2"])
    assert torch.equal(load_checkpoint(tmp_path / "out").decoder.state_dict()["layers.0.mlp.down_proj.weight"], worth)


def test_only_a_finished_checkpoint_makes_its_calibration_useless(tmp_path: Path) -> None:
    out, work = tmp_path / "out", calibration_folder(tmp_path / "out")
    for folder in (out, work):
        folder.mkdir()
    with pytest.raises(CheckpointError, match="something else"):
        refuse_finished(out)
    assert work.exists(), "hours of work are not thrown away for an empty folder"
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a finished checkpoint"):
        refuse_finished(out)
    assert not work.exists()
