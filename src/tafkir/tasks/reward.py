"""A reward function of the user's own: one Python file, called in a process with a time limit."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tafkir
from tafkir.errors import GradingError
from tafkir.protocols import Task
from tafkir.records import Example, Message, Split, Verdict
from tafkir.tasks.worker import WorkerFailure, WorkerPool

__all__ = ["FAILURES", "RewardFailure", "RewardFile", "RewardedTask"]

RewardFailure = Literal["raised", "not_finite", "wrong_type", "time", "died", "start"]
FAILURES: tuple[RewardFailure, ...] = get_args(RewardFailure)

_logger = logging.getLogger(__name__)


class RewardFile:
    """`reward(example, text) -> float` of a Python file.

    The function gets the `tafkir.records.Example` (its `extra` as JSON has it) and the text of the assistant's turn,
    its chain of thought included, and returns a finite number. It may import whatever is installed, and what lies
    beside it.

    Args:
        path: the file.
        timeout_s: how long one call may take.
        max_workers: how many calls may run at once.

    Raises:
        GradingError: the file is missing, cannot be imported, or has no function `reward`.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 5.0, max_workers: int = 2) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise GradingError("there is no such reward file", where=str(path), fix="correct rlvr.reward_file")
        package = str(Path(tafkir.__file__).resolve().parents[1])
        known = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.pool = WorkerPool(
            [sys.executable, "-P", "-m", "tafkir.tasks.reward_worker", str(self.path)],
            timeout_s=timeout_s,
            max_workers=max_workers,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
        )
        try:
            self.pool.start()
        except WorkerFailure as failure:
            raise GradingError(
                failure.detail or "its process does not start",
                where=str(path),
                expected="a Python file with a function reward(example, text) -> float",
            ) from None

    def __call__(self, example: Example, text: str) -> float | tuple[RewardFailure, str]:
        """The reward; or what went wrong, and the same in words. Never raises, never takes much longer than allowed."""
        name = self.path.name
        try:
            reply = self.pool.ask({"example": asdict(example), "text": text, "timeout_s": self.pool.timeout_s})
        except WorkerFailure as failure:
            words = {
                "time": f"took longer than {self.pool.timeout_s:g} s",
                "died": "ended its process",
                "start": f"cannot be started again: {failure.detail}",
            }
            return failure.kind, f"{name} {words[failure.kind]}"
        if "failure" in reply:
            return reply["failure"], f"{name} {reply['detail']}"
        return float(reply["reward"])

    def close(self) -> None:
        """End the idle workers."""
        self.pool.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts workers of its own."""
        return _open, (str(self.path), self.pool.timeout_s)


def _open(path: str, timeout_s: float) -> RewardFile:
    return RewardFile(path, timeout_s=timeout_s)


class RewardedTask:
    """A task whose rewards come from a user's function; what is correct is still the task's own word.

    A call that fails is an "error" with reward 0, its reason, and how it failed as the verdict's `failure`. The first
    of each kind is warned of.
    """

    def __init__(self, task: Task, reward: RewardFile) -> None:
        self.task, self.reward = task, reward
        self._warned: set[RewardFailure] = set()

    @property
    def name(self) -> str:
        return self.task.name

    def examples(self, split: Split) -> Sequence[Example]:
        return self.task.examples(split)

    def prompt(self, example: Example) -> list[Message]:
        return self.task.prompt(example)

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """The task's verdict with the user's reward."""
        verdict = self.task.grade(example, text, finished=finished)
        result = self.reward(example, text)
        if isinstance(result, float):
            return replace(verdict, reward=result)
        kind, reason = result
        if kind not in self._warned:
            self._warned.add(kind)
            _logger.warning(
                "a reward is 0 because %s (example %s); more of the kind are only counted", reason, example.id
            )
        return replace(verdict, outcome="error", reward=0.0, reason=reason, failure=kind)
