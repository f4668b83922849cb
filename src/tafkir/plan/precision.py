"""What a precision means for a checkpoint: which parts it shrinks, to how many bytes, and what is multiplied."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tafkir.errors import RecipeError
from tafkir.plan.shapes import ModelShape

__all__ = ["PRECISIONS", "Precision", "checkpoint_bytes", "find_precision", "part_bytes"]


@dataclass(frozen=True, slots=True)
class Precision:
    """A format of weights.

    Attributes:
        name: what `--precision` calls it.
        computes: number format that the shrunk parts are multiplied in; the rest is in `rest_computes`.
        experts: bytes of a parameter of MLPs and experts, scales included.
        attention: the same of attention's matrices. attention_out: of its output projections.
        mtp: the same of the linear maps inside multi-token-prediction blocks.
        what: one line for people.
    """

    name: str
    computes: str
    rest_computes: str
    experts: float
    attention: float
    attention_out: float
    mtp: float
    what: str


# A float32 scale per block of 128 x 128; one byte of scale per 16 weights; a bfloat16 scale per 128.
_FP8 = 1 + 4 / 128**2
_NVFP4 = 0.5 + 1 / 16
_INT4 = 0.5 + 2 / 128

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "fp32", "fp32", 4.0, 4.0, 4.0, 4.0, "everything in four bytes (this machine's CPU)"),
        Precision("bf16", "bf16", "bf16", 2.0, 2.0, 2.0, 2.0, "everything in two bytes"),
        Precision("fp8", "fp8", "fp8", _FP8, _FP8, _FP8, _FP8, "DeepSeek's blocks of 128 x 128; tables stay bf16"),
        Precision("int8", "int8", "int8", 1.0, 1.0, 1.0, 1.0, "one scale a row; tables stay bf16"),
        Precision("nvfp4", "fp4", "bf16", _NVFP4, 2.0, _NVFP4, 2.0, "NVIDIA's v2: MLPs, experts, o_proj; rest bf16"),
        Precision("nvfp4-v1", "fp4", "bf16", _NVFP4, 2.0, 2.0, 2.0, "NVIDIA's v1: MLPs and experts; rest bf16"),
        Precision("w4a16", "bf16", "bf16", _INT4, 2.0, 2.0, 2.0, "four-bit MLPs and experts, multiplied in bf16"),
    )
}
"""Every precision by its name."""


def find_precision(name: str) -> Precision:
    """The precision that a person means.

    Raises:
        RecipeError: there is none of that name.
    """
    asked = {"fp4": "nvfp4", "bfloat16": "bf16", "w8a8": "int8", "int4": "w4a16"}.get(name.lower(), name.lower())
    if asked in PRECISIONS:
        return PRECISIONS[asked]
    near = difflib.get_close_matches(asked, PRECISIONS, n=1, cutoff=0.4)
    raise RecipeError(
        "no such precision",
        where=f"--precision {name}",
        expected=f"one of {', '.join(PRECISIONS)}",
        fix=f"did you mean {near[0]}?" if near else None,
    )


def part_bytes(shape: ModelShape, precision: Precision) -> dict[str, float]:
    """Bytes of the stored weights by part, without the multi-token-prediction layers.

    Embedding tables, routers, norms and residual mappings stay in bfloat16 (float32 with `fp32`).
    """
    rest = 4.0 if precision.name == "fp32" else 2.0
    kept = shape.attention - shape.attention_out
    return {
        "attention": kept * precision.attention + shape.attention_out * precision.attention_out,
        "dense": shape.dense * precision.experts,
        "shared experts": shape.shared * precision.experts,
        "routed experts": shape.routed * precision.experts,
        "routers and norms": (shape.router + shape.other) * rest,
        "embeddings": shape.embeddings * rest,
    }


def checkpoint_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of a checkpoint as it is published: with its multi-token-prediction layers, and their copies of tables."""
    return sum(part_bytes(shape, precision).values()) + mtp_bytes(shape, precision)


def mtp_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes that the multi-token-prediction layers add to a checkpoint."""
    rest = 4.0 if precision.name == "fp32" else 2.0
    copies = 2 * shape.table * shape.mtp_depth if shape.mtp_copies else 0
    return shape.mtp_matrices * precision.mtp + (shape.mtp - shape.mtp_matrices + copies) * rest
