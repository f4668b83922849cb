"""What the weights that sample look like: number format, injected noise, replay of experts. Imports without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tafkir.recipe.tables import Table

__all__ = ["RolloutConfig", "RolloutPrecision"]

RolloutPrecision = Literal["float32", "bfloat16", "fp8", "nvfp4", "nvfp4_w4a4"]


class RolloutConfig(Table):
    """How rollouts differ from training: what is sampled with a model in fewer bits is trained on in float32."""

    precision: RolloutPrecision = Field(
        "float32",
        description="Numbers of the rollouts: bfloat16 throughout, or 8- or 4-bit matrices (w4a4: and their inputs).",
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Std of Gaussian noise on those matrices, as a share of each one's rms; drawn for every policy.",
    )
    replay_experts: bool = Field(
        False, description="Train on the experts that the rollouts went to (Rollout Routing Replay, MoE only)."
    )

    @property
    def is_exact(self) -> bool:
        """Rollouts use the training weights as they are."""
        return self.precision == "float32" and self.noise == 0
