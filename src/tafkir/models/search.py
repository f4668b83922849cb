"""More thinking at test time: several runs of one puzzle, noisy or in other forms, and which of their answers counts.

Noise on the latent and the choice by q are PTRM's (arXiv 2605.19943). Run 0 is the puzzle itself without noise, so that
further runs only add to it.

Shapes: N puzzles, R runs, L cells, K supervision steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.parts import PuzzleIds
from tafkir.data.puzzles.rules import symmetry_of
from tafkir.data.puzzles.symmetry import Symmetry, identity
from tafkir.errors import RequestError
from tafkir.models.solving import Stop, halt_above, solve_puzzles
from tafkir.models.trm import Trm
from tafkir.recipe.seeds import derive_seed

__all__ = ["Accept", "Runs", "Search", "search_puzzles"]

Accept = Callable[[int, Cells], bool]
"""Whether an answer [L] to a puzzle, by number, is known to be right."""


@dataclass(frozen=True, slots=True)
class Search:
    """How often a puzzle is solved, and how its runs differ.

    Attributes:
        runs: R.
        noise: standard deviation of what is added to z before each supervision step of the runs but the first.
        permute: every run but the first sees the puzzle in another form, such as turned or with other digits.
        pick: which run's answer counts where no rules say so: the most confident one's, or that of most runs.
        seed: of noise and forms.

    Raises:
        RequestError: no runs, negative noise, or several runs that would all be equal.
    """

    runs: int = 1
    noise: float = 0.0
    permute: bool = False
    pick: Literal["q", "vote"] = "q"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise RequestError(f"runs is {self.runs}", expected="at least 1")
        if self.noise < 0:
            raise RequestError(f"noise is {self.noise:g}", expected="0 or more")
        if self.runs > 1 and not self.noise and not self.permute:
            raise RequestError(f"{self.runs} runs would all be equal", fix="add noise, such as 0.3, or permute")


@dataclass(frozen=True, slots=True)
class Runs:
    """Answers after each supervision step of each run, as forms of the puzzle that was asked.

    Attributes:
        answers: tokens [K, R, N, L].
        q_halt: logits [K, R, N].
    """

    answers: Cells
    q_halt: NDArray[np.float32]

    def first(self, accept: Accept, puzzle: int = 0) -> tuple[int, int] | None:
        """The first step, and of that step the first run (both from 0), whose answer to a puzzle is accepted."""
        for step, answers in enumerate(self.answers[:, :, puzzle]):
            for run, answer in enumerate(answers):
                if accept(puzzle, answer):
                    return step, run
        return None

    def ends(self, halt_threshold: float | None) -> NDArray[np.int64]:
        """The step (from 0) that each run's answer is taken at: q above the threshold, or the last; [R, N]."""
        above = np.zeros(self.q_halt.shape, dtype=bool) if halt_threshold is None else self.q_halt > halt_threshold
        above[-1] = True
        first: NDArray[np.int64] = above.argmax(0)
        return first

    def pick(self, rule: Literal["q", "vote"], halt_threshold: float | None = None) -> NDArray[np.int64]:
        """The run that counts for each puzzle [N]: the most confident, or one of the most frequent answer.

        Of equally frequent answers the one with the higher mean confidence, and of its runs the most confident.
        """
        ends = self.ends(halt_threshold)
        runs, puzzles = np.arange(ends.shape[0])[:, None], np.arange(ends.shape[1])[None]
        q = self.q_halt[ends, runs, puzzles].astype(np.float64)
        if rule == "vote":
            answers, confidence = self.answers[ends, runs, puzzles], 1 / (1 + np.exp(-q))
            for puzzle in range(q.shape[1]):
                found: dict[bytes, list[int]] = {}
                for run, answer in enumerate(answers[:, puzzle]):
                    found.setdefault(answer.tobytes(), []).append(run)
                best = max(found.values(), key=lambda own: (len(own), confidence[own, puzzle].mean()))
                q[~np.isin(runs[:, 0], best), puzzle] = -np.inf
        chosen: NDArray[np.int64] = q.argmax(0)
        return chosen

    def taken(self, rule: Literal["q", "vote"], halt_threshold: float | None = None) -> Cells:
        """The answers that count, [N, L]."""
        chosen, puzzles = self.pick(rule, halt_threshold), np.arange(self.answers.shape[2])
        ends = self.ends(halt_threshold)[chosen, puzzles]
        found: Cells = self.answers[ends, chosen, puzzles]
        return found


def search_puzzles(
    model: Trm,
    format: PuzzleFormat,
    inputs: Cells,
    search: Search,
    *,
    puzzle_ids: PuzzleIds | None = None,
    steps: int | None = None,
    halt_threshold: float | None = None,
    accept: Accept | None = None,
    batch_size: int = 256,
) -> Runs:
    """Several runs of every puzzle.

    Args:
        inputs: tokens [N, L].
        puzzle_ids: rows [N] of the table of puzzle vectors; not given, row 0.
        steps: supervision steps at most, N_sup where not given.
        halt_threshold: a run ends at the first step with q above this; not given, after all steps.
        accept: a puzzle whose answer it accepts ends with all its runs of the batch, at that step.
        batch_size: runs at once.

    Raises:
        RequestError: `permute`, and no other form of such a puzzle is known.
        DataError: the model is made for another number of cells.
    """
    forms = _draw_forms(format, len(inputs), search)
    shown = np.stack([form.apply(inputs[row % len(inputs)]) for row, form in enumerate(forms)])
    levels = np.repeat([0.0] + [search.noise] * (search.runs - 1), len(inputs)).astype(np.float32)
    solved = solve_puzzles(
        model,
        shown,
        puzzle_ids=None if puzzle_ids is None else np.tile(puzzle_ids, search.runs),
        steps=steps,
        batch_size=batch_size,
        noise=levels,
        seed=derive_seed(search.seed, "noise"),
        stop=_stop(forms, len(inputs), halt_threshold, accept),
    )
    answers = np.stack([form.undo(solved.answers[:, row]) for row, form in enumerate(forms)], axis=1)
    size = (len(answers), search.runs, len(inputs))
    return Runs(answers.reshape(*size, -1), solved.q_halt.reshape(size))


def _draw_forms(format: PuzzleFormat, count: int, search: Search) -> list[Symmetry]:
    """The form of each run of each puzzle, run by run."""
    plain = identity(format.num_cells, format.vocab_size)
    if not search.permute:
        return [plain] * (search.runs * count)
    draw = symmetry_of(format)
    if draw is None:
        raise RequestError(
            f"no other form of puzzles of kind {format.kind!r} is known",
            where="permute",
            fix="use noise, or say in the recipe of your own grids whether they turn and what is exchangeable",
        )
    drawn = [draw(Random(derive_seed(search.seed, "form", row))) for row in range((search.runs - 1) * count)]
    return [plain] * count + drawn


def _stop(forms: list[Symmetry], count: int, halt_threshold: float | None, accept: Accept | None) -> Stop | None:
    if accept is None:
        return None if halt_threshold is None else halt_above(halt_threshold)

    def stop(rows: NDArray[np.int64], answers: Cells, q_halt: NDArray[np.float32]) -> NDArray[np.bool_]:
        puzzles = rows % count
        found = {
            puzzle
            for row, puzzle, answer in zip(rows.tolist(), puzzles.tolist(), answers, strict=True)
            if accept(puzzle, forms[row].undo(answer))
        }
        done: NDArray[np.bool_] = np.isin(puzzles, list(found))
        return done if halt_threshold is None else done | (q_halt > halt_threshold)

    return stop
