"""A grader for tests whose verifiers die: it imports nothing heavy, so that a verifier is quickly there again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tafkir.records import Example, Message, Split, Verdict

__all__ = ["Parity", "obey"]


def obey(orders: str) -> str:
    """Take the order that lies in a folder, if any: one process alone carries it out.

    `die` and `hang` are carried out here; any other order is what the caller gets.
    """
    for order in sorted(Path(orders).glob("order-*")):
        try:
            order.unlink()
        except FileNotFoundError:
            continue
        name = order.name.removeprefix("order-")
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hang":
            time.sleep(600)
        return name
    return ""


@dataclass(frozen=True)
class Parity:
    """A task: an answer of even length is right. `poison` is an answer that no verifier survives."""

    orders: str
    poison: str = ""

    name = "parity"

    def examples(self, split: Split) -> Sequence[Example]:
        return []

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        if self.poison and text == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        if example.id == "3" and obey(self.orders) == "raise":
            raise ZeroDivisionError("by hand")
        right = len(text) % 2 == 0
        return Verdict("correct" if right else "wrong", float(right), text, example.answer)
