"""`[quantize.auto]`: which matrices keep more bits, by what the loss of each does to the model. Torch-free."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tafkir.errors import RecipeError
from tafkir.recipe.tables import Positive, Table

__all__ = ["AutoConfig", "AutoFormat", "Sensitivity", "parse_auto"]

AutoFormat = Literal["nvfp4", "nvfp4_w4a16", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block", "int8", "int4"]
Sensitivity = Literal["kl", "fisher"]

_GOAL = re.compile(r"(bits|bytes|kl)\s*=\s*([0-9.]+(?:[eE][-+]?\d+)?)\s*(%|[kMGT]?B)?")
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class AutoConfig(Table):
    """Mixed precision under a budget: one of bits, bytes and kl says how much."""

    bits: float | None = Field(
        None, gt=0, description="Stored bits, scales included, for each weight of the layers' matrices."
    )
    bytes: int | None = Field(None, gt=0, description="Of all tensors of the written checkpoint.")
    kl: float | None = Field(
        None, gt=0, description="Mean KL of next-token predictions, in nats; 0.01 is 1 % more perplexity on own text."
    )
    formats: tuple[AutoFormat, ...] = Field(
        ("nvfp4", "fp8_block"), min_length=1, description="What a matrix may become; to stay as it is is always open."
    )
    sensitivity: Sensitivity = Field(
        "kl",
        description="Loss of a group by a forward pass for each format (kl), or of all at once by gradients (fisher).",
    )
    text: str = Field(
        "task", min_length=1, description="`task` (made-up word problems), or a file: text or JSON lines."
    )
    tokens: Positive = Field(4096, description="Tokens that losses are measured on.")

    @model_validator(mode="after")
    def _check_goal(self) -> Self:
        if sum(goal is not None for goal in (self.bits, self.bytes, self.kl)) != 1:
            raise ValueError("set one of bits, bytes and kl")
        if len(set(self.formats)) != len(self.formats):
            raise ValueError("a format is named twice")
        return self

    @property
    def goal(self) -> str:
        """The budget as a command line gives it: `bits=5.0`."""
        key = next(key for key in ("bits", "bytes", "kl") if getattr(self, key) is not None)
        return f"{key}={getattr(self, key)}"


def parse_auto(text: str) -> dict[str, Any]:
    """The goal of `--auto`: `bits=5.0`, `bytes=4.2GB`, `kl=0.01` or `kl=1%`, which is the same.

    Raises:
        RecipeError: it is none of these.
    """
    found = _GOAL.fullmatch(text.strip())
    try:
        key, number, unit = found.groups() if found else ("", "", None)
        value = float(number)
    except ValueError:
        key, value, unit = "", 0.0, None
    if key == "bits" and unit is None:
        return {"bits": value}
    if key == "bytes" and unit in _UNITS:
        return {"bytes": int(value * _UNITS[unit])}
    if key == "kl" and unit in (None, "%"):
        return {"kl": value / 100 if unit else value}
    raise RecipeError(f"{text!r} is no budget", where="--auto", expected="bits=5.0, bytes=4.2GB, kl=0.01 or kl=1%")
