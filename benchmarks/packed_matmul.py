"""Products of a few tokens with packed weights, beside `F.linear` in bfloat16 and float32, on one thread.

Every repetition takes each way in turn over as many copies of the matrix as do not fit a cache; ratios are medians
over repetitions, of CPU seconds.

    python benchmarks/packed_matmul.py --out benchmarks/results/packed_matmul.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from tafkir.ops.fp8 import quantize_fp8
from tafkir.ops.integers import quantize_int8
from tafkir.ops.native import select_kernels
from tafkir.ops.nvfp4 import quantize_nvfp4
from tafkir.ops.packed import PackedMatrix, packed_linear


def packed_forms(weight: torch.Tensor) -> dict[str, PackedMatrix]:
    """A matrix in every format."""
    int8, int8_scale = quantize_int8(weight)
    fp8, fp8_scale = quantize_fp8(weight, "row")
    nvfp4, scale, total = quantize_nvfp4(weight)
    tile = (1, weight.shape[1])
    return {
        "packed float32": PackedMatrix("float32", weight),
        "packed bfloat16": PackedMatrix("bfloat16", weight.bfloat16()),
        "packed int8": PackedMatrix("int8", int8, int8_scale.float(), tile=tile),
        "packed fp8": PackedMatrix("fp8", fp8, fp8_scale.float().reshape(-1, 1).contiguous(), tile=tile),
        "packed nvfp4": PackedMatrix("nvfp4", nvfp4, scale, float(total)),
    }


def copied(matrix: PackedMatrix, count: int) -> list[PackedMatrix]:
    """So many of it, each in memory of its own."""
    scales = matrix.scales
    return [
        PackedMatrix(
            matrix.format, matrix.codes.clone(), None if scales is None else scales.clone(), matrix.total, matrix.tile
        )
        for _ in range(count)
    ]


def measure(rows: int, columns: int, tokens: int, copies: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a product, and how many times faster than `F.linear` in bfloat16, by the name of the way."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    half = x.bfloat16()
    forms = {name: copied(matrix, copies) for name, matrix in packed_forms(weight).items()}
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "F.linear bfloat16": lambda i: F.linear(half, forms["packed bfloat16"][i].codes),
        "F.linear float32": lambda i: F.linear(x, forms["packed float32"][i].codes),
        **{name: lambda i, name=name: packed_linear(x, [forms[name][i]]) for name in forms},  # type: ignore[misc]
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            for i in range(copies):
                way(i)
            if repeat:  # the first one warms up
                seconds[name].append((time.process_time() - began) / copies)
    base = seconds["F.linear bfloat16"]
    return {
        name: {
            "microseconds": round(1e6 * statistics.median(taken), 1),
            "times_bfloat16_linear": round(
                statistics.median(b / t for b, t in zip(base, taken, strict=True)), 2
            ),
        }
        for name, taken in seconds.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x768"], help="rows x columns")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    select_kernels("native")
    results = []
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        for tokens in args.tokens:
            ways = measure(rows, columns, tokens, args.copies, args.repeats)
            results.append({"shape": shape, "tokens": tokens, "ways": ways})
            said = ", ".join(f"{name} {way['times_bfloat16_linear']:.2f}x" for name, way in ways.items())
            sys.stdout.write(f"{shape}, {tokens} tokens: {said}\n")
            sys.stdout.flush()
    report = {"torch": torch.__version__, "machine": platform.machine(), "repeats": args.repeats, "results": results}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
