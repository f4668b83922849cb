"""Numbers to be written from the last digit to the first: a task that a tiny model learns in seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tafkir.records import Example, Message, Split, Verdict

__all__ = ["Reversal"]

_NUM_EXAMPLES = {"train": 10_000, "validation": 200, "test": 200}


class Reversal:
    """The question is `digits=`, the answer the digits reversed.

    A prefix of the answer earns half of its share, so that a group's rewards differ long before one answer is right.

    Args:
        digits: of every number.
        seed: another one has other numbers.
    """

    name = "reversal"

    def __init__(self, digits: int, seed: int = 0) -> None:
        self.digits, self.seed = digits, seed

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` of a part, a function of the seed and these two."""
        draw = random.Random(f"{self.seed}-{split}-{index}")
        digits = "".join(draw.choice("0123456789") for _ in range(self.digits))
        return Example(f"reversal-{split}-{index}", self.name, split, f"{digits}=", digits[::-1])

    def examples(self, split: Split) -> Sequence[Example]:
        return [self.example(split, index) for index in range(_NUM_EXAMPLES[split])]

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """1 for the exact answer, else half the share of the answer that the text begins with."""
        answer = example.answer
        if finished and text == answer:
            return Verdict("correct", 1.0, text, answer)
        right = next((i for i, digit in enumerate(answer) if text[i : i + 1] != digit), len(answer))
        reason = f"{right} of {len(answer)} digits are right" if finished else "the length limit cut it off"
        return Verdict("wrong" if finished else "length", 0.5 * right / len(answer), text, answer, reason)
