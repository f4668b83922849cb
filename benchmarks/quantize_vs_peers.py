"""BF16 to NVFP4 on disk, whole processes side by side: tafkir quantize, ModelOpt, llm-compressor, and bytes alone.

The checkpoints are random, of about 0.9 GB: a dense Qwen3 and a Qwen3-MoE with 64 experts in 4 layers, as
`transformers` names them, in shards of 200 MB. Every run starts a fresh interpreter with one OpenMP thread; one run of
each side makes a round, and the ratios are medians over rounds. Every result is kept in `--out` at once: started again,
the script goes on where it was, and `--minutes` ends it in time.

- "read and write": a script that reads every byte of the source, writes as many as the quantized checkpoint has, and
  flushes them, as tafkir does.
- "tafkir without arithmetic": tafkir quantize with kernels that compute nothing.
- ModelOpt and llm-compressor run in environments of their own, with eight calibration prompts of 128 tokens, and export
  as their examples do; "modelopt kernel" is ModelOpt's tensor kernel alone, in a loop over the files.

    python -m venv modelopt && modelopt/bin/pip install torch nvidia-modelopt==0.47.0 requests transformers
    python -m venv llmc && llmc/bin/pip install torch llmcompressor==0.14.0.1 "transformers<5.18"
    python benchmarks/quantize_vs_peers.py --modelopt modelopt/bin/python --llmcompressor llmc/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "quantize_vs_peers.json"
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
LLMCOMPRESSOR = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.randint(3, 32000, (8, 128), generator=torch.Generator().manual_seed(0)).tolist()
rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 128] * 8})
recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head", "re:.*mlp.gate$"])
oneshot(model=model, recipe=recipe, dataset=rows, num_calibration_samples=8, max_seq_length=128)
model.save_pretrained(sys.argv[2], save_compressed=True)
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
import os, pathlib, sys
read, total = 0, int(sys.argv[3])
buffer = memoryview(bytearray(1 << 20))
files = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
size = sum(file.stat().st_size for file in files)
with open(pathlib.Path(sys.argv[2]) / "bytes", "wb", buffering=0) as out:
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                read += count
                while out.tell() < total * read // size:
                    out.write(buffer[: min(len(buffer), total * read // size - out.tell())])
    os.fsync(out.fileno())
"""
NO_ARITHMETIC = """
import ctypes, sys
from tafkir.native.weights import WeightKernels
WeightKernels.amax = lambda *rest: 1.0
WeightKernels.quantize_nvfp4 = lambda self, a, d, blocks, r, m, scale, packed: ctypes.memset(scale, 56, blocks) and None
from tafkir.cli.main import main
main()
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


def run(command: list[str], source: Path, out: Path, *, makes_folder: bool) -> dict[str, float]:
    """One fresh process: CPU-seconds, seconds by the clock, and the most memory it held."""
    shutil.rmtree(out, ignore_errors=True)
    if not makes_folder:
        out.mkdir()
    for file in source.iterdir():
        with file.open("rb", buffering=0) as content:
            while content.read(1 << 22):  # into the page cache, so that no disk decides
                pass
    os.sync()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules are kept, as they are for everyone
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]} failed: {said.read().decode()[-2000:]}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_s": round(wall, 3),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def sides_of(kind: str, source: Path, out: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of every side."""
    size, linears = sizes(kind, source)
    cli = [sys.executable, "-m", "tafkir.cli.main"]
    ours = ["quantize", str(source), str(out), "--preset", "all-linear", "--scales"]
    written = str(round(size - linears * (1 - 4.5 / 16)))
    sides = {
        "read and write": [sys.executable, "-c", ONLY_BYTES, str(source), str(out), written],
        "tafkir without arithmetic": [sys.executable, "-c", NO_ARITHMETIC, *ours, "max"],
        "tafkir max": [*cli, *ours, "max"],
        "tafkir max, one worker": [*cli, *ours, "max", "--workers", "1"],
        "tafkir four_over_six": [*cli, *ours, "four_over_six"],
        "tafkir mse": [*cli, *ours, "mse"],
    }
    if args.modelopt:
        sides["modelopt"] = [str(args.modelopt), "-c", MODELOPT, str(source), str(out)]
        sides["modelopt kernel"] = [str(args.modelopt), "-c", KERNEL, str(source), str(out)]
    if args.llmcompressor:
        sides["llm-compressor"] = [str(args.llmcompressor), "-c", LLMCOMPRESSOR, str(source), str(out)]
    return {side: command for side, command in sides.items() if not args.sides or side in args.sides}


def sizes(kind: str, source: Path) -> tuple[int, int]:
    """Bytes of the source, and of the matrices in it that are quantized."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return size, sum(shape[0] * shape[1] * 2 for name, shape in shapes(kind) if name.endswith("_proj.weight"))


def summary(rounds: list[dict[str, dict[str, float]]], linears: int) -> dict[str, Any]:
    """For each side medians over the rounds, and ratios within a round to tafkir by block maxima."""
    table: dict[str, Any] = {}
    for side in dict.fromkeys(side for row in rounds for side in row):
        runs = [row[side] for row in rounds if side in row]
        table[side] = {key: statistics.median(run[key] for run in runs) for key in ("cpu_s", "wall_s", "peak_mb")}
        table[side]["rounds"] = len(runs)
        table[side]["mb_of_matrices_per_cpu_s"] = round(linears / 1e6 / table[side]["cpu_s"], 1)
        for key in ("cpu_s", "wall_s"):
            ratios = [row[side][key] / row["tafkir max"][key] for row in rounds if side in row and "tafkir max" in row]
            if ratios:
                table[side][f"{key}_over_ours"] = round(statistics.median(ratios), 3)
                table[side][f"{key}_over_ours_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "tafkir-quantize")
    parser.add_argument("--modelopt", type=Path, help="interpreter with nvidia-modelopt")
    parser.add_argument("--llmcompressor", type=Path, help="interpreter with llmcompressor")
    parser.add_argument("--checkpoints", nargs="+", default=["dense", "moe"])
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after these")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--make", choices=["dense", "moe"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.root / args.make)
        return
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    end, out = time.monotonic() + 60 * args.minutes, args.root / "out"
    for kind in args.checkpoints:
        if not (args.root / kind).exists():
            # In a process of its own: what a child inherits from a large parent would count as its memory.
            subprocess.run([sys.executable, __file__, "--root", str(args.root), "--make", kind], check=True)
    for number in range(args.rounds):
        for kind in args.checkpoints:
            source = args.root / kind
            size, linears = sizes(kind, source)
            result = results.setdefault(kind, {"source_mb": round(size / 1e6, 1), "rounds": []})
            result["matrices_mb"] = round(linears / 1e6, 1)
            result["rounds"] += [{}] * (number + 1 - len(result["rounds"]))
            row = dict(result["rounds"][number])
            sides = sides_of(kind, source, out, args)
            # Every other round the other way round: what a busy neighbour adds meets all sides alike.
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                if side in row or time.monotonic() > end:
                    continue
                row[side] = run(sides[side], source, out, makes_folder=side.startswith("tafkir"))
                print(kind, number, side, row[side], flush=True)
                result["rounds"][number] = row
                result["sides"] = summary(result["rounds"], linears)
                args.out.write_text(json.dumps(results, indent=2) + "\n")
            shutil.rmtree(out, ignore_errors=True)
    for kind in args.checkpoints:
        for side, row in results.get(kind, {}).get("sides", {}).items():
            print(f"{kind:6} {side:26} {row['cpu_s']:8.2f} CPU-s {row['wall_s']:8.2f} s {row['peak_mb']:6} MB", end="")
            print(f"  x{row.get('cpu_s_over_ours')} CPU, x{row.get('wall_s_over_ours')} wall, {row['rounds']} rounds")


if __name__ == "__main__":
    main()
