"""Which experts a calibration has reached: how many tokens each got by itself, and how many it was given besides.

Shapes: N tokens, E experts, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.recipe.quantize import CalibrationConfig

__all__ = ["LayerCoverage", "check_coverage", "coverage_rows", "given_tokens", "wanted_tokens"]


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """The experts of a layer.

    Attributes:
        layer: its index.
        routed: tokens that the router sent to each expert.
        given: tokens that each was shown besides; they change nothing of what later layers read.
        data_free: experts whose weights are chosen without data, because they got too few tokens.
    """

    layer: int
    routed: tuple[int, ...]
    given: tuple[int, ...]
    data_free: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"routed": list(self.routed), "given": list(self.given), "data_free": list(self.data_free)}

    @classmethod
    def from_json(cls, layer: int, found: dict[str, Any]) -> LayerCoverage:
        return cls(layer, tuple(found["routed"]), tuple(found["given"]), tuple(found["data_free"]))


def wanted_tokens(load_E: Tensor, config: CalibrationConfig) -> int:
    """How many tokens every expert shall see: the least that is asked for, or for "balance" an equal share."""
    equal = -(-int(load_E.sum()) // len(load_E)) if config.cold_experts == "balance" else 0
    return max(config.min_expert_tokens, equal)


def check_coverage(layer: int, load_E: Tensor, num_tokens: int, config: CalibrationConfig) -> None:
    """Refuse a calibration set that leaves experts of a layer cold, unless it was said what to do about it.

    Raises:
        CheckpointError: an expert got fewer tokens than asked for and `cold_experts` is "error", or there are not so
            many tokens that could be given to it.
    """
    cold = (load_E < config.min_expert_tokens).nonzero().flatten().tolist()
    if cold and config.cold_experts == "error":
        few = ", ".join(f"{expert} ({int(load_E[expert])})" for expert in cold[:6])
        rest = f" and {len(cold) - 6} more" if len(cold) > 6 else ""
        raise CheckpointError(
            f"{len(cold)} of {len(load_E)} experts get fewer than {config.min_expert_tokens} of {num_tokens} tokens: "
            f"{few}{rest}",
            where=f"layer {layer}",
            fix="calibrate on more or other text, or say cold_experts = 'force', 'balance' or 'data_free'",
        )
    if config.cold_experts in ("force", "balance") and num_tokens < config.min_expert_tokens:
        raise CheckpointError(
            f"there are {num_tokens} tokens in all",
            where=f"layer {layer}",
            expected=f"min_expert_tokens = {config.min_expert_tokens} or more",
            fix="calibrate on more text",
        )


def given_tokens(expert: int, routed: Tensor, scores_NE: Tensor, wanted: int) -> Tensor:
    """Tokens to show to an expert besides its own: those that its router likes best, int64, at most all of them.

    Args:
        expert: which.
        routed: int64, the tokens that it has.
        scores_NE: the router's scores.
        wanted: tokens that it shall see in all.
    """
    missing = min(wanted, len(scores_NE)) - len(routed)
    if missing <= 0:
        return routed[:0]
    scores_N = scores_NE[:, expert].clone()
    scores_N[routed] = -torch.inf
    return torch.sort(scores_N, descending=True, stable=True).indices[:missing]


def coverage_rows(layers: Sequence[LayerCoverage]) -> list[dict[str, Any]]:
    """The table: for each layer the fewest, median and most tokens of an expert, and what was done about the few."""
    rows = []
    for layer in layers:
        loads = sorted(layer.routed)
        rows.append(
            {
                "layer": layer.layer,
                "experts": len(loads),
                "fewest": loads[0],
                "median": loads[len(loads) // 2],
                "most": loads[-1],
                "never": loads.count(0),
                "given_tokens": sum(count > 0 for count in layer.given),
                "data_free": len(layer.data_free),
            }
        )
    return rows
