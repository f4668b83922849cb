"""Writes tests/quant/peer_checkpoints.json: what ModelOpt and llm-compressor make of three tiny checkpoints on the CPU.

Every tensor that they write is in it (dtype, shape, hash), and every config file. Runs in environments of their own:

    python -m venv peers && peers/bin/pip install torch nvidia-modelopt==0.47.0 transformers==5.23.0 accelerate requests
    peers/bin/python tools/write_peer_checkpoints.py modelopt
    python -m venv llmc && llmc/bin/pip install torch llmcompressor==0.14.0.1
    llmc/bin/python tools/write_peer_checkpoints.py llm-compressor

Each run replaces its own half of the file. `--keep FOLDER` leaves the checkpoints there, to be looked at.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tests" / "quant" / "peer_checkpoints.json"
sys.path.insert(0, str(ROOT / "tests" / "quant"))
sources = importlib.import_module("peer_sources")

# Which of ModelOpt's presets, the magnitude that its inputs are pinned to, and its preset for the cache.
MODELOPT: dict[str, tuple[str, float | None, str | None]] = {
    "nvfp4": ("NVFP4_DEFAULT_CFG", 2688.0, None),
    "nvfp4_w4a16": ("W4A16_NVFP4_CFG", None, None),
    "fp8": ("FP8_DEFAULT_CFG", 448.0, None),
    "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", None, None),
    "fp8_block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", None, None),
    "mxfp8": ("MXFP8_DEFAULT_CFG", None, None),
    "nvfp4+fp8 cache": ("NVFP4_DEFAULT_CFG", 2688.0, "FP8_KV_CFG"),
    "nvfp4+nvfp4 cache": ("NVFP4_DEFAULT_CFG", 2688.0, "NVFP4_KV_CFG"),
    "mixed": ("NVFP4_DEFAULT_CFG", 2688.0, None),
}
LLM_COMPRESSOR = {
    "nvfp4": "NVFP4", "nvfp4_w4a16": "NVFP4A16", "mxfp4": "MXFP4A16", "fp8_channel": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK", "int8": "INT8", "mxfp8": "MXFP8", "nvfp4+fp8 cache": "NVFP4",
}  # fmt: skip


def modelopt(source: Path, out: Path, case: str) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    name, amax, cache = MODELOPT[case]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    config = copy.deepcopy(getattr(mtq, name))
    if case == "mixed":
        fp8 = [copy.deepcopy(entry) for entry in mtq.FP8_DEFAULT_CFG["quant_cfg"] if "cfg" in entry]
        for entry in fp8:
            entry["quantizer_name"] = entry["quantizer_name"].replace("*", "*self_attn*", 1)
            if entry["quantizer_name"].endswith("input_quantizer"):
                entry["cfg"]["constant_amax"] = 448.0
        config["quant_cfg"] = [*config["quant_cfg"][:3], *fp8, *config["quant_cfg"][3:]]
    for entry in config["quant_cfg"]:
        if amax and entry.get("quantizer_name") == "*input_quantizer" and "cfg" in entry:
            entry["cfg"]["constant_amax"] = amax
    if cache:
        config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(getattr(mtq, cache)["quant_cfg"])]
    ids = torch.arange(3, 35)[None]
    # Only a cache's scales need data; everything else is a function of the weights.
    loop = (lambda module: module(input_ids=ids)) if cache else None
    with torch.no_grad():
        mtq.quantize(model, config, loop)
    export_hf_checkpoint(model, export_dir=out)


def llm_compressor(source: Path, out: Path, case: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    recipe = QuantizationModifier(
        targets="Linear",
        scheme=LLM_COMPRESSOR[case],
        ignore=["lm_head", r"re:.*mlp\.gate$"],
        kv_cache_scheme=cache if "cache" in case else None,
    )
    given: dict[str, Any] = {}
    if case.startswith("nvfp4") and case != "nvfp4_w4a16":
        ids = torch.arange(3, 35).tolist()
        data = Dataset.from_dict({"input_ids": [ids], "attention_mask": [[1] * len(ids)]})
        given = {"dataset": data, "num_calibration_samples": 1, "max_seq_length": len(ids)}
    oneshot(model=model, recipe=recipe, processor=_tokenizer(), **given)
    model.save_pretrained(out, save_compressed=True)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


def _hashes(path: Path) -> dict[str, str]:
    tensors: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found = opened.get_tensor(name)
                raw = found.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                shape = "x".join(map(str, found.shape))
                tensors[name] = f"{str(found.dtype)[6:]} {shape} {hashlib.sha256(raw).hexdigest()[:16]}"
                if name.endswith(("input_scale", "input_global_scale", "k_scale", "v_scale")):
                    tensors[name] += f" {found.float().item()!r}"
    return tensors


def describe(path: Path, source: Path) -> dict[str, Any]:
    """Every tensor that is not as it was, as "dtype shape hash", and what the config files say of the quantization."""
    before, after = _hashes(source), _hashes(path)
    tensors = {name: said for name, said in after.items() if before.get(name) != said}
    unchanged = after.keys() - tensors.keys()
    said: dict[str, Any] = {"config": json.loads((path / "config.json").read_text())["quantization_config"]}
    if (path / "hf_quant_config.json").exists():
        said["hf_quant_config"] = json.loads((path / "hf_quant_config.json").read_text())
    return {"tensors": tensors, "unchanged": len(unchanged), **said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["modelopt", "llm-compressor"])
    parser.add_argument("--keep", type=Path, help="leave the checkpoints here")
    parser.add_argument("--cases", help="comma-separated; all of the peer's where not given")
    parser.add_argument("--out", type=Path, default=OUT, help="the file")
    asked = parser.parse_args()
    ours = asked.peer == "modelopt"
    run: Callable[[Path, Path, str], None] = modelopt if ours else llm_compressor
    cases = asked.cases.split(",") if asked.cases else list(MODELOPT if ours else LLM_COMPRESSOR)
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = asked.keep or Path(scratch)
        for family in sources.FAMILIES:
            source = root / "sources" / family
            if not source.exists():
                sources.write_source(family, source)
            for case in cases:
                print(f"{asked.peer}: {family} in {case}", flush=True)
                out = root / asked.peer / family / case.replace(" ", "-")
                try:
                    run(source, out, case)
                except Exception as error:  # what a peer cannot do is part of the result
                    made.setdefault(family, {})[case] = {"error": f"{type(error).__name__}: {error}"[:300]}
                    print(f"  {type(error).__name__}: {error}", flush=True)
                    continue
                made.setdefault(family, {})[case] = describe(out, source)
    content = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    packages = ["nvidia-modelopt"] if ours else ["llmcompressor", "compressed-tensors"]
    versions = {name: version(name) for name in [*packages, "torch", "transformers"]}
    before = content.get(asked.peer, {}).get("families", {})
    families = {family: {**before.get(family, {}), **made[family]} for family in sources.FAMILIES}
    content[asked.peer] = {"versions": versions, "families": families}
    content["written by"] = "tools/write_peer_checkpoints.py"
    asked.out.write_text(json.dumps(content, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
