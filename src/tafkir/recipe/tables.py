"""What the tables of a recipe share: the base of every table, and of every stage that trains. Imports without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DecayShape", "EmaConfig", "OptimConfig", "Positive", "Table", "TrainTable"]

Positive = Annotated[int, Field(ge=1)]
DecayShape = Literal["linear", "cosine", "1-sqrt"]


class Table(BaseModel):
    """One table of a recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimConfig(Table):
    """The optimiser and its learning rate: linear warm-up, then the schedule."""

    optimizer: Literal["adamw", "adam_atan2", "muon"] = Field(
        "adamw", description="AdamW or AdamATan2 for everything, or Muon for hidden matrices beside AdamW for the rest."
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of the matrices under Muon.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="After the warm-up: none, a decay to the last step, or stable, then a short decay (wsd)."
    )
    decay_share: float = Field(0.1, gt=0, le=1, description="Share of the steps in which wsd decays.")
    decay_shape: DecayShape = Field("1-sqrt", description="How wsd decays.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second-moment decay.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled decay, on matrices only.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the global gradient norm to this.")


class EmaConfig(Table):
    """An exponential moving average of the weights, kept beside them."""

    decay: float = Field(0.999, gt=0, lt=1, description="How much of the average stays in each update.")
    warmup: bool = Field(True, description="Average fewer updates in the beginning: decay is at most (1+t)/(10+t).")
    checkpoint: bool = Field(True, description="Write the stage's checkpoint from the average.")


class TrainTable(OptimConfig):
    """What every training stage has in common."""

    steps: Positive = Field(100, description="Optimiser steps.")
    expert_bias_update_rate: float = Field(
        1e-3, ge=0, description="u of the aux-loss-free balance update b += u (sign(e) - mean sign(e)); 0 freezes it."
    )
    micro_batches: Positive = Field(1, description="Pieces of a step's batch, to save memory; the loss stays the same.")
    checkpoint_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of the stage's checkpoint; training itself is float32."
    )
    ema: EmaConfig | None = None
    checkpoint_every: int = Field(
        0, ge=0, description="Steps between checkpoints that stay, for `tafkir merge`; 0 leaves only the last."
    )
    save_every: Positive = Field(100, description="Steps between resumable states.")
    log_every: Positive = Field(10, description="Steps between metric rows.")
    validate_every: int = Field(0, ge=0, description="Steps between validation losses; 0 leaves them out.")
