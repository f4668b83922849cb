"""What the weights that sample look like: number format, injected noise, replay of experts. Imports without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tafkir.recipe.quantize import QuantizeConfig
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
    quantize: QuantizeConfig | None = Field(
        None, description="In place of a precision: rollouts by the model as `tafkir quantize` would write it."
    )

    @property
    def is_exact(self) -> bool:
        """Rollouts use the training weights as they are."""
        return self.precision == "float32" and self.noise == 0 and self.quantize is None

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.quantize is None:
            return self
        if self.precision != "float32" or self.noise:
            raise ValueError("rollout.quantize stands for itself: leave precision and noise at their defaults")
        if self.quantize.calibration is not None or self.quantize.auto is not None:
            raise ValueError("rollouts are quantized anew at every step, without data: leave out calibration and auto")
        return self
