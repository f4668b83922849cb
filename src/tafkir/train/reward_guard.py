"""The guard against reward hacking: it watches what the policy is not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tafkir.recipe.rlhf import GuardConfig

__all__ = ["RewardGuard"]


@dataclass
class RewardGuard:
    """Ends the stage, or lowers its learning rate, where the reward can no longer be trusted.

    It trips when the mean KL towards the first policy over the last `window` steps exceeds the budget, or when the
    held-out judge's mean has fallen more than `tolerance` below its best while the reward has risen since: what the
    policy then gains is the reward model's error (Gao et al. 2022, arXiv 2210.10760).

    Attributes:
        rate: what the learning rate is multiplied by.
        stopped: why the stage has ended; empty while it goes on.
        trips: what happened at which step, in order.
    """

    config: GuardConfig
    rate: float = 1.0
    stopped: str = ""
    trips: list[dict[str, Any]] = field(default_factory=list)
    _rewards: list[float] = field(default_factory=list)
    _judged: list[float] = field(default_factory=list)
    _kls: list[float] = field(default_factory=list)
    _best: tuple[float, float] | None = None

    def observe(self, step: int, reward: float, *, judged: float | None = None, kl: float | None = None) -> None:
        """Take the means of a step: reward, the judge's reward, and KL in nats a completion."""
        for values, value in ((self._rewards, reward), (self._judged, judged), (self._kls, kl)):
            if value is not None:
                values.append(value)
                del values[: -self.config.window]
        reason = self._spent() or self._hacked()
        if not reason:
            return
        self.trips.append({"step": step + 1, "reason": reason})
        if self.config.action == "stop":
            self.stopped = reason
        else:
            # The windows begin anew, so that one excess lowers the rate once.
            self.rate *= self.config.lower_by
            self._best = None
            for values in (self._rewards, self._judged, self._kls):
                values.clear()

    def _spent(self) -> str:
        if not self.config.kl_budget or len(self._kls) < self.config.window:
            return ""
        kl = fmean(self._kls)
        if kl <= self.config.kl_budget:
            return ""
        return f"the KL towards the first policy is {kl:.3g} nats a completion, over the budget"

    def _hacked(self) -> str:
        if len(self._judged) < self.config.window:
            return ""
        reward, judged = fmean(self._rewards), fmean(self._judged)
        if self._best is None or judged >= self._best[1]:
            self._best = (reward, judged)
            return ""
        best_reward, best_judged = self._best
        if best_judged - judged <= self.config.tolerance or reward <= best_reward:
            return ""
        return (
            f"the held-out judge fell from {best_judged:.3g} to {judged:.3g} "
            f"while the reward rose from {best_reward:.3g} to {reward:.3g}"
        )

    def state(self) -> Any:
        """Everything that later steps depend on, as JSON."""
        return {
            "rate": self.rate,
            "stopped": self.stopped,
            "trips": self.trips,
            "rewards": self._rewards,
            "judged": self._judged,
            "kls": self._kls,
            "best": self._best,
        }

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        self.rate, self.stopped, self.trips = state["rate"], state["stopped"], list(state["trips"])
        self._rewards, self._judged, self._kls = (list(state[name]) for name in ("rewards", "judged", "kls"))
        self._best = tuple(state["best"]) if state["best"] else None
