"""Which tensor gets which number format: every tensor of a checkpoint has a component, and every component a format."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tafkir.errors import CheckpointError, RecipeError
from tafkir.recipe.quantize import Component, FormatName, LayoutName, QuantizeConfig

__all__ = ["Decision", "component_of", "decide", "layer_of", "sibling_group"]

# The names of transformers' checkpoints; the first that matches counts. The rest of a name, behind `model.layers.N.`.
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
_MTP = re.compile(r"(?:model\.)?mtp\.(?:layers\.\d+\.)?(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_PROJECTION = r"(gate|up|down|gate_up)_proj\.weight"
_ATTENTION = r"(self_attn|attention|attn)\."
_INNER: tuple[tuple[Component, str], ...] = (
    ("hyper_connections", r"(.*\.)?(hc_\w+|\w+_hc\.\w+|hc_head\.\w+|(attention_|mlp_)?residual\..+)"),
    ("norm", r"(.*\.)?(\w*norm\w*)\.(weight|bias)|.*\b(enorm|hnorm)\.weight"),
    ("attention_indexer", _ATTENTION + r"indexer\..+"),
    ("bias", _ATTENTION + r"(\w+\.bias|sinks)|mlp\.((.*_proj)\.bias|experts\.\w+_proj_bias)"),
    ("attention_kv_b", _ATTENTION + r"kv_b_proj\.weight"),
    ("attention_out", _ATTENTION + r"(o_proj|dense|wo)\.weight"),
    ("attention", _ATTENTION + r"((q|k|v|qkv|q_a|q_b|kv_a)_proj|kv_a_proj_with_mqa|query_key_value)\.weight"),
    ("router", r"(mlp|block_sparse_moe)\.(gate|router)\.\w+|mlp\.shared_expert_gate\.weight"),
    ("experts", r"(mlp|block_sparse_moe)\.experts\.(\d+\.(" + _PROJECTION + r"|w[123]\.weight)|(gate_up|down)_proj)"),
    ("shared_experts", r"mlp\.shared_experts?\." + _PROJECTION),
    ("mlp", r"mlp\." + _PROJECTION),
    ("mtp", r"(eh_proj|fc|proj)\.weight"),
    ("embedding", r"embed_tokens\.weight"),
    ("head", r"(shared_head\.head|lm_head)\.weight"),
)
_OUTER: tuple[tuple[Component, str], ...] = (
    ("hyper_connections", r"(.*\.)?(hc_head\.hc_\w+|hc_\w+|residual\..+)"),
    ("embedding", r"(model\.)?(language_model\.)?(model\.)?(embed_tokens|word_embeddings)\.weight"),
    ("head", r"(lm_head|score|output)\.(weight|bias)"),
    ("norm", r"(model\.)?(language_model\.)?(model\.)?\w*norm\w*\.(weight|bias)"),
)
_INNER_RULES = tuple((part, re.compile(pattern)) for part, pattern in _INNER)
_OUTER_RULES = tuple((part, re.compile(pattern)) for part, pattern in _OUTER)
_MATRICES: frozenset[Component] = frozenset(
    {"attention", "attention_kv_b", "attention_out", "mlp", "experts", "shared_experts"}
)
# Engines read each of these sets as one matrix, with one global scale.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_SIBLING_OF = {name: "+".join(group) for group in _SIBLINGS for name in group}
_GROUPED: Mapping[str, int] = {"nvfp4": 16, "nvfp4_w4a16": 16, "mxfp4": 32, "mxfp8": 32, "int4": 128}


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor.

    Attributes:
        name: of the tensor in the source.
        component: what it is.
        format: what it becomes.
        shape: of the tensor.
        reason: why it is not what the policy says, where it is not; else empty.
    """

    name: str
    component: Component
    format: FormatName
    shape: tuple[int, ...]
    reason: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def component_of(name: str, num_layers: int) -> Component:
    """What a tensor is, by its name.

    Args:
        name: as in the checkpoint.
        num_layers: decoder layers; what stands behind them is multi-token prediction.

    Raises:
        CheckpointError: no rule names it; a tensor is never left out by accident.
    """
    layer, mtp = _LAYER.fullmatch(name), _MTP.fullmatch(name)
    rest = mtp[1] if mtp else layer[2] if layer else name
    part = _part_of(_EXPERT.sub(".experts.0.", rest), bool(layer or mtp))
    if part is None:
        raise CheckpointError(
            "no rule of quantization names this tensor",
            where=name,
            fix="say what becomes of it: --rule 'PATTERN=keep'",
        )
    extra = bool(mtp) or (layer is not None and int(layer[1]) >= num_layers)
    return "mtp" if extra and part in _MATRICES else part


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor is in, by its name; None outside of layers."""
    found = _LAYER.fullmatch(name)
    return int(found[1]) if found else None


@functools.cache
def _part_of(rest: str, inner: bool) -> Component | None:
    """Cached, because a large checkpoint has the same few names in every layer and expert."""
    rules = _INNER_RULES if inner else _OUTER_RULES
    return next((part for part, pattern in rules if pattern.fullmatch(rest)), None)


def sibling_group(name: str) -> str:
    """A key that is equal for tensors that share one global scale: q/k/v, gate/up, MLA's two maps down."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{_SIBLING_OF.get(last, last)}"


def decide(shapes: Mapping[str, Sequence[int]], config: QuantizeConfig, num_layers: int) -> list[Decision]:
    """What becomes of every tensor of a checkpoint.

    Args:
        shapes: of every tensor, by name.
        config: preset and rules.
        num_layers: decoder layers.

    Raises:
        CheckpointError: no rule names a tensor.
        RecipeError: a rule matches nothing, or asks for a format that a tensor cannot have.
    """
    if config.auto is not None:
        raise RecipeError(
            "the formats are still to be chosen", where="quantize.auto", fix="run `tafkir quantize --auto`"
        )
    used: set[int] = set()
    decisions = []
    for name, shape in shapes.items():
        asked = None
        for index, rule in enumerate(config.rules):
            if fnmatchcase(name, rule.tensors):
                used.add(index)
                asked = asked or rule
        try:
            part: Component = component_of(name, num_layers)
        except CheckpointError:
            if asked is None:
                raise
            part = "other"
        format = asked.format if asked else config.component_formats[part]
        obstacle = "" if format == "keep" else _obstacle(name, tuple(shape), format, config.layout)
        if obstacle and asked:
            raise RecipeError(f"{name} cannot be {format}: {obstacle}", where=f"rule {asked.tensors}={asked.format}")
        decisions.append(Decision(name, part, "keep" if obstacle else format, tuple(shape), obstacle))
    for index, rule in enumerate(config.rules):
        if index not in used:
            raise RecipeError(
                "the rule matches no tensor",
                where=f"rule {rule.tensors}={rule.format}",
                expected=f"a pattern over names such as {next(iter(shapes), 'none')}",
            )
    return _same_in_groups(decisions)


def _obstacle(name: str, shape: tuple[int, ...], format: FormatName, layout: LayoutName) -> str:
    if layout == "gpt-oss":
        if len(shape) != 3 or name.endswith((".weight", "bias")):
            return "gpt-oss packs stacks of experts alone"
        return f"columns of {shape[1]} do not split into blocks of 32" if shape[1] % 32 else ""
    if len(shape) != 2:
        return f"its shape is {list(shape)}"
    size = _GROUPED.get(format)
    if size and shape[1] % size:
        return f"rows of {shape[1]} do not split into blocks of {size}"
    return ""


def _same_in_groups(decisions: list[Decision]) -> list[Decision]:
    """Refuse siblings in different formats: no engine could read them as one matrix."""
    first: dict[str, Decision] = {}
    for decision in decisions:
        if not decision.name.endswith(".weight"):
            continue
        sibling = first.setdefault(sibling_group(decision.name), decision)
        if sibling.format != decision.format:
            raise RecipeError(
                f"{sibling.name} would be {sibling.format}, and {decision.name} {decision.format}",
                where="rules",
                expected="one format for matrices that engines read as one",
                fix="let the pattern match all of them",
            )
    return decisions
