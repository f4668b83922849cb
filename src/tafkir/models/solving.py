"""Solving puzzles with a recursive model: every supervision step of every puzzle, and what a halting rule picks.

Shapes: N puzzles, L cells, K supervision steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tafkir.data.puzzles.format import PAD, Cells
from tafkir.data.puzzles.parts import PuzzleIds
from tafkir.models.trm import Trm, TrmState
from tafkir.recipe.seeds import derive_seed

__all__ = ["Solved", "Stop", "halt_above", "solve_puzzles"]

Stop = Callable[[NDArray[np.int64], Cells, NDArray[np.float32]], NDArray[np.bool_]]
"""Which puzzles are done, of those that are left: their numbers [n], answers [n, L] and logits of q [n]."""


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

    def surest(self) -> NDArray[np.int64]:
        """The step (from 0) of the highest q, the first one of equals; [N]."""
        best: NDArray[np.int64] = self.q_halt.argmax(0)
        return best

    def pick(self, steps: NDArray[np.int64]) -> Cells:
        """Each puzzle's answer after its own step; [N, L]."""
        picked: Cells = self.answers[steps, np.arange(self.answers.shape[1])]
        return picked

    def right(self, labels: Cells) -> NDArray[np.bool_]:
        """Which labelled cells are right, [K, N, L]; cells without a label count as right."""
        right: NDArray[np.bool_] = (self.answers == labels) | (labels == PAD)
        return right


def halt_above(threshold: float) -> Stop:
    """Puzzles are done at the first step with q above the threshold."""
    return lambda _, __, q_halt: q_halt > threshold


@torch.no_grad()
def solve_puzzles(
    model: Trm,
    inputs: Cells,
    *,
    puzzle_ids: PuzzleIds | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    noise: float | NDArray[np.float32] = 0.0,
    seed: int = 0,
    stop: Stop | None = None,
) -> Solved:
    """Every supervision step's answer to every puzzle.

    Args:
        inputs: tokens [N, L].
        puzzle_ids: rows [N] of the table of puzzle vectors; not given, row 0.
        steps: supervision steps, N_sup where not given; more are allowed.
        batch_size: puzzles at once.
        noise: standard deviation, one for all or one each [N], of what is added to z before each supervision step
            (PTRM, arXiv 2605.19943).
        seed: of the noise; equal seeds and batch sizes give equal noise.
        stop: puzzles that it takes for done leave, which saves their further steps; their answer and q stay.

    Raises:
        DataError: the model is made for another number of cells.
    """
    was_training = model.training
    model.eval()
    count = steps or model.shape.max_supervision_steps
    answers = np.zeros((count, *inputs.shape), dtype=np.uint8)
    q_halt = np.zeros((count, len(inputs)), dtype=np.float32)
    levels = np.broadcast_to(np.asarray(noise, dtype=np.float32), (len(inputs),))
    for first in range(0, len(inputs), batch_size):
        part = slice(first, first + batch_size)
        ids = None if puzzle_ids is None else puzzle_ids[part]
        batch = _Batch(model, inputs[part], ids, levels[part], derive_seed(seed, "noise", first))
        left = np.arange(len(inputs))[part]
        for step in range(count):
            answers[step:, left], q_halt[step:, left] = batch.step()
            if stop is not None and step + 1 < count:
                goes_on = ~stop(left, answers[step, left], q_halt[step, left])
                batch.keep(goes_on)
                left = left[goes_on]
                if not len(left):
                    break
    model.train(was_training)
    return Solved(answers, q_halt)


class _Batch:
    """Puzzles that are being worked on, with their states."""

    def __init__(self, model: Trm, inputs: Cells, ids: PuzzleIds | None, noise: NDArray[np.float32], seed: int) -> None:
        device = model.y_init.device
        self._model = model
        self._inputs = torch.from_numpy(np.ascontiguousarray(inputs)).long().to(device)
        self._ids = None if ids is None else torch.from_numpy(np.ascontiguousarray(ids)).to(device)
        self._state = model.start(*inputs.shape)
        self._noise = torch.from_numpy(noise.copy()).to(device)[:, None, None] if noise.any() else None
        # On the CPU, so that every device draws the same.
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> tuple[Cells, NDArray[np.float32]]:
        """One supervision step; answers [n, L] and logits of q [n]."""
        y, z = self._state
        if self._noise is not None:
            drawn = torch.randn(z.shape, generator=self._generator).to(z.device, z.dtype)
            z = z + self._noise.to(z.dtype) * drawn
        out = self._model(TrmState(y, z), self._inputs, self._ids)
        self._state = out.state
        return out.logits.argmax(-1).to(torch.uint8).cpu().numpy(), out.q_halt.float().cpu().numpy()

    def keep(self, goes_on: NDArray[np.bool_]) -> None:
        """Go on with some of the puzzles alone."""
        if goes_on.all():
            return
        rows = torch.from_numpy(goes_on).to(self._inputs.device)
        self._inputs = self._inputs[rows]
        self._state = TrmState(*(value[rows] for value in self._state))
        self._ids = None if self._ids is None else self._ids[rows]
        self._noise = None if self._noise is None else self._noise[rows]
