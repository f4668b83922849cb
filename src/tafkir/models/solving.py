"""Solving puzzles with a recursive model: every supervision step of every puzzle, and what a halting rule picks.

Shapes: N puzzles, L cells, K supervision steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tafkir.data.puzzles.format import PAD, Cells
from tafkir.models.trm import Trm

__all__ = ["Solved", "solve_puzzles"]


@dataclass(frozen=True, slots=True)
class Solved:
    """Answers after each supervision step.

    Attributes:
        answers: tokens [K, N, L].
        q_halt: logits [K, N]; above 0 where the model takes its answer to be right.
    """

    answers: Cells
    q_halt: NDArray[np.float32]

    def halts(self, threshold: float) -> NDArray[np.int64]:
        """The first step (from 0) with q above the threshold, the last one where there is none; [N]."""
        above = self.q_halt > threshold
        above[-1] = True
        first: NDArray[np.int64] = above.argmax(0)
        return first

    def pick(self, steps: NDArray[np.int64]) -> Cells:
        """Each puzzle's answer after its own step; [N, L]."""
        picked: Cells = self.answers[steps, np.arange(self.answers.shape[1])]
        return picked

    def right(self, labels: Cells) -> NDArray[np.bool_]:
        """Which labelled cells are right, [K, N, L]; cells without a label count as right."""
        right: NDArray[np.bool_] = (self.answers == labels) | (labels == PAD)
        return right


def solve_puzzles(model: Trm, inputs: Cells, *, steps: int | None = None, batch_size: int = 256) -> Solved:
    """Every supervision step's answer to every puzzle.

    Args:
        inputs: tokens [N, L].
        steps: supervision steps, N_sup where not given.
        batch_size: puzzles at once.

    Raises:
        DataError: the model is made for another number of cells.
    """
    was_training, device = model.training, model.y_init.device
    model.eval()
    answers, q_halt = [], []
    for first in range(0, len(inputs), batch_size):
        batch = torch.from_numpy(inputs[first : first + batch_size]).long().to(device)
        found = [(out.logits.argmax(-1), out.q_halt) for out in model.steps(batch, count=steps)]
        answers.append(torch.stack([answer for answer, _ in found]).to(torch.uint8).cpu().numpy())
        q_halt.append(torch.stack([q for _, q in found]).float().cpu().numpy())
    model.train(was_training)
    return Solved(np.concatenate(answers, axis=1), np.concatenate(q_halt, axis=1))
