"""From the config.json of a Hugging Face checkpoint to a `ModelConfig` and back, strictly. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tafkir.errors import CheckpointError
from tafkir.recipe.families import FAMILIES, Family
from tafkir.recipe.model import ModelConfig, MtpConfig, YarnConfig
from tafkir.recipe.residual import ResidualConfig

__all__ = [
    "OWN_PREFIX",
    "causal_keys",
    "classification_keys",
    "config_from_hf",
    "config_to_hf",
    "family_of",
]

OWN_PREFIX = "Tafkir"
"""Stands before the architecture's name, in lower case before its model type, when a model has parts of our own.

Such a model keeps its family's keys and has one more, `tafkir`, with the tables `residual` and `mtp`. Other programs
do not know the architecture and refuse it, as they should: without those parts it would be another function.
"""

_OWN_KEY = "tafkir"
_CAUSAL, _CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"
_ONE_LABEL: dict[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_MTP_KEY = "num_nextn_predict_layers"
_UNUSED_WITHOUT_EXPERTS = frozenset(
    """moe_intermediate_size num_experts_per_tok num_shared_experts n_group topk_group first_k_dense_replace
    decoder_sparse_step mlp_only_layers routed_scaling_factor norm_topk_prob score_function use_expert_bias""".split()
)


def _architectures(hf_config: Mapping[str, Any]) -> list[str]:
    named = hf_config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else [] if named is None else [str(named)]


def family_of(hf_config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: no architecture is named, or one that is not in `FAMILIES`.
    """
    names = _architectures(hf_config)
    known = [FAMILIES[plain] for name in names if (plain := name.removeprefix(OWN_PREFIX)) in FAMILIES]
    if not known:
        named = ", ".join(names) or f"none (model_type {hf_config.get('model_type')!r})"
        raise CheckpointError(
            f"architecture {named} is not supported",
            where=where,
            expected=f"one of {', '.join(FAMILIES)}",
            fix="choose a checkpoint of a supported architecture",
        )
    return known[0]


def classification_keys(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says instead where the model gives one score instead of a next token."""
    name = str(hf_config["architectures"][0])
    return {"architectures": [name.removesuffix(_CAUSAL) + _CLASSIFICATION], **_ONE_LABEL}


def causal_keys(hf_config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of the language model that a reward model is made of.

    Raises:
        CheckpointError: it is no model with one score.
    """
    names = _architectures(hf_config)
    labels = hf_config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else hf_config.get("num_labels")
    if not names or not names[0].endswith(_CLASSIFICATION) or num_labels != 1:
        raise CheckpointError(
            f"{', '.join(names) or 'no architecture'} with {num_labels} labels is no reward model",
            where=where,
            expected=f"an architecture ...{_CLASSIFICATION} with one label",
            fix="name the checkpoint of a [reward] stage",
        )
    keys = {k: v for k, v in hf_config.items() if k not in ("id2label", "label2id", "num_labels", "problem_type")}
    return keys | {"architectures": [names[0].removesuffix(_CLASSIFICATION) + _CAUSAL]}


def config_from_hf(hf_config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The decoder that a config.json describes.

    Raises:
        CheckpointError: the architecture is not supported, a key is missing or unknown, or a value asks for
            arithmetic that the decoder does not compute.
    """
    family = family_of(hf_config, where)
    keys = _unfold_rope_parameters(hf_config)
    own = _take_own(keys, family, where)
    _take_fixed(keys, family, where)
    ours = _take_fields(keys, family, where)
    ours["rope_scaling"] = _read_rope_scaling(keys.pop("rope_scaling", None), where)
    depth = keys.pop(_MTP_KEY, 0) if family.has_mtp else 0
    ours["mtp"] = own.get("mtp", {"depth": depth} if depth else None)
    if "residual" in own:
        ours["residual"] = own["residual"]
    _check_restated(keys, family, ours, where)
    unknown = sorted(keys.keys() - family.ignored)
    if unknown:
        raise CheckpointError(
            f"unknown keys: {', '.join(unknown)}",
            where=where,
            expected="keys whose effect on the arithmetic is known",
            fix="remove them if they change nothing",
        )
    try:
        return ModelConfig.model_validate(ours)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        raise CheckpointError(f"{name}: {first['msg']}", where=where, fix="correct the file") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json; `config_from_hf` reads it back to a config that computes the same.

    Raises:
        CheckpointError: the family of `model_type` has no keys for what the config asks for.
    """
    family = next(family for family in FAMILIES.values() if family.model_type == config.model_type)
    ours = config.model_dump(mode="json")
    own = _own_tables(config, family)
    prefix = OWN_PREFIX if own else ""
    model_type = family.model_types[0]
    hf: dict[str, Any] = {
        "architectures": [prefix + family.name],
        "model_type": f"{prefix.lower()}_{model_type}" if own else model_type,
    }
    hf |= {key: ours[name] for name, key in family.required.items()}
    for name, (key, _) in family.optional.items():
        # A factor beside `rotary_dim` would mislead programs that look at it first.
        if name == "rotary_dim":
            hf |= {key: config.rotary_dim} if config.rotary_dim is not None else {}
        elif name == "partial_rotary_factor":
            hf |= {key: config.rotary_size / config.head_dim} if config.rotary_dim is None else {}
        else:
            hf[key] = ours[name]
    if "rotary_dim" not in family.optional and "partial_rotary_factor" in family.optional:
        hf["partial_rotary_factor"] = config.rotary_size / config.head_dim
    scaling = config.rope_scaling
    hf["rope_scaling"] = scaling and {"type": "yarn", "rope_type": "yarn"} | scaling.model_dump(exclude_none=True)
    if family.has_mtp:
        hf[_MTP_KEY] = config.mtp.depth if config.mtp and "mtp" not in own else 0
    hf |= {key: values[0] for key, values in family.fixed.items()}
    hf |= {key: value(ours) for key, value in family.restate.items()}
    if own:
        hf[_OWN_KEY] = own
    _check_round_trip(config, config_from_hf(hf), family)
    return hf


def _own_tables(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What the family's own keys cannot say."""
    own: dict[str, Any] = {}
    if config.residual.kind != "plain":
        own["residual"] = config.residual.model_dump(mode="json")
    if config.mtp is not None and not (family.has_mtp and config.mtp == MtpConfig(depth=config.mtp.depth)):
        own["mtp"] = config.mtp.model_dump(mode="json")
    return own


def _take_own(keys: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Check the model type, and take the table of our own parts out of the keys."""
    own = keys.get(_OWN_KEY)
    expected = [f"{OWN_PREFIX.lower()}_{name}" if own else name for name in family.model_types]
    model_type = keys.pop("model_type", expected[0])
    if model_type not in expected:
        raise CheckpointError(f"model_type is {model_type!r}", where=where, expected=f"one of {', '.join(expected)}")
    if own is None:
        return {}
    if f"{OWN_PREFIX}{family.name}" not in keys["architectures"] or not isinstance(own, dict):
        raise CheckpointError(
            f"{_OWN_KEY!r} describes parts that {family.name} does not have",
            where=where,
            expected=f"architecture {OWN_PREFIX}{family.name}",
        )
    strange = sorted(own.keys() - {"residual", "mtp"})
    if strange:
        raise CheckpointError(f"unknown keys: {', '.join(f'{_OWN_KEY}.{key}' for key in strange)}", where=where)
    del keys[_OWN_KEY]
    return dict(own)


def _take_fixed(keys: dict[str, Any], family: Family, where: str) -> None:
    for key, allowed in family.fixed.items():
        value = keys.pop(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(f"{key} = {value!r} is not supported", where=where, expected=f"{allowed[0]!r}")


def _take_fields(keys: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Our fields from their keys, which are taken out; what is absent or null gets its default."""
    if "num_local_experts" in keys and "num_experts" in family.required:
        keys.setdefault(family.required["num_experts"], keys.pop("num_local_experts"))
    missing = sorted(key for key in family.required.values() if key not in keys)
    rotary = [family.optional[name][0] for name in ("rotary_dim", "partial_rotary_factor") if name in family.optional]
    if len(rotary) == 2 and all(keys.get(key) is None for key in rotary):
        missing.append(" or ".join(rotary))
    if missing:
        raise CheckpointError(f"keys are missing: {', '.join(missing)}", where=where, fix="take the model's own file")
    ours = {"model_type": family.model_type, **family.implied}
    ours |= {name: keys.pop(key) for name, key in family.required.items()}
    for name, (key, default) in family.optional.items():
        value = keys.pop(key, None)
        value = default if value is None else value
        if value is not None:
            ours[name] = value
    if ours.get("num_shared_experts") is None:
        ours["num_shared_experts"] = 0
    try:
        return ours | family.complete(ours)
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"a size is not a number ({error})", where=where, fix="correct the file") from error


def _unfold_rope_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 gathers the RoPE keys in `rope_parameters`; lay them flat again."""
    keys = dict(hf_config)
    rope = keys.pop("rope_parameters", None) or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            keys.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rope
    return keys


def _read_rope_scaling(value: Any, where: str) -> dict[str, Any] | None:
    """YaRN's keys, without those that say nothing."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise CheckpointError("rope_scaling is not a table", where=where)
    kind = value.get("rope_type", value.get("type"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"rope_scaling of type {kind!r} is not supported", where=where, expected="'yarn'")
    outside = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    keys = {key: item for key, item in value.items() if key not in outside and item is not None}
    if "original_max_position_embeddings" not in keys:
        raise CheckpointError(
            "rope_scaling.original_max_position_embeddings is missing",
            where=where,
            expected="the context that the weights were trained on, before stretching",
            fix="add it; max_position_embeddings is not it once that has been raised",
        )
    unknown = sorted(keys.keys() - YarnConfig.model_fields.keys())
    if unknown:
        raise CheckpointError(f"unknown keys: {', '.join(f'rope_scaling.{key}' for key in unknown)}", where=where)
    return keys


def _check_restated(keys: dict[str, Any], family: Family, ours: Mapping[str, Any], where: str) -> None:
    for key, value in family.restate.items():
        expected = value(dict(ours))
        got = keys.pop(key, None)
        if got is not None and got != expected:
            raise CheckpointError(f"{key} = {got!r} is not supported", where=where, expected=f"{expected!r}")


def _check_round_trip(config: ModelConfig, back: ModelConfig, family: Family) -> None:
    have, want = _arithmetic_of(back), _arithmetic_of(config)
    lost = [f"{key}={want[key]}" for key in want if have.get(key) != want[key]]
    if lost:
        raise CheckpointError(
            f"{family.name} has no keys for {', '.join(lost)}",
            where=f"model_type {config.model_type}",
            fix="choose the model_type of a family that has them, or leave them at what this family does",
        )


def _arithmetic_of(config: ModelConfig) -> dict[str, Any]:
    """What a config computes: fields that another one overrules are left out."""
    fields = config.model_dump(exclude={"rotary_dim", "partial_rotary_factor"}) | {"rotary_size": config.rotary_size}
    if not config.num_experts:
        fields = {key: value for key, value in fields.items() if key not in _UNUSED_WITHOUT_EXPERTS}
    if config.residual.kind == "plain":
        fields["residual"] = ResidualConfig().model_dump()
    return fields
