"""How a model is laid out over chips, and the bytes that lie on one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

from tafkir.errors import RecipeError
from tafkir.plan.precision import Precision, mtp_bytes, part_bytes
from tafkir.plan.shapes import ModelShape

__all__ = ["Layout", "cache_bytes", "check_layout", "parse_layout", "weight_bytes_per_chip"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One replica.

    Attributes:
        tp: chips that split attention's heads and the dense matrices. pp: pipeline stages.
        dp: groups that hold attention in copies and share the experts (attention data parallelism).
        ep: groups that the experts are divided among; the `tp * dp / ep` chips of a group split each of them.
        cp: chips that split the cache of one sequence, and matrices as tensor parallelism does (vLLM's decode context
            parallelism, whose tensor-parallel size is `tp * cp`).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def moe_tp(self) -> int:
        """Chips that split one expert."""
        return max(1, self.tp * self.dp * self.cp // self.ep)

    def __str__(self) -> str:
        sizes = (("TP", self.tp), ("PP", self.pp), ("DP", self.dp), ("EP", self.ep), ("CP", self.cp))
        return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "one chip"


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Refuse what does not divide. Experts may: the groups that would hold fewer hold copies of busy ones instead.

    Raises:
        RecipeError: heads, experts, layers or chips do not split evenly; the message says which.
    """
    experts = max(1, shape.num_experts)
    across = layout.tp * layout.dp * layout.cp
    wide = layout.tp * layout.cp
    rules = (
        (shape.num_heads % wide == 0, f"{shape.num_heads} heads", f"TP{' x CP' * (layout.cp > 1)} {wide}"),
        (shape.num_layers >= layout.pp, f"{shape.num_layers} layers", f"PP {layout.pp}"),
        (layout.ep == 1 or shape.num_experts > 0, "a dense model's layers", f"EP {layout.ep}"),
        (layout.ep <= experts, f"{shape.num_experts} experts", f"EP {layout.ep}"),
        (across % layout.ep == 0, f"TP x DP {across}", f"EP {layout.ep}"),
    )
    for holds, what, by in rules:
        if not holds:
            raise RecipeError(f"{what} do not divide by {by}", where="--layout", fix="choose sizes that divide")


def parse_layout(text: str) -> Layout:
    """A layout as people write it: `tp8,ep8`, `tp2 pp2`.

    Raises:
        RecipeError: a word is no size.
    """
    sizes: dict[str, int] = {}
    for word in text.lower().replace(",", " ").split():
        found = re.fullmatch(r"(tp|pp|dp|ep|cp)=?([1-9]\d*)", word)
        if not found or found[1] in sizes:
            raise RecipeError(f"{word!r} is no size", where=f"--layout {text}", expected="sizes such as tp8,ep8")
        sizes[found[1]] = int(found[2])
    return Layout(**sizes)


def weight_bytes_per_chip(
    shape: ModelShape, precision: Precision, layout: Layout, *, speculative: bool = False
) -> dict[str, float]:
    """Bytes of weights on one chip by part.

    Latent attention's way down lies on every tensor-parallel chip; norms and routers do, too. The first and the last
    stage of a pipeline hold the tables, so they are not divided by it.

    Args:
        speculative: with the multi-token-prediction layers.
    """
    parts = part_bytes(shape, precision)
    wide = layout.tp * layout.cp
    split = wide * layout.pp
    copied = shape.attention_copied * precision.attention
    # As DeepSeek serves V3 on 144 chips: 288 places for 256 experts.
    places = ceil(shape.num_experts / layout.ep) / shape.num_experts if shape.num_experts else 0.0
    held = {
        "attention": (parts["attention"] - copied) / split + copied / layout.pp,
        "dense": parts["dense"] / split,
        "shared experts": parts["shared experts"] / split,
        "routed experts": parts["routed experts"] * places / (layout.moe_tp * layout.pp),
        "routers and norms": parts["routers and norms"] / layout.pp,
        "embeddings": parts["embeddings"] / wide / min(layout.pp, 2),
    }
    if speculative and shape.mtp:
        held["multi-token prediction"] = mtp_bytes(shape, precision) / (layout.tp * layout.dp * layout.cp)
    return held


def cache_bytes(shape: ModelShape, layout: Layout, tokens: float, dtype_bytes: float) -> float:
    """Bytes of one sequence's cache on one chip of the group that holds it.

    Keys and values split over tensor-parallel chips as far as there are heads; latents lie on each of them in full.
    """
    shards = 1 if shape.mixer == "mla" else min(layout.tp, shape.num_kv_heads)
    return shape.sequence_bytes(tokens, dtype_bytes) / (shards * layout.pp * layout.cp)
