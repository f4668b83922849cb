"""Compile the serving kernels for GPUs without having one: Triton needs a device to run, none to compile.

    python tools/compile_triton.py                    # Ampere, Hopper and both Blackwells
    python tools/compile_triton.py --targets hip:gfx942

Prints which tensor-unit instructions each kernel came to and the shared memory of a program. That a kernel compiles
says nothing of its numbers; those are the tests' business.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

DTYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
# Of arguments that are no plain int32, by name; what is not named here and has no constant is one.
FLOATS = {"totals": "*fp32", "routing": "*fp32", "mixed_out": "*fp32", "sums_out": "*fp32", "scale": "fp32"}
WHOLE = dict.fromkeys(("order", "experts", "firsts", "lasts", "tables", "positions"), "*i64")
WIDTH = 64


def kernels() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """(module, kernel, types of pointers, constants)."""
    from tafkir.ops.triton.tiles import tile_depth

    for dtype, own in DTYPES.items():
        exact, data = dtype == "float32", dict.fromkeys(("x", "out", "q", "keys", "values"), own)
        for tokens in (64,) if exact else (16, 64):
            tile = {"exact": exact, "tokens": tokens, "width": WIDTH, "depth": tile_depth(exact)}
            yield "packed_linear", "_linear", {**data, "codes": "*u8", "scales": "*u8"}, tile
            for coded in (False, True):
                weight = dict.fromkeys(("weight", "scales"), "*u8" if coded else own)
                totals = {} if coded else {"totals": own}
                for name in ("_gate_up", "_down"):
                    yield "experts", name, {**data, **weight, **totals}, {**tile, "coded": coded}
        for width in (128,) if exact else (64, 128):
            sizes = {"block": 16, "splits": 4, "exact": exact, "group": 16, "head_width": width, "span": 64}
            yield "paged_attention", "_attend", data, sizes


def target_of(text: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kind, _, name = text.partition(":")
    return GPUTarget("cuda", int(name), 32) if kind == "cuda" else GPUTarget(kind, name, 64)


def compile_for(target: Any, module: str, name: str, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """What came of it, in words."""
    import triton
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"tafkir.ops.triton.{module}"), name)
    types = {**FLOATS, **WHOLE, **pointers}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in function.arg_names}
    found = triton.compile(ASTSource(function, signature, constants), target=target)
    text = found.asm.get("ptx") or found.asm.get("amdgcn") or ""
    units = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_f32_\w+?_(?:bf16|f32)", text)))
    return f"{', '.join(units) or 'no tensor units'}; {found.metadata.shared} bytes shared"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["cuda:80", "cuda:90", "cuda:100", "cuda:120"])
    args = parser.parse_args()
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        print("error: needs the triton package, and TRITON_INTERPRET unset. Fix: pip install triton", file=sys.stderr)
        return 2
    for text in args.targets:
        for module, name, pointers, constants in kernels():
            said = compile_for(target_of(text), module, name, pointers, constants)
            marks = " ".join(f"{key}={value}" for key, value in constants.items())
            print(f"{text:12} {module}.{name:10} {pointers['x'][1:]:5} {marks:72} {said}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
