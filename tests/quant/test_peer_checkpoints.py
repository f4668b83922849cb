"""Whole checkpoints against those of ModelOpt and llm-compressor, tensor by tensor, bit for bit.

`tools/write_peer_checkpoints.py` wrote down what they make of three tiny models. What differs is listed here, with the
reason. With `TAFKIR_PEERS_PYTHON`, the Python of an environment with ModelOpt, the slow test runs the peer anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tafkir.checkpoint.cache_scales import read_cache_scales
from tafkir.quant.calibrated import quantize_calibrated
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.quantize import CalibrationConfig, QuantizeConfig
from tests.quant.peer_sources import FAMILIES, write_source

HERE = Path(__file__).parent
PEERS = json.loads((HERE / "peer_checkpoints.json").read_text(encoding="utf-8"))

# The policy of a case, where its name is not the scheme.
POLICIES: dict[str, dict[str, Any]] = {
    "nvfp4+fp8 cache": {"scheme": "nvfp4", "kv_cache": "fp8"},
    "nvfp4+nvfp4 cache": {"scheme": "nvfp4", "kv_cache": "nvfp4"},
    "mixed": {"scheme": "nvfp4", "rules": [{"tensors": "*self_attn*_proj*.weight", "format": "fp8"}]},
}
LAYOUTS = {"modelopt": "modelopt", "llm-compressor": "compressed-tensors"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        write_source(family, root / family)
    return {family: root / family for family in FAMILIES}


def described(path: Path) -> dict[str, str]:
    """Every tensor as "dtype shape hash", as the tool does."""
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                shape = "x".join(map(str, tensor.shape))
                found[name] = f"{str(tensor.dtype)[6:]} {shape} {hashlib.sha256(raw).hexdigest()[:16]}"
    return found


def quantize(source: Path, path: Path, peer: str, case: str) -> Path:
    policy = POLICIES.get(case, {"scheme": case})
    config = QuantizeConfig(preset="all-linear", scales="max", layout=LAYOUTS[peer], **policy)
    quantize_checkpoint(source, path, config)
    return path


def unlike(peer: str, case: str, name: str, mine: str, theirs: str) -> str:
    """Why a tensor may be another than the peer's; empty where it may not."""
    if peer == "modelopt" and case == "fp8_block":
        same_bytes = mine.split()[0] == theirs.split()[0] and mine.rsplit(" ", 1)[1] == theirs.rsplit(" ", 1)[1]
        if name.endswith("weight_scale") and same_bytes:
            return "ModelOpt drops dims of one from the scales; vLLM wants [rows, 1, columns, 1]"
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj", "shared_experts.")):
            return "a matrix of one block counts as one scale there, and gets that of its siblings"
        if ".experts." in name and ("gate_proj" in name or "up_proj" in name):
            return "an expert's gate and up get the larger of their scales there, block by block"
    if peer == "llm-compressor" and name.endswith("input_global_scale"):
        return "from its calibration; ours is 1 unless calibrated"
    if peer == "llm-compressor" and case == "fp8_block":
        return "scales and ratios in BF16 there; in float32 here, as DeepSeek's own, which vLLM reads as well"
    return ""


@pytest.mark.parametrize("peer", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_bit_for_bit(peer: str, family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    for case, theirs in PEERS[peer]["families"][family].items():
        if "error" in theirs:
            continue
        mine = described(quantize(sources[family], tmp_path / case.replace(" ", "-"), peer, case))
        source = described(sources[family])
        changed = {name: said for name, said in mine.items() if source.get(name) != said}
        cache_scales = {name for name in theirs["tensors"] if name.endswith((".k_scale", ".v_scale"))}
        # Theirs come from data; without them engines take one, as with ModelOpt's own cast.
        assert changed.keys() == theirs["tensors"].keys() - cache_scales, (peer, family, case)
        assert len(mine) - len(changed) == theirs["unchanged"]
        for name, said in changed.items():
            expected = theirs["tensors"][name]
            if not f"{expected} ".startswith(f"{said} "):
                assert unlike(peer, case, name, said, expected), (peer, family, case, name, said, expected)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_scales_of_the_cache(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Against transformers' own cache in float32, and against both peers, who ran the model in BF16."""
    ids = list(range(3, 35))
    model = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.float32)
    latents: dict[int, float] = {}
    for index, layer in enumerate(model.model.layers if family == "deepseek_v3" else ()):
        norm = layer.self_attn.kv_a_layernorm
        norm.register_forward_hook(lambda _, __, out, index=index: latents.update({index: float(out.abs().max())}))
    with torch.no_grad():
        layers = model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    seen = [(float(layer.keys.abs().max()) / 448, float(layer.values.abs().max()) / 448) for layer in layers]
    how = {"preset": "all-linear", "scales": "max", "calibration": CalibrationConfig(cold_experts="data_free")}
    for peer, layout in LAYOUTS.items():
        config = QuantizeConfig(scheme="nvfp4", kv_cache="fp8", layout=layout, **how)  # type: ignore[arg-type]
        path = tmp_path / peer
        quantize_calibrated(sources[family], path, config, [ids], record=tmp_path / "record", max_shard_bytes=1 << 17)
        mine = {name: said for name, said in described(path).items() if name.endswith((".k_scale", ".v_scale"))}
        theirs = PEERS[peer]["families"][family]["nvfp4+fp8 cache"]["tensors"]
        theirs = {name: said for name, said in theirs.items() if name.endswith((".k_scale", ".v_scale"))}
        assert mine.keys() == theirs.keys() and len(mine) == 4
        assert {n: said.split(" ")[:2] for n, said in mine.items()} == {n: s.split(" ")[:2] for n, s in theirs.items()}
        scales = read_cache_scales(path, 2)
        assert scales is not None
        for layer, (pair, expected) in enumerate(zip(scales, seen, strict=True)):
            if family == "deepseek_v3":  # engines keep latents and rotated keys, the peers' scales are of expanded keys
                rotated = float(layers[layer].keys[..., -16:].abs().max())
                expected = (max(rotated, latents[layer]) / 448,) * 2
            assert pair == pytest.approx(expected, rel=1e-5 if layout == "modelopt" else 2**-8)
            for part, scale in zip("kv", pair, strict=True):
                (said,) = (v for k, v in theirs.items() if f"layers.{layer}." in k and k.endswith(f"{part}_scale"))
                assert family == "deepseek_v3" or scale == pytest.approx(float(said.split()[-1]), rel=0.015)


def test_modelopts_config_files(sources: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        for case, theirs in PEERS["modelopt"]["families"][family].items():
            path = quantize(sources[family], tmp_path / family / case.replace(" ", "-"), "modelopt", case)
            nested = json.loads((path / "hf_quant_config.json").read_text())
            flat = json.loads((path / "config.json").read_text())["quantization_config"]
            for mine, expected in ((nested, theirs["hf_quant_config"]), (flat, theirs["config"])):
                assert mine.pop("producer").items() >= expected.pop("producer").items()
            pairs = [(nested["quantization"], theirs["hf_quant_config"]["quantization"]), (flat, theirs["config"])]
            for mine, expected in pairs:
                if case == "mixed":
                    # They name what is quantized alone; engines that go by exclusions find none.
                    assert not expected.pop("exclude_modules", None) and not expected.pop("ignore", None)
                    mine.pop("exclude_modules", None), mine.pop("ignore", None)
                    # Experts stand there under one name; here by themselves, too.
                    mine["quantized_layers"] = {
                        k: v for k, v in mine["quantized_layers"].items() if ".experts." not in k
                    }
                    for group in (*mine.get("config_groups", {}).values(), *expected.get("config_groups", {}).values()):
                        group["targets"] = [t for t in group["targets"] if ".experts" not in t]
                if case == "fp8_block":
                    assert expected.pop("quant_algo") == mine.pop("quant_algo").lower()
                    mine.pop("group_size", None)
                if "config_groups" not in expected:
                    mine.pop("config_groups", None)  # SGLang looks there for the size of a group
                assert sorted_lists(mine) == sorted_lists(expected), (family, case)


def test_compressed_tensors_configs(sources: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        for case, theirs in PEERS["llm-compressor"]["families"][family].items():
            path = quantize(sources[family], tmp_path / family / case.replace(" ", "-"), "llm-compressor", case)
            mine, expected = json.loads((path / "config.json").read_text())["quantization_config"], theirs["config"]
            # They add observers, which are for calibration, and empty tables; we name embeddings, which are no Linear.
            assert mine.keys() <= expected.keys() and set(mine.pop("ignore")) - {"model.embed_tokens"} == set(
                expected.pop("ignore")
            )
            (group,), (other,) = mine.pop("config_groups").values(), expected.pop("config_groups").values()
            for key in ("weights", "input_activations"):
                given = group.pop(key)
                assert (given is None) == (other[key] is None) and (given or {}).items() <= (other[key] or {}).items()
            cache, theirs_too = mine.pop("kv_cache_scheme"), expected.pop("kv_cache_scheme")
            assert (cache or {}).items() <= (theirs_too or {}).items() and bool(cache) == ("cache" in case)
            assert group.items() <= other.items() and mine.items() <= expected.items(), (family, case)


def sorted_lists(value: Any) -> Any:
    """The same with every list in order, for lists of modules; a group is known by what is in it, not by its number."""
    if isinstance(value, dict):
        if "config_groups" in value:
            groups = sorted(map(str, (sorted_lists(group) for group in value["config_groups"].values())))
            return sorted_lists({**{k: v for k, v in value.items() if k != "config_groups"}, "groups": groups})
        return {key: sorted_lists(value[key]) for key in sorted(value)}
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.slow
def test_the_peer_still_writes_the_same(tmp_path: Path) -> None:
    python = os.environ.get("TAFKIR_PEERS_PYTHON")
    if python is None:
        pytest.skip("set TAFKIR_PEERS_PYTHON to the Python of an environment with nvidia-modelopt 0.47.0")
    tool = HERE.parents[1] / "tools" / "write_peer_checkpoints.py"
    out = tmp_path / "peer.json"
    command = [python, str(tool), "modelopt", "--cases", "nvfp4,fp8,mixed", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())["modelopt"]["families"]
    for family, cases in found.items():
        for case, said in cases.items():
            assert said == PEERS["modelopt"]["families"][family][case], (family, case)
