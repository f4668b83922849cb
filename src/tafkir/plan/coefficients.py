"""How far real engines stay behind the data sheet, in a few numbers with a physical meaning, at three levels."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["DATASHEET", "ENGINES", "Coefficients", "fitted_coefficients"]

ENGINES = ("sglang", "trtllm", "vllm")
_TABLE = Path(__file__).resolve().parent / "tables" / "coefficients.toml"


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What turns bytes and FLOPs into seconds.

    Attributes:
        bandwidth_share: of the memory's bandwidth that reading reaches.
        compute_share: of the dense peak that multiplying reaches.
        network_share: of a link's bandwidth that collectives reach.
        layer_s: what a decoder layer takes besides (launches, small kernels, synchronisation), seconds.
        network_hop_s: latency of a message outside of the fast domain, seconds.
        per_sequence_s: scheduling of one sequence in one step, seconds.
        overlap: share of the all-to-all that is hidden behind other work.
        burst: share of a full queue (every user asks at once) that a request meets in the mean.
        request_s: of a request outside of the model: network, tokenizer, scheduling, seconds.
        first_token_steps: by engine, decoding steps until a new prompt is looked at and its first token handed out
            (polling intervals, scheduling that runs ahead, tokens that are streamed in groups).
        source: where they come from.
    """

    bandwidth_share: float
    compute_share: float
    network_share: float
    layer_s: float
    network_hop_s: float
    per_sequence_s: float
    overlap: float
    burst: float
    request_s: float
    first_token_steps: Mapping[str, float]
    source: str


# Kernels and links at what vendors' own tools assume, nothing for what surrounds them.
DATASHEET = Coefficients(
    bandwidth_share=0.8,
    compute_share=0.5,
    network_share=0.8,
    layer_s=0.0,
    network_hop_s=10e-6,
    per_sequence_s=0.0,
    overlap=0.0,
    burst=0.0,
    request_s=0.0,
    first_token_steps=dict.fromkeys(ENGINES, 1.0),
    source="data sheet (aiconfigurator's defaults)",
)
"""A pure roofline; published decode speeds are 1.4 to 6 times slower."""


@cache
def fitted_coefficients() -> Coefficients:
    """The coefficients that `benchmarks/plan_fit.py` fitted on published measurements."""
    table: dict[str, Any] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["fitted"]
    return Coefficients(**{field.name: table[field.name] for field in fields(Coefficients)})
