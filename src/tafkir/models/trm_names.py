"""The official names of TRM's and HRM's weights, and what of a network's shape they tell.

Source: SamsungSAILMontreal/TinyRecursiveModels and sapientinc/HRM, whose checkpoints are state dicts of a compiled
module in a loss head: every name begins with `_orig_mod.model.inner.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tafkir.errors import CheckpointError
from tafkir.recipe.trm import TrmShape

__all__ = ["OFFICIAL_PREFIX", "official_name", "official_names", "shape_from_official", "without_prefix"]

OFFICIAL_PREFIX = "_orig_mod.model.inner."

# By the beginnings of names; the longest that fits counts.
_TABLE = {
    "embed_tokens.weight": "embed_tokens.embedding_weight",
    "embed_positions.weight": "embed_pos.embedding_weight",
    "puzzle_table.weight": "puzzle_emb.weights",
    "lm_head.": "lm_head.",
    "q_head.": "q_head.",
    "y_init": "H_init",
    "z_init": "L_init",
    "network.": "L_level.",
    "answer_network.": "H_level.",
}
_SUBLAYERS = {"attention.": "self_attn.", "token_mlp.": "mlp_t.", "mlp.": "mlp."}
_LAYER = re.compile(r"(layers\.\d+\.)(\w+\.)(.+)")
# Some wrappers put fewer of these before a name.
_WRAPPERS = ("_orig_mod.", "model.", "inner.")


def official_name(name: str) -> str:
    """Their name, without the prefix, of a tensor of ours."""
    ours = max((start for start in _TABLE if name.startswith(start)), key=len)
    theirs, rest = _TABLE[ours], name.removeprefix(ours)
    layer = _LAYER.fullmatch(rest)
    return theirs + (f"{layer[1]}{_SUBLAYERS[layer[2]]}{layer[3]}" if layer else rest)


def official_names(names: list[str], shape: TrmShape) -> dict[str, str]:
    """Their name of each of our tensors; a model with a single latent has one start vector there."""
    return {name: official_name(name) for name in names if not (shape.latents == "z" and name == "y_init")}


def without_prefix(name: str) -> str:
    """A name without what the wrappers of the reference put before it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def shape_from_official(sizes: Mapping[str, tuple[int, ...]], **known: Any) -> TrmShape:
    """The shape that tensors of these sizes belong to.

    What weights do not show is the reference's default where `known` does not say it: 8 heads, T = 3, n = 6, N_sup =
    16, a prefix of 16 positions (1 in HRM), SwiGLU widths in steps of 256; and the length of an attention model,
    which RoPE leaves open (81).

    Args:
        sizes: of every tensor, by its official name without prefix.
        known: values of `TrmShape` that are known otherwise.

    Raises:
        CheckpointError: tensors are missing that every model has, or `known` contradicts them.
    """
    for name in ("embed_tokens.embedding_weight", "L_level.layers.0.mlp.down_proj.weight"):
        if name not in sizes:
            raise CheckpointError("is not there: not a TRM or HRM checkpoint", where=name)
    vocab_size, hidden_size = sizes["embed_tokens.embedding_weight"]
    hrm = any(name.startswith("H_level.") for name in sizes)
    layers = {name.split(".")[2] for name in sizes if name.startswith("L_level.layers.")}
    mixing = sizes.get("L_level.layers.0.mlp_t.down_proj.weight")
    positions = mixing or sizes.get("embed_pos.embedding_weight")
    ids, width = sizes.get("puzzle_emb.weights", (1, 0))
    prefix = known.get("prefix_length", -(-width // hidden_size) if hrm or not width else 16)
    # A model that sees one fixed number of positions shows it.
    length = positions[0] - prefix if positions else known.get("sequence_length", 81)
    shown = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "mixer": "mlp" if mixing else "attention",
        "puzzle_embedding_size": width,
        "num_puzzle_ids": ids,
        "prefix_length": prefix,
        "sequence_length": length,
        "separate_networks": hrm,
        "latents": "z" if "H_init" not in sizes else "yz",
    }
    if "embed_pos.embedding_weight" in sizes:
        shown["position_encoding"] = "learned"
    for key, value in shown.items():
        if known.get(key, value) != value:
            raise CheckpointError(f"{key} is {value} by the weights", where=key, expected=str(known[key]))
    usual = {"gradient": "one_step", "num_recursions": 2, "num_latent_steps": 2} if hrm else {}
    return TrmShape(**{**usual, **known, **shown})
