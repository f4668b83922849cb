"""BF16 to NVFP4 on disk, whole processes side by side: tafkir quantize, NVIDIA ModelOpt, and only reading and writing.

The checkpoints are random, of about 0.9 GB: a dense Qwen3 and a Qwen3-MoE with 64 experts in 4 layers, as
`transformers` names them, in shards of 200 MB. Every side starts a fresh interpreter with one thread; CPU-seconds
count, since a busy neighbour changes the clock more than the work. "only read and write" reads every byte of the
source and writes as many as the quantized checkpoint has. ModelOpt runs in an environment of its own
(`--peer-python`), with eight calibration prompts of 128 tokens, and exports as its examples do; "modelopt kernel" is
its tensor kernel alone in a loop over shards.

    python -m venv peers && peers/bin/pip install torch nvidia-modelopt==0.47.0 requests transformers
    python benchmarks/quantize_vs_peers.py --peer-python peers/bin/python --out results.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELOPT = """
import copy, sys, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.randint(3, 32000, (8, 128), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), lambda m: [m(input_ids=row[None]) for row in ids])
export_hf_checkpoint(model, export_dir=sys.argv[2])
"""
KERNEL = """
import pathlib, sys, torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors import safe_open
from safetensors.torch import save_file
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    made = {}
    with safe_open(file, "pt") as source, torch.no_grad():
        for name in source.keys():
            weight = source.get_tensor(name)
            if name.endswith("_proj.weight"):
                packed, made[name + "_scale"], made[name + "_scale_2"] = NVFP4QTensor.quantize(weight, 16)
                weight = packed._quantized_data
            made[name] = weight
    save_file(made, pathlib.Path(sys.argv[2]) / file.name)
"""
ONLY_BYTES = """
import pathlib, sys
read, total = 0, int(sys.argv[3])
buffer = memoryview(bytearray(4 << 20))
files = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
size = sum(file.stat().st_size for file in files)
with open(pathlib.Path(sys.argv[2]) / "bytes", "wb", buffering=0) as out:
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                read += count
                while out.tell() < total * read // size:
                    out.write(buffer[: min(len(buffer), total * read // size - out.tell())])
"""


def shapes(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (32000, 1024)
    yield "lm_head.weight", (32000, 1024)
    yield "model.norm.weight", (1024,)
    for layer in range(24 if kind == "dense" else 4):
        stem = f"model.layers.{layer}."
        yield from ((f"{stem}{name}_layernorm.weight", (1024,)) for name in ("input", "post_attention"))
        yield from ((f"{stem}self_attn.{name}_norm.weight", (128,)) for name in "qk")
        yield from (
            (f"{stem}self_attn.{n}_proj.weight", (rows, 1024))
            for n, rows in zip("qkv", (2048, 1024, 1024), strict=True)
        )
        yield f"{stem}self_attn.o_proj.weight", (1024, 2048)
        width = 3072 if kind == "dense" else 512
        for mlp in ["mlp."] if kind == "dense" else [f"mlp.experts.{e}." for e in range(64)]:
            yield from ((f"{stem}{mlp}{name}_proj.weight", (width, 1024)) for name in ("gate", "up"))
            yield f"{stem}{mlp}down_proj.weight", (1024, width)
        if kind == "moe":
            yield f"{stem}mlp.gate.weight", (64, 1024)


def make(kind: str, folder: Path) -> None:
    """Write a random checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator, shard, index, filled = torch.Generator().manual_seed(0), {}, {}, 0
    names = list(shapes(kind))
    for i, (name, shape) in enumerate(names):
        ones = len(shape) == 1
        shard[name] = (torch.ones(shape) if ones else torch.randn(shape, generator=generator) * 0.02).bfloat16()
        filled += shard[name].numel() * 2
        if filled > 200e6 or i == len(names) - 1:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, filled = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 1024, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
        "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "dense":
        config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 24}
    else:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 4,
            "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "decoder_sparse_step": 1,
            "norm_topk_prob": True, "mlp_only_layers": [],
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def run(command: list[str], source: Path, out: Path) -> dict[str, float]:
    """One fresh process: CPU-seconds, seconds by the clock, and the most memory it held."""
    shutil.rmtree(out, ignore_errors=True)
    if "tafkir.cli.main" not in command:
        out.mkdir()
    for file in source.iterdir():
        with file.open("rb", buffering=0) as content:
            while content.read(1 << 22):  # into the page cache, so that no disk decides
                pass
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]} failed: {said.read().decode()[-2000:]}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.monotonic() - began, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "tafkir-quantize")
    parser.add_argument("--peer-python", type=Path, help="interpreter with nvidia-modelopt; left out, no peer runs")
    parser.add_argument("--checkpoints", nargs="+", default=["dense", "moe"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=5)
    parser.add_argument("--searches", nargs="+", default=["max", "four_over_six", "mse"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", choices=["dense", "moe"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.root / args.make)
        return
    results: dict[str, Any] = {}
    for kind in args.checkpoints:
        source, out = args.root / kind, args.root / "out"
        if not source.exists():
            # In a process of its own: what a child inherits from a large parent would count as its memory.
            subprocess.run([sys.executable, __file__, "--root", str(args.root), "--make", kind], check=True)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        linears = sum(shape[0] * shape[1] * 2 for name, shape in shapes(kind) if name.endswith("_proj.weight"))
        ours = [sys.executable, "-m", "tafkir.cli.main", "quantize", str(source), str(out), "--preset", "all-linear"]
        written = str(round(size - linears * (1 - 4.5 / 16)))
        sides = {"only read and write": [sys.executable, "-c", ONLY_BYTES, str(source), str(out), written]}
        for search in args.searches:
            sides[f"tafkir {search}"] = [*ours, "--scales", search, "--workers", "1"]
        if args.peer_python:
            python = str(args.peer_python)
            sides["modelopt"] = [python, "-c", MODELOPT, str(source), str(out)]
            sides["modelopt kernel"] = [python, "-c", KERNEL, str(source), str(out)]
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in range(args.repeats):
            for side, command in sides.items():
                if not side.startswith("modelopt") or repeat < args.peer_repeats:
                    rows[side].append(run(command, source, out))
                    print(kind, side, rows[side][-1], flush=True)
        table = {
            side: {key: statistics.median(row[key] for row in runs) for key in ("cpu_s", "wall_s", "peak_mb")}
            | {"runs": runs}
            for side, runs in rows.items()
            if runs
        }
        base = table["tafkir " + args.searches[0]]["cpu_s"]
        for row in table.values():
            row["mb_of_linears_per_cpu_s"] = round(linears / 1e6 / row["cpu_s"], 1)
            row["cpu_s_over_ours"] = round(row["cpu_s"] / base, 2)
        results[kind] = {"source_mb": round(size / 1e6, 1), "linears_mb": round(linears / 1e6, 1), "sides": table}
        shutil.rmtree(out, ignore_errors=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(
        json.dumps({k: {s: {**r, "runs": len(r["runs"])} for s, r in v["sides"].items()} for k, v in results.items()})
    )


if __name__ == "__main__":
    main()
