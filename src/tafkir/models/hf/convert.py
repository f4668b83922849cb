"""Between a decoder's tensors and a checkpoint's, by a family's table: strict, reversible, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.hf.deepseek import DEEPSEEK_V3, DEEPSEEK_V4_STREAMS
from tafkir.models.hf.glm4 import GLM4_MOE
from tafkir.models.hf.ling import LING
from tafkir.models.hf.qwen3 import QWEN3, QWEN3_MOE
from tafkir.models.hf.table import Resolved, StreamTable, WeightRule, WeightTable
from tafkir.recipe.families import FAMILIES
from tafkir.recipe.hf_config import family_of
from tafkir.recipe.model import ModelConfig

__all__ = [
    "TABLES",
    "architecture_of",
    "check_names",
    "drop_absent_mtp",
    "read_hf_tensors",
    "repeated_names",
    "resolve_names",
    "split_pieces",
    "table_for",
    "write_hf_tensors",
]

TABLES: Mapping[str, WeightTable] = {table.name: table for table in (LING, DEEPSEEK_V3, QWEN3, QWEN3_MOE, GLM4_MOE)}
"""The table of every architecture that `recipe.families` describes."""

STREAMS: Mapping[str, StreamTable] = {"deepseek_v4": DEEPSEEK_V4_STREAMS}
"""The names of residual streams, by `ResidualConfig.kind`, where a published architecture has them."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_MTP_BLOCK = re.compile(r"mtp\.layers\.(\d+)\.block\.(.+)")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.(.+)")
# What transformers calls the head of a ...ForSequenceClassification, whatever the family.
_SCORE = WeightRule("score.weight", ("score.weight",))
# Parts of our own, which no architecture has, keep our names; config.json says that they are there.
_OWN = re.compile(r"(attention_residual|mlp_residual|residual)\.")


def architecture_of(hf_config: Mapping[str, Any], where: str) -> WeightTable:
    """The table of names for a config.json.

    Raises:
        CheckpointError: no architecture is named, or one that is not supported.
    """
    return TABLES[family_of(hf_config, where).name]


def table_for(config: ModelConfig) -> WeightTable:
    """The table that a model of this config is written by."""
    return next(TABLES[family.name] for family in FAMILIES.values() if family.model_type == config.model_type)


def drop_absent_mtp(config: ModelConfig, available: Iterable[str]) -> ModelConfig:
    """The config without its multi-token-prediction layers where a checkpoint has none of their tensors.

    transformers leaves them out when it saves a model, but not the key in config.json. Some without the others is
    damage, which reading finds.
    """
    prefix = f"model.layers.{config.num_hidden_layers}."
    if config.mtp is None or any(name.startswith(prefix) for name in available):
        return config
    return config.model_copy(update={"mtp": None})


def resolve_names(decoder: Decoder, table: WeightTable | None = None) -> list[Resolved]:
    """For each tensor of the decoder, the names that it is made of.

    Args:
        table: that of the config's family, unless given.

    Raises:
        CheckpointError: the table has no rule for a tensor.
    """
    table = table or table_for(decoder.config)
    streams = STREAMS.get(decoder.config.residual.kind, StreamTable())
    scopes = {
        "model": {rule.ours: rule for rule in (*table.model, *streams.model)},
        "layer": {rule.ours: rule for rule in (*table.layer, *streams.layer)},
        "mtp": {rule.ours: rule for rule in (*table.mtp, *streams.mtp)},
    }
    resolved = []
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        scope, prefix, rest = _place(name, decoder.config.num_hidden_layers)
        rule = _SCORE if name == _SCORE.ours else scopes[scope].get(rest)
        if rule is None and _OWN.match(rest):
            rule = WeightRule(rest, (rest if prefix else f"model.{rest}",), float32=True)
        if rule is None:
            raise CheckpointError(f"{table.name} has no name for this tensor", where=name)
        stacked = "{expert}" in rule.theirs[0]
        parts = tuple(
            tuple(prefix + theirs.replace("{expert}", str(expert)) for theirs in rule.theirs)
            for expert in range(tensor.shape[0] if stacked else 1)
        )
        rows = rule.rows(decoder.config) if rule.rows else None
        resolved.append(Resolved(name, parts, stacked, rows, rule.float32))
    return resolved


def _place(name: str, num_layers: int) -> tuple[str, str, str]:
    """Which rules hold for a tensor of ours, what stands before its name there, and its name within that scope."""
    for scope, pattern, first in (("layer", _LAYER, 0), ("layer", _MTP_BLOCK, num_layers), ("mtp", _MTP, num_layers)):
        found = pattern.fullmatch(name)
        if found:
            return scope, f"model.layers.{first + int(found[1])}.", found[2]
    return "model", "", name


def split_pieces(tensor: Tensor, names: Resolved) -> Iterator[tuple[str, Tensor]]:
    """Views of a tensor of ours, each with the name of theirs that it is."""
    for parts, piece in zip(names.parts, tensor if names.stacked else [tensor], strict=True):
        chunks = piece.split(list(names.rows)) if names.rows else piece.chunk(len(parts))
        yield from zip(parts, chunks, strict=True)


def repeated_names(decoder: Decoder, table: WeightTable) -> dict[str, tuple[str, bool]]:
    """Tensors that repeat another one: their name, the name of ours, and whether they are written."""
    tied = decoder.lm_head is None
    copies = {"lm_head.weight": ("embed_tokens.weight", False)} if tied else {}
    for k in range(decoder.config.mtp.depth if decoder.config.mtp else 0):
        for theirs, ours in table.mtp_copies.items():
            name = f"model.layers.{decoder.config.num_hidden_layers + k}.{theirs}"
            copies[name] = ("embed_tokens.weight" if tied else ours, True)
    return copies


def write_hf_tensors(
    decoder: Decoder, dtype: torch.dtype, table: WeightTable | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, one at a time, contiguous and on the CPU, in `dtype` (float32 where the rule says so)."""
    table = table or table_for(decoder.config)
    state = decoder.state_dict()
    for names in resolve_names(decoder, table):
        tensor = state[names.name].detach().to("cpu", torch.float32 if names.float32 else dtype)
        for theirs, piece in split_pieces(tensor, names):
            yield theirs, piece.clone(memory_format=torch.contiguous_format)
    for theirs, (ours, written) in repeated_names(decoder, table).items():
        if written:
            yield theirs, state[ours].detach().to("cpu", dtype, copy=True)


@torch.no_grad()
def read_hf_tensors(
    decoder: Decoder,
    available: Iterable[str],
    read: Callable[[str], Tensor],
    table: WeightTable | None = None,
    *,
    read_into: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Fill the decoder from their tensors, one at a time; strict in both directions.

    Args:
        available: names that the checkpoint holds.
        read: gives the tensor of a name; cast to the decoder's dtype on copying.
        read_into: where given, fills a part of the decoder with the tensor of a name instead, without a copy between;
            it casts, and raises a CheckpointError where the shape is another.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or repeat another one with other numbers;
            the message names them.
    """
    table, there = table or table_for(decoder.config), set(available)
    resolved, copies = resolve_names(decoder, table), repeated_names(decoder, table)
    check_names({name for names in resolved for parts in names.parts for name in parts}, there - copies.keys())
    state = decoder.state_dict()
    for names in resolved:
        for theirs, place in split_pieces(state[names.name], names):
            if read_into is not None:
                read_into(theirs, place)
            else:
                place.copy_(_checked(theirs, read(theirs), place))
    for theirs, (ours, _) in copies.items():
        if theirs not in there:
            continue
        original = state[ours]
        if not torch.equal(_checked(theirs, read(theirs), original).to(original), original):
            raise CheckpointError(
                f"differs from {ours}, which it should repeat", where=theirs, fix="take the checkpoint anew"
            )


def _checked(name: str, tensor: Tensor, place: Tensor) -> Tensor:
    if tensor.shape != place.shape:
        raise CheckpointError(
            f"shape is {list(tensor.shape)}",
            where=name,
            expected=f"{list(place.shape)} by config.json",
            fix="use the config.json that belongs to these weights",
        )
    return tensor


def check_names(wanted: set[str], available: set[str]) -> None:
    """Raises CheckpointError that names what is missing and what is left over."""
    missing, extra = sorted(wanted - available), sorted(available - wanted)
    if not missing and not extra:
        return
    problems = []
    for label, names in (("missing", missing), ("not in the model", extra)):
        if names:
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{len(names)} tensors {label}: {', '.join(names[:4])}{rest}")
    raise CheckpointError("; ".join(problems), fix="use the config.json that belongs to these weights")
