"""How a recursive model thinks about one puzzle: answer, confidence and halting after each supervision step.

Shapes: L cells, V symbols.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.rules import has_rules, is_right

__all__ = ["Thought", "Trace", "confidence", "trace_puzzle"]

ConfidenceKind = Literal["stable_max", "softmax"]


@dataclass(frozen=True, slots=True)
class Thought:
    """What stands after one supervision step.

    Attributes:
        answer: tokens [L].
        confidence: probability of each cell's symbol [L].
        q: the model's own probability that the whole answer is right.
        right: what the rules say; None where none are known.
        changed: cells whose symbol is another than a step before; at first, than in the question.
    """

    answer: Cells
    confidence: NDArray[np.float32]
    q: float
    right: bool | None
    changed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """All steps of one puzzle.

    Attributes:
        model: name of the checkpoint.
        format: size and symbols.
        question: tokens [L].
        thoughts: one for each supervision step.
        halted: the first step (from 1) with q above the threshold; None where there is none.
        taken: the step (from 1) whose answer counts: the first right one, or, without rules, the halted or last one;
            None where no answer keeps the rules.
        seconds: wall time of the thinking.
    """

    model: str
    format: PuzzleFormat
    question: Cells
    thoughts: tuple[Thought, ...]
    halted: int | None
    taken: int | None
    seconds: float

    @property
    def verdict(self) -> str:
        """solved, unsolved, or unchecked where no rules are known."""
        if not has_rules(self.format):
            return "unchecked"
        return "unsolved" if self.taken is None else "solved"

    def shown(self) -> tuple[Thought, ...]:
        """The steps up to the answer and to halting; all where the puzzle stays unsolved."""
        if self.taken is None:
            return self.thoughts
        return self.thoughts[: max(self.taken, self.halted or 0)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: grids as rows of signs, probabilities with four digits."""

        def rows(cells: Cells) -> list[str]:
            return self.format.show(cells).split("\n")

        return {
            "model": self.model,
            "kind": self.format.kind,
            "question": rows(self.question),
            "verdict": self.verdict,
            "taken": self.taken,
            "halted": self.halted,
            "seconds": round(self.seconds, 4),
            "steps": [
                {
                    "step": number,
                    "answer": rows(thought.answer),
                    "confidence": [round(float(p), 4) for p in thought.confidence],
                    "q": round(thought.q, 4),
                    "right": thought.right,
                    "changed": list(thought.changed),
                }
                for number, thought in enumerate(self.thoughts, start=1)
            ],
        }


def confidence(logits_LV: torch.Tensor, kind: ConfidenceKind) -> NDArray[np.float32]:
    """Probability of each cell's most likely symbol, by the function that the model was trained with."""
    logits = logits_LV.double()
    if kind == "softmax":
        parts = logits.softmax(-1)
    else:
        parts = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
        parts = parts / parts.sum(-1, keepdim=True)
    found: NDArray[np.float32] = parts.amax(-1).float().numpy()
    return found


def trace_puzzle(
    solver: TrmCheckpoint, question: Cells, *, max_steps: int | None = None, halt_threshold: float = 0.0
) -> Trace:
    """Let a model think about one puzzle, and keep every step.

    Args:
        solver: on the processor.
        question: tokens [L].
        max_steps: supervision steps; N_sup where not given, and more are allowed.
        halt_threshold: on the halting head's logit.
    """
    began = time.perf_counter()
    thoughts = tuple(_think(solver, question, max_steps))
    seconds = time.perf_counter() - began
    limit = 1 / (1 + np.exp(-halt_threshold))
    halted = next((number for number, thought in enumerate(thoughts, start=1) if thought.q > limit), None)
    if has_rules(solver.puzzles):
        taken = next((number for number, thought in enumerate(thoughts, start=1) if thought.right), None)
    else:
        taken = halted or len(thoughts)
    return Trace(solver.path.name, solver.puzzles, question, thoughts, halted, taken, seconds)


def _think(solver: TrmCheckpoint, question: Cells, max_steps: int | None) -> Iterator[Thought]:
    lineage = solver.manifest.lineage if solver.manifest else {}
    kind: ConfidenceKind = "softmax" if lineage.get("loss") == "softmax" else "stable_max"
    before = question
    for out in solver.model.steps(torch.from_numpy(question[None]).long(), count=max_steps):
        answer: Cells = out.logits[0].argmax(-1).to(torch.uint8).numpy()
        right = is_right(solver.puzzles, question, answer) if has_rules(solver.puzzles) else None
        changed = tuple(np.flatnonzero(answer != before).tolist())
        yield Thought(answer, confidence(out.logits[0], kind), float(out.q_halt[0].sigmoid()), right, changed)
        before = answer
