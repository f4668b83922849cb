"""The puzzles of a recursive model as a task for any model: asked in text, and judged by one grader.

A recursive model's grid and a language model's words go the same way: text, then the cells that it spells out, then the
rules (or, where none are known, the one right answer).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.format import PAD, Cells, PuzzleFormat
from tafkir.data.puzzles.maze import MOVES, shortest_path
from tafkir.data.puzzles.rules import has_rules, is_right
from tafkir.data.puzzles.sets import PuzzleSet, PuzzleSets, build_puzzles
from tafkir.data.puzzles.sudoku import Box, fingerprint
from tafkir.data.puzzles.symmetry import dihedral_moves
from tafkir.errors import DataError, RecipeError
from tafkir.recipe.bundled import bundled_recipes, find_recipe
from tafkir.recipe.load import load_recipe
from tafkir.recipe.puzzles import Puzzles
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, Message, Outcome, Split, Verdict
from tafkir.tasks.answers import extract_text, normalize
from tafkir.tasks.arc_task import ArcSetTask
from tafkir.tasks.puzzles.grids import ask_grids
from tafkir.tasks.puzzles.maze import ask_maze, read_moves
from tafkir.tasks.puzzles.sudoku import ask_sudoku

__all__ = [
    "PuzzleSetTask",
    "build_for",
    "form_mark",
    "load_puzzle_task",
    "puzzle_task_names",
    "read_answer",
    "read_question",
]

_PREFIX = "trm-"
# What may stand between cells: spaces, frames, brackets, commas, LaTeX's & and \\.
_BETWEEN = re.compile(r"[\s|+,;\[\]()_-]|\\\\|&")
# Text has dots where a maze's tokens have spaces, and E where they have G.
_AS_TEXT, _FROM_TEXT = str.maketrans(" G", ".E"), str.maketrans(".E", " G")
_ASCII = frozenset(map(chr, range(128)))
_DEMONSTRATIONS = 3


class PuzzleSetTask:
    """Puzzles of a recipe's `[trm.puzzles]`, or others of one size.

    Args:
        name: what reports call the task.
        puzzles: by part.
        origin: the table and the seed that they are made by.
    """

    def __init__(self, name: str, puzzles: PuzzleSets, origin: tuple[Puzzles, int] | None = None) -> None:
        self._name, self.puzzles, self.origin = name, puzzles, origin

    @property
    def name(self) -> str:
        return self._name

    @property
    def format(self) -> PuzzleFormat:
        """Size and symbols of the grids."""
        return self.puzzles.format

    def examples(self, split: Split) -> Sequence[Example]:
        """The puzzles of one part; an id is a hash of its question."""
        part = self._part(split)
        return [self._example(split, *pair) for pair in zip(part.inputs, part.labels, strict=True)]

    def cells(self, examples: Sequence[Example]) -> Cells:
        """The questions as tokens [N, L]."""
        return np.array([example.extra["question"] for example in examples], dtype=np.uint8)

    def prompt(self, example: Example) -> list[Message]:
        """The question, which says itself how to answer."""
        return [Message("user", example.question)]

    def solution(self, example: Example) -> tuple[str, str]:
        """No chain of thought, and the final answer: what a language model can be trained on."""
        return "", f"\\boxed{{{example.answer}}}"

    def write(self, answer: Cells) -> str:
        """A grid as the text of an assistant turn."""
        return f"\\boxed{{{_grid_text(self.format, answer)}}}"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 for an answer that keeps the rules, or equals the right one where no rules are known."""
        found = extract_text(text, finished=finished)
        if found.text is None:
            return _verdict(example, "no_answer" if finished else "length", None, found.reason)
        question = np.array(example.extra["question"], dtype=np.uint8)
        try:
            answer = read_answer(self.format, question, found.text)
        except DataError as error:
            return _verdict(example, "wrong", found.text[:200], str(error))
        label = np.array(example.extra["label"], dtype=np.uint8)
        wrong = int(((answer != label) & (label != PAD)).sum())
        right = is_right(self.format, question, answer) if has_rules(self.format) else wrong == 0
        reason = "" if right else f"{wrong} of {int((label != PAD).sum())} cells are wrong"
        return _verdict(example, "correct" if right else "wrong", found.text, reason)

    def _part(self, split: Split) -> PuzzleSet:
        parts: Mapping[Split, PuzzleSet] = {
            "train": self.puzzles.train,
            "validation": self.puzzles.validation,
            "test": self.puzzles.test,
        }
        return parts[split]

    def _example(self, split: Split, question: Cells, label: Cells) -> Example:
        text = self._ask(question)
        mark = hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
        answer = _moves(self.format, label) if self.format.kind == "maze" else _grid_text(self.format, label)
        extra = {"question": question.tolist(), "label": label.tolist()}
        return Example(f"{self.name}/{mark}", self.name, split, text, answer, extra)

    def _ask(self, question: Cells) -> str:
        rows = self.format.show(question)
        if self.format.kind == "sudoku":
            assert self.format.box is not None
            return ask_sudoku(rows, Box(*self.format.box))
        if self.format.kind == "maze":
            return ask_maze(rows.translate(_AS_TEXT))
        train = self.puzzles.train
        shown = zip(train.inputs[:_DEMONSTRATIONS], train.labels[:_DEMONSTRATIONS], strict=True)
        pairs = [(self.format.show(grid), self.format.show(answer)) for grid, answer in shown]
        return ask_grids(pairs, rows)


def _verdict(example: Example, outcome: Outcome, extracted: str | None, reason: str) -> Verdict:
    return Verdict(outcome, 1.0 if outcome == "correct" else 0.0, extracted, example.answer, reason)


# ---- tasks by name -----------------------------------------------------------------------------------------------


def puzzle_task_names() -> list[str]:
    """Tasks that go by a name: `sudoku4` is the puzzles of the bundled recipe `trm-sudoku4`."""
    return [name.removeprefix(_PREFIX) for name in bundled_recipes() if name.startswith(_PREFIX)]


def load_puzzle_task(name: str) -> PuzzleSetTask | ArcSetTask:
    """The puzzles of a bundled recipe (`sudoku4` for `trm-sudoku4`) or of a recipe file, as its seed makes them.

    Raises:
        RecipeError: there is no such recipe, or it has no table [trm].
        DataError: its puzzles cannot be read or made.
    """
    bundled = puzzle_task_names()
    if name not in bundled and not name.endswith(".toml"):
        raise RecipeError(
            f"no task is called {name!r}",
            where="--task",
            expected=f"problems, needle, {', '.join(bundled)}, or a recipe file with [trm.puzzles]",
        )
    path = find_recipe(f"{_PREFIX}{name}" if name in bundled else name)
    recipe = load_recipe([path]).recipe
    if recipe.trm is None:
        raise RecipeError("the recipe has no puzzles", where=name, expected="a table [trm.puzzles]")
    own_name, puzzles = name if name in bundled else path.stem, build_for(recipe.trm.puzzles, recipe.seed)
    if isinstance(puzzles, ArcSets):
        return ArcSetTask(own_name, puzzles)
    return PuzzleSetTask(own_name, puzzles, (recipe.trm.puzzles, recipe.seed))


def build_for(puzzles: Puzzles, seed: int) -> PuzzleSets:
    """The puzzles as the stage `trm` of a recipe with that seed has them."""
    return build_puzzles(puzzles, derive_seed(seed, "trm", "puzzles"))


def form_mark(format: PuzzleFormat, question: Cells) -> int:
    """A number that all forms of a puzzle share: those of a Sudoku, and turned or mirrored grids else."""
    if format.kind == "sudoku":
        assert format.box is not None
        return fingerprint(question, Box(*format.box))
    least = min(question[moves].tobytes() for moves in dihedral_moves(format.rows, format.columns))
    return int.from_bytes(hashlib.blake2b(least, digest_size=8).digest(), "big")


# ---- grids and moves in text -------------------------------------------------------------------------------------


def read_question(format: PuzzleFormat, text: str) -> Cells:
    """The grid of a question: alone, or inside the prompt that a task asks it with.

    Raises:
        DataError: there is no grid of this format.
    """
    lines = text.strip("\n").split("\n")
    for first in range(len(lines) - format.rows, -1, -1):
        block = lines[first : first + format.rows]
        if all(len(line) == format.columns for line in block):
            return _read_grid(format, "\n".join(block))
    return _read_grid(format, text)


def read_answer(format: PuzzleFormat, question: Cells, text: str) -> Cells:
    """The tokens that an answer spells out: a whole grid however laid out, or for a maze the moves from S.

    Raises:
        DataError: it has another number of cells, other symbols, or a move that cannot be made.
    """
    if format.kind == "maze":
        moves = read_moves(text)
        if moves and set(moves) <= set(MOVES):
            return _mark(format, question, moves)
    return _read_grid(format, text)


def _grid_text(format: PuzzleFormat, cells: Cells) -> str:
    rows = format.show(cells)
    if format.kind == "sudoku":
        return rows.replace("\n", " ")
    return rows.translate(_AS_TEXT) if format.kind == "maze" else rows


def _read_grid(format: PuzzleFormat, text: str) -> Cells:
    own = set("".join(format.symbols))
    signs = _BETWEEN.sub(lambda found: found[0] if found[0] in own else "", text if own - _ASCII else normalize(text))
    if format.kind == "maze":
        signs = signs.translate(_FROM_TEXT)
    elif format.blank is not None:
        signs = signs.upper()
    return format.encode(signs)


def _moves(format: PuzzleFormat, answer: Cells) -> str:
    """The way that a maze's answer marks, as letters."""
    rows = format.show(answer).replace(" ", "#").split("\n")
    places = {sign: (r, row.index(sign)) for r, row in enumerate(rows) for sign in "SG" if sign in row}
    return shortest_path(rows, places["S"], places["G"]) or ""


def _mark(format: PuzzleFormat, question: Cells, moves: str) -> Cells:
    """The maze with the places marked that moves from S lead through."""
    signs = [list(row) for row in format.show(question).split("\n")]
    row, column = next((r, line.index("S")) for r, line in enumerate(signs) if "S" in line)
    for number, move in enumerate(moves, start=1):
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        if not (0 <= row < format.rows and 0 <= column < format.columns) or signs[row][column] == "#":
            raise DataError(f"move {number} ({move}) runs into a wall")
        if signs[row][column] == " ":
            signs[row][column] = "o"
    if signs[row][column] != "G":
        raise DataError(f"{len(moves)} moves end before E")
    return format.encode([sign for line in signs for sign in line])
