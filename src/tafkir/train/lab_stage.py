"""The `lab` stage: runs the laboratory that the recipe asks for."""

from __future__ import annotations

from typing import Any

from tafkir.recipe.lab import ResidualLabConfig
from tafkir.recipe.stage import StageContext
from tafkir.train.mismatch_lab import run_mismatch_lab
from tafkir.train.residual_lab import run_residual_lab

__all__ = ["run_lab"]


def run_lab(ctx: StageContext) -> dict[str, Any]:
    """Train every variant of the recipe's laboratory that is not finished yet.

    Returns:
        The variants' results and their totals.
    """
    config = ctx.recipe.lab
    assert config is not None
    if isinstance(config, ResidualLabConfig):
        return run_residual_lab(ctx, config)
    return run_mismatch_lab(ctx, config)
