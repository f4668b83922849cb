"""The mismatch monitor: traffic lights over every step's mismatch, the tokens behind them, and what red does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.recipe.rl import Acceptance, MonitorConfig
from tafkir.runlog.metrics import JsonlWriter
from tafkir.train.mismatch import out_of_band
from tafkir.train.rollout import RolloutGroup

__all__ = ["LIGHTS", "Light", "MismatchMonitor", "SeenTokens", "judge"]

Light = Literal["green", "yellow", "red"]
LIGHTS: tuple[Light, ...] = ("green", "yellow", "red")

_CONTEXT_TOKENS = 12
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """The T sampled tokens of a step, completion after completion, as both engines saw them."""

    groups: Sequence[RolloutGroup]
    train_logprobs_T: Tensor
    sampling_logprobs_T: Tensor
    masked_T: Tensor


def judge(metrics: Mapping[str, Any], config: MonitorConfig) -> tuple[Light, list[str]]:
    """The light that a step's mismatch metrics turn on, and what is wrong in words.

    Red is a mean |Δ log p| above `stop`; yellow one above `warn`, a small effective sample size, many tokens out of the
    band, or any ratio that is not finite.
    """
    difference = metrics["mismatch/abs_logprob_diff_mean"]
    reasons = []
    if difference > config.warn:
        line = ("stop", config.stop) if difference > config.stop else ("warn", config.warn)
        reasons.append(f"mean |Δ log p| {difference:.3g} is above {line[0]} = {line[1]:g}")
    if metrics["mismatch/ess"] < config.min_ess:
        reasons.append(f"effective sample size {metrics['mismatch/ess']:.3g} is below {config.min_ess:g}")
    if metrics["mismatch/out_of_band"] > config.max_out_of_band:
        reasons.append(
            f"{metrics['mismatch/out_of_band']:.2%} of the tokens are out of [{config.low:g}, {config.high:g}]"
        )
    if metrics["mismatch/nonfinite"]:
        reasons.append(f"{metrics['mismatch/nonfinite']:.0f} ratios are not finite")
    if difference > config.stop:
        return "red", reasons
    return ("yellow" if reasons else "green"), reasons


class MismatchMonitor:
    """Watches the steps of a stage; what it carries from one to the next is whether protection is on.

    Args:
        config: thresholds, and what red does.
        acceptance: the stage's own acceptance region.
        path: JSON lines of the steps that were not green or had tokens out of the band; None writes nothing.
        decode: text of some tokens.
    """

    def __init__(
        self,
        config: MonitorConfig,
        acceptance: Acceptance,
        *,
        path: Path | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.config, self._own = config, acceptance
        self._path, self._decode = path, decode
        self._writer: JsonlWriter | None = None
        self._light: Light = "green"
        self.protected_since: int | None = None

    @property
    def acceptance(self) -> Acceptance:
        """The region that the next step uses."""
        return self._own if self.protected_since is None else self.config.protection

    def state(self) -> dict[str, int] | None:
        """What the next step depends on."""
        return None if self.protected_since is None else {"protected_since": self.protected_since}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` returned."""
        self.protected_since = state["protected_since"]

    def observe(
        self, step: int, metrics: Mapping[str, Any], tokens: SeenTokens
    ) -> tuple[dict[str, float], TrainingError | None]:
        """Judge a step, write down what was wrong, and act on red.

        Args:
            step: steps that are done with this one.

        Returns:
            `mismatch/light` (0 green, 1 yellow, 2 red) and `mismatch/protected` (1 where this step's acceptance region
            was the protection), and the error to stop with, if the recipe says so.
        """
        light, reasons = judge(metrics, self.config)
        found = {
            "mismatch/light": float(LIGHTS.index(light)),
            "mismatch/protected": float(self.acceptance != self._own),
        }
        self._write(step, light, reasons, metrics, tokens)
        if light != self._light:
            level = logging.INFO if light == "green" else logging.WARNING
            _logger.log(level, "mismatch is %s at step %d%s", light, step, ": " + "; ".join(reasons) if reasons else "")
        self._light = light
        if light != "red" or self.config.on_red == "warn":
            return found, None
        if self.config.on_red == "protect":
            if self.protected_since is None:
                self.protected_since = step
                _logger.warning("protection is on from step %d: %s", step + 1, self.config.protection.kind)
            return found, None
        return found, TrainingError(
            f"sampling and training engine disagree too much: {'; '.join(reasons)}",
            where=f"step {step}" + (f" ({self._path})" if self._path else ""),
            fix="raise rollout.precision, or set monitor.on_red to protect; with warn the run goes on from this step",
        )

    def _write(
        self, step: int, light: Light, reasons: Sequence[str], metrics: Mapping[str, Any], tokens: SeenTokens
    ) -> None:
        log_k_T = (tokens.train_logprobs_T - tokens.sampling_logprobs_T).double()
        outside = bool(out_of_band(log_k_T, self.config.low, self.config.high).any())
        if self._path is None or (light == "green" and not outside):
            return
        if self._writer is None:
            self._writer = JsonlWriter(self._path)
            # A killed run may have written this step and later ones already.
            self._writer.truncate_to(step - 1)
        shown = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("mismatch/")}
        rows = self._furthest(log_k_T, tokens)
        self._writer.append({"step": step, "light": light, "reasons": list(reasons), **shown, "tokens": rows})

    def _furthest(self, log_k_T: Tensor, tokens: SeenTokens) -> list[dict[str, Any]]:
        """The tokens that the engines are furthest apart on, worst first; those without a finite ratio come first."""
        distance_T = torch.where(torch.isfinite(log_k_T), log_k_T.abs(), torch.inf)
        count = min(self.config.dump_tokens, distance_T.numel())
        flat = [(group, rollout) for group in tokens.groups for rollout in group.rollouts]
        lengths = torch.tensor([len(rollout.completion.token_ids) for _, rollout in flat])
        ends = lengths.cumsum(0)
        rows = []
        for place in distance_T.sort(descending=True, stable=True).indices[:count].tolist():
            index = int(torch.searchsorted(ends, place, right=True))
            group, rollout = flat[index]
            at = place - int(ends[index] - lengths[index])
            ids = rollout.completion.token_ids
            rows.append(
                {
                    "example": group.example.id,
                    "position": at,
                    "token_id": ids[at],
                    "text": self._text(ids[at : at + 1]),
                    "before": self._text(ids[max(0, at - _CONTEXT_TOKENS) : at]),
                    "logprob_training": _number(tokens.train_logprobs_T[place]),
                    "logprob_sampling": _number(tokens.sampling_logprobs_T[place]),
                    "masked": bool(tokens.masked_T[place]),
                }
            )
        return rows

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode(ids) if self._decode and ids else ""


def _number(value: Tensor) -> float | None:
    """A float that JSON can hold."""
    return round(float(value), 6) if torch.isfinite(value) else None
