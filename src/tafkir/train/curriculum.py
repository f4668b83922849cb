"""A curriculum of difficulty: the level of each kind of task rises when it is solved often enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from tafkir.recipe.tasks import CurriculumConfig

__all__ = ["Curriculum"]


class Curriculum:
    """Which level problems are drawn from; what it knows is saved with the weights, so a resumed run goes on with it.

    The pass rate of a kind is taken over its problems at the current level, in the last `config.window` steps that had
    some since the level rose.

    Args:
        difficulty: the levels of each kind, in rising order.
    """

    def __init__(self, difficulty: Mapping[str, Sequence[int]], config: CurriculumConfig) -> None:
        self.difficulty, self.config = {kind: tuple(levels) for kind, levels in difficulty.items()}, config
        self._reached = dict.fromkeys(self.difficulty, 0)
        self._recent: dict[str, list[list[int]]] = {kind: [] for kind in self.difficulty}

    def current(self, kind: str) -> int:
        """The level that a kind has reached."""
        return self.difficulty[kind][self._reached[kind]]

    def level(self, kind: str, seed: int) -> int:
        """The level of one problem: the current one, or, for the share of reviews, one that is already passed."""
        reached, random = self._reached[kind], Random(seed)
        if reached and random.random() < self.config.review_share:
            return random.choice(self.difficulty[kind][:reached])
        return self.current(kind)

    def record(self, kind: str, passed: Sequence[bool]) -> None:
        """Take in how the completions of one step at the current level went, and raise the level if it is time."""
        if not passed:
            return
        recent = self._recent[kind]
        recent.append([sum(passed), len(passed)])
        del recent[: -self.config.window]
        rate = sum(right for right, _ in recent) / sum(count for _, count in recent)
        is_last = self._reached[kind] + 1 == len(self.difficulty[kind])
        if len(recent) == self.config.window and rate >= self.config.threshold and not is_last:
            self._reached[kind] += 1
            recent.clear()

    def state(self) -> Any:
        """What `load_state` takes, as JSON."""
        return {"reached": self._reached, "recent": self._recent}

    def load_state(self, state: Any) -> None:
        """Go on from a saved state."""
        self._reached = dict(state["reached"])
        self._recent = {kind: [list(step) for step in steps] for kind, steps in state["recent"].items()}
