"""Holds an exported graph against torch: every supervision step from equal states, and the answers of whole solves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tafkir.data.puzzles.format import PAD, Cells, PuzzleFormat
from tafkir.data.puzzles.maze import make_maze
from tafkir.data.puzzles.rules import has_rules, is_right
from tafkir.data.puzzles.sudoku import Box, make_puzzle
from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.models.solving import Solved, solve_puzzles
from tafkir.models.trm import Trm, TrmState

__all__ = ["TOLERANCE", "OnnxSolver", "Parity", "check_parity", "draw_questions", "require_onnx"]

TOLERANCE = 1e-4
"""How far numbers may be apart, in units of the largest one of their kind, at least 1."""

_NUM_QUESTIONS = 24
_SEED = 5


@dataclass(frozen=True, slots=True)
class Parity:
    """How close graph and torch are.

    Attributes:
        max_error: of y, z, logits and q after each of `steps` supervision steps from equal states; relative as
            `TOLERANCE` says.
        puzzles: how many were solved by both.
        compared: those whose answer torch takes or the rules find right. Only these answers are compared: on others a
            recursion may wander, and rounding with it.
        same: compared answers that are the same in every cell.
    """

    max_error: float
    steps: int
    puzzles: int
    compared: int
    same: int

    @property
    def holds(self) -> bool:
        return self.max_error <= TOLERANCE and self.same == self.compared

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_onnx() -> None:
    """Make sure that onnx and onnxruntime are installed.

    Raises:
        BackendUnavailable: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"{error.name} is not installed", where="tafkir trm export", fix="pip install 'tafkir[trm-web]'"
        ) from error


class OnnxSolver:
    """Runs an exported file with onnxruntime on one thread of the processor.

    Args:
        file: content of step.onnx or solve.onnx.
    """

    def __init__(self, file: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._has_ids = "puzzle_ids" in {node.name for node in self._session.get_inputs()}

    def step(self, tokens: Cells, y: NDArray[np.float32], z: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """y, z, logits and q after one step, puzzle ids 0."""
        found: list[NDArray[np.float32]] = self._session.run(None, self._puzzle(tokens) | {"y": y, "z": z})
        return found

    def solve(self, tokens: Cells, max_steps: int, halt_threshold: float = math.inf) -> Solved:
        """Every step's answer; fewer than `max_steps` where every puzzle halts."""
        limits = {"max_steps": np.array(max_steps), "halt_threshold": np.array(halt_threshold, dtype=np.float32)}
        answers, q = self._session.run(None, self._puzzle(tokens) | limits)
        return Solved(answers.astype(np.uint8), q)

    def _puzzle(self, tokens: Cells) -> dict[str, Any]:
        ids = {"puzzle_ids": np.zeros(len(tokens), dtype=np.int32)} if self._has_ids else {}
        return {"tokens": tokens.astype(np.int32)} | ids


def draw_questions(format: PuzzleFormat, count: int, seed: int = _SEED) -> Cells:
    """Questions of a kind from a seed [N, L]; cells at random where the kind is unknown or mazes cannot be made."""
    random = Random(seed)
    if format.kind == "sudoku" and format.box is not None:
        grids = [make_puzzle(random, Box(*format.box), random.randint(0, 3))[0] for _ in range(count)]
        return np.array(grids, dtype=np.uint8) + np.uint8(1)
    if format.kind == "maze" and format.rows % 2 and format.columns % 2:
        mazes = [make_maze(random, format.rows, format.columns, 1)[0] for _ in range(count)]
        return np.stack([format.encode(maze) for maze in mazes])
    tokens = [[random.randrange(PAD + 1, format.vocab_size) for _ in range(format.num_cells)] for _ in range(count)]
    return np.array(tokens, dtype=np.uint8)


def check_parity(model: Trm, format: PuzzleFormat, files: Mapping[str, bytes], where: str) -> Parity:
    """Compare step.onnx and solve.onnx with a model of the very weights that they unpack to.

    Raises:
        CheckpointError: numbers differ by more than `TOLERANCE`, or an answer that counts is another.
    """
    questions = draw_questions(format, _NUM_QUESTIONS)
    stepper = OnnxSolver(files["step.onnx"])
    errors = [_step_error(model, stepper, part) for part in (questions[:1], questions[1:8])]
    steps = model.shape.max_supervision_steps
    ours, theirs = solve_puzzles(model, questions), OnnxSolver(files["solve.onnx"]).solve(questions, steps)
    counted = [_what_counts(format, question, ours, number) for number, question in enumerate(questions)]
    pairs = [(k, number) for number, k in enumerate(counted) if k is not None]
    same = sum(bool((ours.answers[at] == theirs.answers[at]).all()) for at in pairs)
    parity = Parity(max(errors), steps, len(questions), len(pairs), same)
    if not parity.holds:
        raise CheckpointError(
            f"the graph differs from torch by {parity.max_error:.1e}, {same} of {len(pairs)} answers are the same",
            where=where,
            expected=f"at most {TOLERANCE:.0e} and the same answers",
            fix="export a trained model, or with --weights float32",
        )
    return parity


def _step_error(model: Trm, solver: OnnxSolver, questions: Cells) -> float:
    """The largest relative difference over all steps; each begins where torch is."""
    tokens = torch.from_numpy(questions).long()
    state, worst = model.start(*tokens.shape), 0.0
    for _ in range(model.shape.max_supervision_steps):
        y, z = (np.ascontiguousarray(part.numpy()) for part in state)
        theirs = solver.step(questions, y, z)
        with torch.no_grad():
            out = model(state, tokens)
        state = TrmState(*(part.contiguous() for part in out.state))
        for our, their in zip((*state, out.logits, out.q_halt), theirs, strict=True):
            size = max(1.0, float(our.abs().max()))
            worst = max(worst, float(np.abs(our.numpy() - their).max()) / size)
    return worst if math.isfinite(worst) else math.inf


def _what_counts(format: PuzzleFormat, question: Cells, solved: Solved, number: int) -> int | None:
    """The step (from 0) whose answer is taken: the first that is right, or where the model halts; else none."""
    if has_rules(format):
        for step, answers in enumerate(solved.answers):
            if is_right(format, question, answers[number]):
                return step
        return None
    above = np.flatnonzero(solved.q_halt[:, number] > 0)
    return int(above[0]) if len(above) else None
