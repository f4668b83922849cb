"""What only a GPU can show: the Triton kernels against torch on it, and decode tokens/s with and without CUDA graphs,
in bfloat16 and with NVFP4 weights.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json     # a quarter of an hour on one H100
    python benchmarks/gpu_decode.py --check                                      # the comparisons alone

Weights are random (`--layers`, `--experts`, `--hidden` choose the mixture of experts), prompts random ids, answers
greedy; tokens/s are those of steps after the first token, medians over turns in which the ways alternate. Ratios stand
beside bfloat16 without graphs in the same run. Exit code 1: a kernel strays from its reference, or graphs from plain
steps. TRITON_INTERPRET=1 with `--device cpu --check` runs the same comparisons through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.checkpoint import save_checkpoint
from tafkir.checkpoint.packed import load_packed
from tafkir.engine.paged_engine import PagedEngine
from tafkir.errors import BackendUnavailable
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.on_device import move_to_device
from tafkir.ops.moe import moe_experts_reference
from tafkir.ops.nvfp4 import quantize_nvfp4
from tafkir.ops.nvfp4_rows import Nvfp4Rows, nvfp4_rows, rows_values, stacked_rows
from tafkir.ops.nvfp4_scaled import require_scaled_products, scaled_linear, scaled_linear_reference, scaled_weight
from tafkir.ops.packed import PackedMatrix
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.records import Request, SamplingParams

# Of the largest number of the result: bfloat16 operands and results, float32 sums; experts round three times.
BOUND, EXPERTS_BOUND = 2.0**-7, 2.0**-6
BLOCK = 16


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(seed: int, rows: int, columns: int, device: torch.device) -> Nvfp4Rows:
    codes, scale, total = quantize_nvfp4(normal(seed, rows, columns) * columns**-0.5)
    return Nvfp4Rows(*(x.to(device) for x in nvfp4_rows([PackedMatrix("nvfp4", codes, scale, float(total))])))


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest error, against the largest number; not a number counts as infinite."""
    error = (found.float() - expected).abs().amax() / expected.abs().amax()
    return float(error) if bool(error.isfinite()) else float("inf")


def check_products(device: torch.device, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from tafkir.ops.triton.packed_linear import nvfp4_linear

    try:
        require_scaled_products(device)
        has_scaled = True
    except BackendUnavailable as error:
        has_scaled = False
        print(f"scaled_linear is left out: {error}")
    for rows, columns in sizes["matrices"]:
        weight = rows_of(rows, rows, columns, device)
        for tokens in sizes["tokens"]:
            x = normal(tokens, tokens, columns).to(device, torch.bfloat16)
            error = worst(nvfp4_linear(x, weight), F.linear(x.float(), rows_values(weight)))
            yield {"kernel": "nvfp4_linear", "shape": [tokens, rows, columns], "error": error}
            if not has_scaled:
                continue
            found, expected = scaled_linear(x, scaled_weight(weight)), scaled_linear_reference(x.float(), weight)
            yield {"kernel": "scaled_linear", "shape": [tokens, rows, columns], "error": worst(found, expected)}


def check_experts(device: torch.device, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from tafkir.ops.triton.experts import moe_experts

    num, active, hidden, width = sizes["experts"]
    stacks = (
        stacked_rows([rows_of(2 * e, 2 * width, hidden, device) for e in range(num)]),
        stacked_rows([rows_of(2 * e + 1, hidden, width, device) for e in range(num)]),
    )
    values = [rows_values(stack) for stack in stacks]
    for tokens in sizes["tokens"]:
        x = normal(tokens, tokens, hidden).to(device, torch.bfloat16)
        share, ids = normal(tokens + 1, tokens, num).to(device).softmax(-1).topk(active)
        half = [v.bfloat16() for v in values]
        for name, weights, exact in (("bfloat16", half, [v.float() for v in half]), ("nvfp4", stacks, values)):
            expected = moe_experts_reference(x.float(), *exact, ids, share)
            error = worst(moe_experts(x, *weights, ids, share), expected)
            yield {"kernel": f"moe_experts {name}", "shape": [tokens, num, active, hidden, width], "error": error}


def check_attention(device: torch.device, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from tafkir.ops.triton.paged_attention import paged_attention

    for heads, kv_heads, dim in sizes["attention"]:
        positions = torch.tensor(sizes["positions"])
        blocks = int(positions.max()) // BLOCK + 2
        tables = torch.randperm(len(positions) * blocks, generator=torch.Generator().manual_seed(0))
        tables = tables.view(len(positions), blocks).to(device)
        keys, values = (normal(i, tables.numel() * BLOCK, kv_heads, dim).to(device, torch.bfloat16) for i in range(2))
        q = normal(2, len(positions), heads, dim).to(device, torch.bfloat16)
        expected = []
        for row, last in enumerate(positions.tolist()):
            place = torch.arange(last + 1, device=device)
            slot = tables[row, place // BLOCK] * BLOCK + place % BLOCK
            k, v = (
                pool[slot].float().transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for pool in (keys, values)
            )
            weight = (q[row].float().unsqueeze(1) @ k.transpose(1, 2) * dim**-0.5).softmax(-1)
            expected.append((weight @ v).squeeze(1))
        found = paged_attention(q, keys, values, tables, positions.to(device), BLOCK)
        yield {
            "kernel": "paged_attention",
            "shape": [len(positions), heads, kv_heads, dim, int(positions.max())],
            "error": worst(found, torch.stack(expected)),
        }


def config_of(args: argparse.Namespace, *, tiny: bool) -> ModelConfig:
    hidden, layers, experts = (64, 2, 8) if tiny else (args.hidden, args.layers, args.experts)
    return ModelConfig(
        vocab_size=512 if tiny else 32768,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4 if tiny else hidden // 128,
        num_key_value_heads=2 if tiny else 4,
        head_dim=16 if tiny else 128,
        intermediate_size=2 * hidden,
        moe_intermediate_size=32 if tiny else 768,
        num_experts=experts,
        num_experts_per_tok=2 if tiny else 8,
        max_position_embeddings=4096,
    )


def decoders_of(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Decoder]:
    """The same weights in bfloat16, and in NVFP4 wherever they are matrices of layers."""
    with tempfile.TemporaryDirectory() as folder:
        source, coded = Path(folder) / "bfloat16", Path(folder) / "nvfp4"
        save_checkpoint(source, build_decoder(config, 0), dtype=torch.bfloat16)
        quantize_checkpoint(source, coded, QuantizeConfig(preset="all-linear"))
        found = {path.name: load_packed(path, verify_hashes=False).decoder for path in (source, coded)}
        return {name: move_to_device(decoder, device, dtype=dtype, kernels="triton") for name, decoder in found.items()}


def engine_of(decoder: Decoder, rows: int, graphs: bool) -> PagedEngine:
    engine = PagedEngine(decoder, eos_ids=(), max_batch=rows, static_steps=graphs, prefix_caching=False)
    if engine._cache.kernel is None:
        from tafkir.ops.triton.paged_attention import paged_attention

        engine._cache.kernel = paged_attention
    return engine


def requests_of(rows: int, prompt: int, output: int, vocab: int, seed: int) -> list[Request]:
    ids = torch.randint(0, vocab, (rows, prompt), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Request(str(i), tuple(row), SamplingParams(temperature=0, max_tokens=output)) for i, row in enumerate(ids)]


def check_engine(device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Static steps (on CUDA: graphs) against plain ones in float32: the same tokens."""
    config, shape = config_of(args, tiny=True), (3, 20, 24) if device.type == "cuda" else (2, 5, 3)
    for name, decoder in decoders_of(config, device, torch.float32).items():
        asked = requests_of(*shape, config.vocab_size, 0)
        found = []
        for static in (False, True):
            engine = engine_of(decoder, 4, static)
            found.append({done.request_id: done.token_ids for done in engine.complete(asked)})
        yield {"kernel": f"static steps {name}", "shape": list(shape), "error": float(found[0] != found[1])}


def decode_rate(engine: PagedEngine, rows: int, args: argparse.Namespace, seed: int, wait: Callable[[], None]) -> float:
    """Tokens a second of the steps in which all rows decode."""
    vocab = engine.decoder.config.vocab_size
    for request in requests_of(rows, args.prompt, args.output, vocab, seed):
        engine.add_request(request)
    while engine.num_waiting or engine._prefilling:
        engine.step()
    wait()
    began, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += len(engine.step())
    wait()
    return tokens / (time.perf_counter() - began)


def measure(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    cells = []
    decoders = decoders_of(config_of(args, tiny=False), device, torch.bfloat16)
    for rows in args.rows:
        ways = {
            (name, graphs): engine_of(decoder, rows, graphs) for name, decoder in decoders.items() for graphs in (0, 1)
        }
        rates: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        for repeat in range(args.repeats + 1):
            for way in sorted(ways, reverse=bool(repeat % 2)):
                rate = decode_rate(ways[way], rows, args, repeat, torch.cuda.synchronize)
                if repeat:  # the first one compiles and captures
                    rates[way].append(rate)
            print(f"{rows} sequences: turn {repeat} of {args.repeats}", file=sys.stderr)
        base = rates["bfloat16", 0]
        for (name, graphs), found in rates.items():
            cells.append(
                {
                    "sequences": rows,
                    "weights": name,
                    "graphs": bool(graphs),
                    "tokens_per_s": round(statistics.median(found), 1),
                    "spread": round((max(found) - min(found)) / statistics.median(found), 3),
                    "times_plain_bfloat16": round(
                        statistics.median(a / b for a, b in zip(found, base, strict=True)), 2
                    ),
                }
            )
    return cells


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: torch finds no CUDA device. Expected: a machine with one. Fix: run this there, after "
            "`make install TORCH=cu130`"
        )
    if name == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("error: Triton has no processor. Fix: set TRITON_INTERPRET=1, with --check")
    return torch.device(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    for name, value in {
        "hidden": 2048, "layers": 8, "experts": 64, "prompt": 128, "output": 128, "repeats": 5,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    device = device_of(args.device)
    small = {"tokens": (1, 5), "matrices": ((40, 64),), "experts": (4, 2, 32, 48), "attention": ((4, 2, 16),)}
    large = {
        "tokens": (1, 2, 16, 33, 64, 300),
        "matrices": ((4096, 2048), (2048, 6144), (1000, 512)),
        "experts": (64, 8, 2048, 768),
        "attention": ((16, 4, 128), (32, 8, 64), (6, 2, 80)),
    }
    sizes = large | {"positions": (0, 15, 63, 500, 4000)} if args.device == "cuda" else small | {"positions": (0, 40)}
    checks = []
    for check in (check_products, check_experts, check_attention):
        checks += list(check(device, sizes))
    checks += list(check_engine(device, args))
    failed = [row for row in checks if not row["error"] <= (EXPERTS_BOUND if "experts" in row["kernel"] else BOUND)]
    for row in checks:
        print(f"{row['kernel']:24} {row['shape']!s:32} {row['error']:.1e} {'FAILED' if row in failed else 'ok'}")
    cells = [] if args.check else measure(device, args)
    for cell in cells:
        print(json.dumps(cell))
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "Triton's interpreter"
    if args.out:
        found = {"device": name, "torch": torch.__version__, "arguments": vars(args) | {"out": None}}
        args.out.write_text(json.dumps({**found, "checks": checks, "cells": cells}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
