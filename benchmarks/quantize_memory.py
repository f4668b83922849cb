"""Memory and size: a checkpoint of DeepSeek-R1's shape, 20 GB in FP8 blocks, quantized to NVFP4 on a small machine.

It has R1's layers (3 dense, 58 with experts, one for multi-token prediction), 256 experts and a shared one in each, all
46,183 weights under their names, in FP8 with a scale for each 128x128 and BF16 as published; rows and columns are about
a seventh, so that it fits on a disk. Codes are drawn once from a Gaussian and repeated: sizes and memory do not depend
on them. It is written before and removed after (`--keep` leaves it).

    python benchmarks/quantize_memory.py --root /big/disk --write
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tafkir.checkpoint.header import layout

OUT = Path(__file__).parent / "results" / "quantize_memory.json"
BLOCK = 128
Tensor = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """Numbers of a checkpoint's config, as DeepSeek-V3 calls them."""

    hidden_size: int = 1024
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1
    n_routed_experts: int = 256
    moe_intermediate_size: int = 416
    intermediate_size: int = 2560
    vocab_size: int = 26_880
    q_lora_rank: int = 256
    kv_lora_rank: int = 128
    num_attention_heads: int = 32
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 80


def matrices(shape: Shape) -> Iterator[tuple[str, int, int, bool]]:
    """Every matrix: name, rows, columns, and whether it is in FP8."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    query = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    yield "model.embed_tokens.weight", shape.vocab_size, hidden, False
    yield "lm_head.weight", shape.vocab_size, hidden, False
    for layer in range(shape.num_hidden_layers + shape.num_nextn_predict_layers):
        stem = f"model.layers.{layer}."
        if layer >= shape.num_hidden_layers:
            yield f"{stem}embed_tokens.weight", shape.vocab_size, hidden, False
            yield f"{stem}shared_head.head.weight", shape.vocab_size, hidden, False
            yield f"{stem}eh_proj.weight", hidden, 2 * hidden, False
        yield f"{stem}self_attn.q_a_proj.weight", shape.q_lora_rank, hidden, True
        yield f"{stem}self_attn.q_b_proj.weight", query, shape.q_lora_rank, True
        yield f"{stem}self_attn.kv_a_proj_with_mqa.weight", shape.kv_lora_rank + shape.qk_rope_head_dim, hidden, True
        up = heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        yield f"{stem}self_attn.kv_b_proj.weight", up, shape.kv_lora_rank, True
        yield f"{stem}self_attn.o_proj.weight", hidden, heads * shape.v_head_dim, True
        if layer < shape.first_k_dense_replace:
            mlps = {"mlp.": shape.intermediate_size}
        else:
            yield f"{stem}mlp.gate.weight", shape.n_routed_experts, hidden, False
            mlps = {f"mlp.experts.{e}.": shape.moe_intermediate_size for e in range(shape.n_routed_experts)}
            mlps["mlp.shared_experts."] = shape.moe_intermediate_size
        for mlp, width in mlps.items():
            yield f"{stem}{mlp}gate_proj.weight", width, hidden, True
            yield f"{stem}{mlp}up_proj.weight", width, hidden, True
            yield f"{stem}{mlp}down_proj.weight", hidden, width, True


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Every tensor of the checkpoint: name, dtype, shape."""
    for name, rows, columns, fp8 in matrices(shape):
        yield name, "F8_E4M3" if fp8 else "BF16", (rows, columns)
        if fp8:
            yield f"{name}_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))
    yield "model.norm.weight", "BF16", (shape.hidden_size,)
    for layer in range(shape.num_hidden_layers + shape.num_nextn_predict_layers):
        stem = f"model.layers.{layer}."
        norms = {"input_layernorm": shape.hidden_size, "post_attention_layernorm": shape.hidden_size}
        norms |= {"self_attn.q_a_layernorm": shape.q_lora_rank, "self_attn.kv_a_layernorm": shape.kv_lora_rank}
        if layer >= shape.num_hidden_layers:
            norms |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), shape.hidden_size)
        for norm, width in norms.items():
            yield f"{stem}{norm}.weight", "BF16", (width,)
        if layer >= shape.first_k_dense_replace:
            yield f"{stem}mlp.gate.e_score_correction_bias", "F32", (shape.n_routed_experts,)


def pools() -> Mapping[str, bytes]:
    """Bytes of each dtype, from which tensors are cut: Gaussian codes and weights, and scales that fit them."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(8 << 20, dtype=np.float32)
    bits = (normal * 0.02).view(np.uint32)
    # E4M3 by cutting float32's mantissa: the codes of 100 x N(0, 1), below 448.
    wide = np.clip(np.abs(normal) * 100, 2.0**-6, 440).astype(np.float32).view(np.uint32)
    codes = ((wide >> 20) - (120 << 3)).astype(np.uint8) | np.where(normal < 0, 0x80, 0).astype(np.uint8)
    scales = (draw.random(1 << 20, dtype=np.float32) + 0.5) * np.float32(2e-4)
    return {"F8_E4M3": codes.tobytes(), "BF16": (bits >> 16).astype(np.uint16).tobytes(), "F32": scales.tobytes()}


def write_checkpoint(folder: Path, shape: Shape, shard_bytes: float = 4.3e9) -> int:
    """Write the checkpoint in shards; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    shards: list[list[Tensor]] = [[]]
    filled, total = 0.0, 0
    for tensor in tensors(shape):
        num_bytes = int(np.prod(tensor[2])) * sizes[tensor[1]]
        if filled + num_bytes > shard_bytes and not tensor[0].endswith("_scale_inv"):
            shards.append([])
            filled = 0.0
        shards[-1].append(tensor)
        filled, total = filled + num_bytes, total + num_bytes
    pool, where, index = pools(), 0, {}
    for number, members in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        header, placed = layout(folder / name, members)
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header)
            for tensor in sorted(placed, key=lambda tensor: placed[tensor].offset):
                stored = placed[tensor]
                index[tensor] = name
                data, left = memoryview(pool[stored.dtype]), stored.num_bytes
                while left:
                    start = where % (len(data) // 2) // 64 * 64
                    left -= file.write(data[start : start + left])
                    where += 1_000_003 * 64
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **shape.__dict__,
        "quantization_config": {**quantization, "weight_block_size": [BLOCK, BLOCK]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def quantize(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """`tafkir quantize` in a process of its own: what it says, its time and the most memory it held."""
    command = [sys.executable, "-m", "tafkir.cli.main", "quantize", str(source), str(out), "--json", *options]
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} failed")
        said.seek(0)
        result = json.loads(said.read())
    return {
        "options": list(options),
        "source_gb": round(result["source_bytes"] / 1e9, 3),
        "output_gb": round(result["output_bytes"] / 1e9, 3),
        "ratio": round(result["source_bytes"] / result["output_bytes"], 4),
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "tafkir-memory")
    parser.add_argument("--preset", default="r1-fp4")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    args = parser.parse_args()
    source, out = args.root / "source", args.root / "out"
    if args.make:
        write_checkpoint(source, Shape())
        return
    try:
        if not source.exists():
            # In a process of its own: what a child inherits from a large parent would count as its memory.
            subprocess.run([sys.executable, __file__, "--root", str(args.root), "--make"], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shards = [file.stat().st_size for file in source.glob("*.safetensors")]
        run = quantize(source, out, "--preset", args.preset)
        written = [file.stat().st_size for file in out.glob("*.safetensors")]
    finally:
        if not args.keep:
            shutil.rmtree(args.root, ignore_errors=True)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "weights": sum(1 for _ in tensors(Shape())) - sum(fp8 for *_, fp8 in matrices(Shape())),
        "source_shards_gb": [round(size / 1e9, 3) for size in sorted(shards)],
        "output_shards_gb": [round(size / 1e9, 3) for size in sorted(written)],
        **run,
    }
    if args.write:
        OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
