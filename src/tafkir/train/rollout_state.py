"""Rollouts as JSON and back, to the last bit: what a saved state holds of those that were not learned from yet."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.records import Completion, Example, Message, Verdict
from tafkir.train.rollout import Rollout, RolloutGroup

__all__ = ["load_completion", "load_example", "load_group", "save_completion", "save_example", "save_group"]


def save_group(group: RolloutGroup) -> dict[str, Any]:
    """A graded group."""
    rollouts = [
        {"text": r.text, "verdict": asdict(r.verdict), "completion": save_completion(r.completion)}
        for r in group.rollouts
    ]
    return {"example": save_example(group.example), "prompt_ids": group.prompt_ids, "rollouts": rollouts}


def load_group(saved: Mapping[str, Any]) -> RolloutGroup:
    """What `save_group` saved."""
    rollouts = [
        Rollout(load_completion(each["completion"]), each["text"], Verdict(**each["verdict"]))
        for each in saved["rollouts"]
    ]
    return RolloutGroup(load_example(saved["example"]), tuple(saved["prompt_ids"]), tuple(rollouts))


def save_completion(done: Completion) -> dict[str, Any]:
    """A completion, finished or not. Python writes the shortest text that reads back as the same float."""
    return {
        "request_id": done.request_id,
        "token_ids": done.token_ids,
        "logprobs": done.logprobs,
        "finish_reason": done.finish_reason,
        "policy_version": done.policy_version,
        "token_versions": done.token_versions,
        "expert_ids": None if done.expert_ids is None else _save_experts(done.expert_ids),
    }


def load_completion(saved: Mapping[str, Any]) -> Completion:
    """What `save_completion` saved."""
    experts = saved["expert_ids"]
    tuples = {name: tuple(saved[name]) for name in ("token_ids", "logprobs", "token_versions")}
    return Completion(**{**saved, **tuples, "expert_ids": None if experts is None else _load_experts(experts)})


def _save_experts(ids: Tensor) -> dict[str, Any]:
    raw = ids.cpu().to(torch.int16).contiguous().view(torch.uint8).flatten()
    return {"shape": list(ids.shape), "int16": base64.b64encode(bytes(raw.tolist())).decode("ascii")}


def _load_experts(saved: Mapping[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(saved["int16"]))
    if not raw:
        return torch.zeros(saved["shape"], dtype=torch.int16)
    return torch.frombuffer(raw, dtype=torch.int16).view(saved["shape"])


def save_example(example: Example) -> dict[str, Any]:
    """A problem with what its task keeps in `extra`.

    Raises:
        CheckpointError: `extra` holds something other than plain values, lists, tuples, mappings and messages.
    """
    return {**asdict(example), "extra": _pack(dict(example.extra), f"example {example.id}")}


def load_example(saved: Mapping[str, Any]) -> Example:
    """What `save_example` saved."""
    return Example(**{**saved, "extra": _unpack(saved["extra"])})


def _pack(value: Any, where: str) -> Any:
    """JSON knows neither tuples nor messages, and only text as keys: they are tagged."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_pack(item, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, where) for item in value]}
    if isinstance(value, Message):
        return {"message": asdict(value)}
    if isinstance(value, Mapping):
        return {"mapping": [[_pack(key, where), _pack(item, where)] for key, item in value.items()]}
    raise CheckpointError(
        f"an unfinished rollout cannot be saved: extra holds a {type(value).__name__}",
        where=where,
        expected="numbers, text, lists, tuples, mappings and messages",
    )


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_unpack(item) for item in content)
    if kind == "message":
        return Message(**content)
    return {_unpack(key): _unpack(item) for key, item in content}
