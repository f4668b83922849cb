"""What quantizing a checkpoint will do, before any of it is done: every tensor, the files it goes to, their sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tafkir.checkpoint.cache_scales import cache_scale_name
from tafkir.checkpoint.files import SINGLE_FILE, StoredFiles
from tafkir.checkpoint.header import DTYPE_BYTES
from tafkir.errors import CheckpointError
from tafkir.quant.formats import Piece, pieces_of
from tafkir.quant.policy import Decision, decide, layer_of, sibling_group
from tafkir.recipe.quantize import LayoutName, QuantizeConfig

__all__ = ["Job", "QuantizePlan", "plan_quantization", "with_cache_scales"]

_SMALL = {"F32", "BF16", "F16"}


@dataclass(frozen=True, slots=True)
class Job:
    """Weights that are read and written together, because they share a global scale or are one alone.

    Attributes:
        decisions: what becomes of each.
        pieces: the tensors that each becomes.
        file: where they are written.
        source_bytes: what is read.
    """

    decisions: tuple[Decision, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    file: str
    source_bytes: int

    @property
    def memory_bytes(self) -> int:
        """About what it holds at once: the weights as BF16 or wider, and what they become."""
        if self.decisions[0].format == "keep":
            return min(sum(p.num_bytes for pieces in self.pieces for p in pieces), 1 << 24)
        return sum(d.numel for d in self.decisions) * 4 + max(sum(p.num_bytes for p in ps) for ps in self.pieces)


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """Every tensor of a checkpoint, in the order of writing.

    Attributes:
        decisions: what becomes of each tensor.
        jobs: the work.
        shards: the files, and the tensors in each.
        dtypes: in which dtype each weight is computed, by header name.
        not_finite: weights with NaN or infinities, which are copied as they are.
        numbers: tensors of one number that are known from the start, by name: scales of the cache.
    """

    decisions: list[Decision]
    jobs: list[Job]
    shards: dict[str, list[Piece]]
    dtypes: dict[str, str]
    not_finite: frozenset[str] = frozenset()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def source_bytes(self) -> int:
        return sum(job.source_bytes for job in self.jobs)

    @property
    def output_bytes(self) -> int:
        return sum(piece.num_bytes for pieces in self.shards.values() for piece in pieces)

    def rows(self) -> list[dict[str, Any]]:
        """The table: for each component and format the number of tensors, parameters, and bytes before and after."""
        rows: dict[tuple[str, str, str], Counter[str]] = {}
        for job in self.jobs:
            for decision, pieces in zip(job.decisions, job.pieces, strict=True):
                row = rows.setdefault((decision.component, decision.format, decision.reason), Counter())
                row["tensors"] += 1
                row["parameters"] += decision.numel
                row["source_bytes"] += job.source_bytes * decision.numel // max(1, sum(d.numel for d in job.decisions))
                row["output_bytes"] += sum(piece.num_bytes for piece in pieces)
        return [
            {"component": part, "format": format, **counts, "reason": reason}
            for (part, format, reason), counts in sorted(rows.items())
        ]


def plan_quantization(
    files: StoredFiles,
    hf_config: Mapping[str, Any],
    config: QuantizeConfig,
    max_shard_bytes: int,
    not_finite: Collection[str] = (),
) -> QuantizePlan:
    """Decide on every tensor of an open checkpoint, and lay out the files; nothing is read but headers.

    Args:
        files: the source.
        hf_config: its config.json.
        config: formats and layout.
        max_shard_bytes: of a file's tensors.
        not_finite: weights with NaN or infinities; they stay as they are, with those that would share a scale.

    Raises:
        CheckpointError: no rule names a tensor, nothing would be quantized, or config.json has no num_hidden_layers.
        RecipeError: a rule matches nothing, or a tensor cannot have the format that is asked for.
    """
    text_config = hf_config.get("text_config") or hf_config
    layers = text_config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise CheckpointError("num_hidden_layers is missing", where=str(files.listing.parent / "config.json"))
    shapes = {name: files.shape(name) for name in files.names}
    decisions = _with_kept(decide(shapes, config, layers), not_finite)
    if all(decision.format == "keep" for decision in decisions):
        raise CheckpointError(
            f"the preset {config.preset!r} quantizes nothing of this checkpoint",
            where=str(files.listing.parent),
            fix="choose another preset: all-linear quantizes every matrix of the layers",
        )
    dtypes = {decision.name: _dtype_of(files, decision.name) for decision in decisions}
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        alone = decision.format == "keep" or not decision.name.endswith(".weight")
        groups.setdefault(decision.name if alone else f"group {sibling_group(decision.name)}", []).append(decision)
    plan = _lay_out(files, groups, decisions, dtypes, config, max_shard_bytes)
    return replace(plan, not_finite=frozenset(not_finite))


def with_cache_scales(
    plan: QuantizePlan, layout: LayoutName, scales: Callable[[int], tuple[float, float]]
) -> QuantizePlan:
    """The plan, and in its last file the scales of every decoder layer's cache.

    Args:
        plan: of the weights.
        layout: whose names and dtypes.
        scales: of a layer's keys and values.
    """
    file, last = list(plan.shards.items())[-1]
    pieces, numbers = [], dict[str, float]()
    for decision in plan.decisions:
        layer = layer_of(decision.name)
        if decision.component != "attention_out" or layer is None:
            continue
        attention = decision.name.removesuffix(".weight").rpartition(".")[0]
        for part, scale in zip(("k", "v"), scales(layer), strict=True):
            name = cache_scale_name(attention, "k" if part == "k" else "v", layout)
            dtype, shape = ("F32", ()) if layout == "modelopt" else (plan.dtypes[decision.name], (1,))
            pieces.append(Piece(name, dtype, shape))
            numbers[name] = scale
    return replace(plan, shards={**plan.shards, file: [*last, *pieces]}, numbers=numbers)


def _with_kept(decisions: list[Decision], not_finite: Collection[str]) -> list[Decision]:
    groups = {sibling_group(name) for name in not_finite}

    def kept(decision: Decision) -> Decision:
        if decision.name in not_finite:
            return replace(decision, format="keep", reason="not finite")
        if decision.format != "keep" and sibling_group(decision.name) in groups:
            return replace(decision, format="keep", reason="shares a scale with one that is not finite")
        return decision

    return [kept(decision) for decision in decisions] if groups else decisions


def _lay_out(
    files: StoredFiles,
    groups: Mapping[str, list[Decision]],
    decisions: list[Decision],
    dtypes: dict[str, str],
    config: QuantizeConfig,
    max_shard_bytes: int,
) -> QuantizePlan:
    shards: list[list[Piece]] = [[]]
    placed: list[tuple[list[Decision], list[tuple[Piece, ...]], int]] = []
    filled = 0
    for members in groups.values():
        pieces = [tuple(pieces_of(d.name, d.shape, d.format, config.layout, dtypes[d.name])) for d in members]
        size = sum(piece.num_bytes for parts in pieces for piece in parts)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += [piece for parts in pieces for piece in parts]
        filled += size
        placed.append((members, pieces, len(shards) - 1))
    total = len(shards)
    names = [SINGLE_FILE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    jobs = [
        Job(tuple(members), tuple(pieces), names[shard], sum(_stored_bytes(files, d.name) for d in members))
        for members, pieces, shard in placed
    ]
    return QuantizePlan(decisions, jobs, dict(zip(names, shards, strict=True)), dtypes)


def _dtype_of(files: StoredFiles, name: str) -> str:
    """In which dtype a weight is computed: its own, and BF16 where it is FP8 or codes."""
    stored = files.tensors.get(name)
    if name in files.encoded or stored is None or stored.dtype == "F8_E4M3":
        return "BF16"
    if stored.dtype not in _SMALL or stored.dtype not in DTYPE_BYTES:
        where: Path = stored.file
        raise CheckpointError(f"dtype is {stored.dtype}", where=f"{where}: {name}", expected="F32, BF16, F16 or FP8")
    return stored.dtype


def _stored_bytes(files: StoredFiles, name: str) -> int:
    parts = files.encoded[name].parts if name in files.encoded else (name, f"{name}_scale_inv")
    return sum(files.tensors[part].num_bytes for part in parts if part in files.tensors)
