"""Training for quantization: `[qat]` of a recipe. Imports without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tafkir.recipe.tables import Positive, TrainTable

__all__ = ["QatConfig"]


class QatConfig(TrainTable):
    """Training with weights and inputs as `[quantize]` will write them, so that the written checkpoint loses less."""

    objective: Literal["distill", "sft"] = Field(
        "distill",
        description="Learn the distributions of the model before (distillation), or the text (harms RL's models).",
    )
    data: Literal["answers", "solutions"] = Field(
        "answers", description="Learn on answers that the model before samples, or on the recipe's solved problems."
    )
    batch_problems: Positive = Field(48, description="Problems per optimiser step.")
    story_share: float = Field(0.5, ge=0, le=1, description="Share of problems that are made up.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the answers.")
    max_completion_tokens: Positive = Field(96, description="Length limit of an answer.")
    expert_bias_update_rate: float = Field(
        0.0, ge=0, description="u of the balance update of the routers' biases; 0 leaves the routing to gradients."
    )
    baseline: bool = Field(
        False, description="`[quantize]` also quantizes the model before, for `eval.stages` to score as `ptq`."
    )
