"""What workers in these tests are made of: a tiny engine and a grader, some of which die, hang or raise once.

Workers import this module, so it stands apart from the tests. A fault happens in the first process that creates its
mark; later ones find the mark and work.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tafkir.records import Completion, Example, Message, Request, Split, Verdict

Fault = Literal["none", "die", "hang", "raise", "refuse", "lose one"]

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
    max_position_embeddings=128,
)
EOS = 3


def build_tiny(seed: int = 0) -> Decoder:
    return build_decoder(CONFIG, seed)


def happen(fault: Fault, mark: str) -> bool:
    """Do what the fault is, unless its mark is there; True when it went on."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(600)
    if fault == "raise":
        raise ZeroDivisionError("by hand")
    if fault == "refuse":
        raise CheckpointError("not this one", where="here")
    return True


class FaultyEngine(Engine):
    """Fails once, after it has sampled half of a call."""

    fault: Fault = "none"
    mark = ""

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        done = list(super().complete(requests))
        for i, completion in enumerate(done):
            if self.fault != "none" and i == len(done) // 2 and happen(self.fault, self.mark):
                return
            yield completion


@dataclass(frozen=True)
class BuildEngine:
    """Builds a worker's engine."""

    fault: Fault = "none"
    mark: str = ""
    while_building: bool = False
    max_batch: int = 64

    def __call__(self) -> FaultyEngine:
        if self.while_building:
            happen(self.fault, self.mark)
        engine = FaultyEngine(build_tiny(), eos_ids=(EOS,), max_batch=self.max_batch)
        if not self.while_building:
            engine.fault, engine.mark = self.fault, self.mark
        return engine


@dataclass(frozen=True)
class Parity:
    """A task: the answer is right when its length is even. Fails once at a text, or always at `poison`."""

    fault: Fault = "none"
    mark: str = ""
    poison: str = ""

    name = "parity"

    def examples(self, split: Split) -> Sequence[Example]:
        return []

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        if self.poison and text == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault != "none" and example.id == "3":
            happen(self.fault, self.mark)
        right = len(text) % 2 == 0
        return Verdict("correct" if right else "wrong", float(right), text, example.answer)


def mark_in(folder: Path) -> str:
    return str(folder / "mark")
