"""ARC tasks of a recipe by part: which pairs are trained on, which are held out, and the forms of each task.

A form of a task is one puzzle of the model, with a row of its own in the table of puzzle vectors; row 0 is nobody's.

Shapes: N puzzles, L cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from tafkir.data.puzzles.arc import ArcPair, ArcTask, read_tasks
from tafkir.data.puzzles.canvas import Form, TaskForm, arc_format, draw_forms, kept_turns, parse_form, place
from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.leakage import clean_tests, known_pairs, shared_tasks, training_pairs
from tafkir.data.puzzles.parts import PuzzleSet, PuzzleSets, Samples, SampleStream
from tafkir.errors import DataError
from tafkir.recipe.puzzles import ArcPuzzles
from tafkir.recipe.seeds import derive_seed

__all__ = ["BLANK_ID", "ArcSets", "ArcStream", "TaskForms", "build_arc", "known_forms"]

BLANK_ID: TaskForm = "<blank>"
"""What row 0 is called in `identifiers.json`."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskForms:
    """A task with its forms, and the row of each in the table of puzzle vectors.

    `pairs` are what training may see of it. `scored` are the test inputs whose outputs count, see `clean_tests`.
    """

    task: ArcTask
    forms: tuple[Form, ...]
    ids: tuple[int, ...]
    pairs: tuple[ArcPair, ...] = ()
    scored: tuple[int, ...] = ()

    @property
    def names(self) -> list[TaskForm]:
        return [form.name(self.task.id) for form in self.forms]


@dataclass(frozen=True, slots=True)
class ArcSets(PuzzleSets):
    """ARC tasks: `train`, `validation` and `test` hold pairs of the tasks as they are, the stream shows their forms.

    Attributes:
        tasks: all that training knows, measured ones first.
        held_out: of the measured tasks those that choose the checkpoint, and those that are only measured on.
        leaked: test inputs of measured tasks that are not scored, for training sees their outputs, see `clean_tests`.
        excluded: ids of the tasks that were left out, for they share a pair with measured ones.
    """

    tasks: tuple[TaskForms, ...]
    held_out: dict[str, tuple[TaskForms, ...]]
    leaked: int
    excluded: tuple[str, ...]

    @property
    def num_puzzle_ids(self) -> int:
        return 1 + sum(len(task.forms) for task in self.tasks)

    @property
    def identifiers(self) -> list[TaskForm]:
        return [BLANK_ID, *(name for task in self.tasks for name in task.names)]

    def counts(self) -> dict[str, int]:
        parts = {f"{part}_tasks": len(tasks) for part, tasks in self.held_out.items()}
        others = {"tasks": len(self.tasks), "puzzle_ids": self.num_puzzle_ids, "leaked": self.leaked}
        return {**super(ArcSets, self).counts(), **parts, **others, "excluded_tasks": len(self.excluded)}

    def stream(self, *, augment: bool, seed: int) -> SampleStream:
        return ArcStream(self.tasks, self.format, translate=augment, seed=seed)


def build_arc(config: ArcPuzzles, seed: int) -> ArcSets:
    """The tasks that a recipe names. Equal arguments and files, equal tasks, forms and rows.

    Raises:
        DataError: a file is not what it should be; a grid does not fit the canvas; tasks of `train_paths` are measured
            ones, which `overlap` refuses; or too few tasks have outputs to measure by.
    """
    measured = read_tasks(config.path)
    others, excluded = _apart(config, measured, [task for path in config.train_paths for task in read_tasks(path)])
    rows, columns = config.canvas or _fit([*measured, *others])
    format = arc_format(rows, columns)
    turns = kept_turns(rows, columns) if config.dihedral else (0,)
    clean = clean_tests(measured, others)
    tasks: list[TaskForms] = []
    leaked, first_id = 0, 1
    for task in [*measured, *others]:
        random = Random(derive_seed(seed, "forms", task.id))
        forms = draw_forms(random, task, config.num_copies, turns=turns, recolour=config.recolour)
        own = len(tasks) < len(measured)
        scored = clean[len(tasks)] if own else ()
        leaked += sum(pair.output is not None for pair in task.test) - len(scored) if own else 0
        ids = tuple(range(first_id, first_id + len(forms)))
        tasks.append(TaskForms(task, tuple(forms), ids, training_pairs(task, measured=own), scored))
        first_id += len(forms)
    held_out = _share_out([task for task in tasks[: len(measured)] if task.scored], config)
    train = _pairs(format, [(task, task.pairs) for task in tasks])
    validation, test = (
        _pairs(format, [(task, [task.task.test[i] for i in task.scored]) for task in held_out[part]])
        for part in ("validation", "test")
    )
    return ArcSets(format, train, validation, test, None, tuple(tasks), held_out, leaked, excluded)


def _apart(
    config: ArcPuzzles, measured: Sequence[ArcTask], others: list[ArcTask]
) -> tuple[list[ArcTask], tuple[str, ...]]:
    """The tasks of `train_paths` that are none of the measured ones, and the ids of those that are."""
    if not others:
        return [], ()
    shared = shared_tasks(others, known_pairs(measured))
    if shared and config.overlap == "refuse":
        examples = ", ".join(task.id for task in shared[:3])
        raise DataError(
            f"{len(shared)} of {len(others)} tasks share a pair with tasks that are measured, such as {examples}",
            where="trm.puzzles.train_paths",
            expected="tasks that are not measured: else their test outputs would be trained on",
            fix='set overlap = "exclude" to leave them out, or take the set out of train_paths',
        )
    taken = {task.id for task in measured}
    left = [task for task in others if all(task is not other for other in shared)]
    for task in left:
        if task.id in taken:
            raise DataError(f"another task is called {task.id!r}, too", where=task.where, fix="rename one of them")
        taken.add(task.id)
    return left, tuple(task.id for task in shared)


def _fit(tasks: Iterable[ArcTask]) -> tuple[int, int]:
    """The fewest rows and columns that hold every grid; of a square as soon as no grid has a single row or column."""
    pairs = [pair for task in tasks for pair in (*task.train, *task.test)]
    shapes = [grid.shape for pair in pairs for grid in (pair.input, pair.output) if grid is not None]
    rows, columns = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    return (rows, columns) if 1 in (rows, columns) else (max(rows, columns),) * 2


def _share_out(tasks: Sequence[TaskForms], config: ArcPuzzles) -> dict[str, tuple[TaskForms, ...]]:
    """By a hash of the id, so that tasks which are added move no others."""
    order = sorted(tasks, key=lambda task: hashlib.blake2b(task.task.id.encode(), digest_size=8).digest())
    if len(order) < 2:
        raise DataError(
            f"{len(order)} tasks have test outputs that can be scored",
            where=config.path,
            expected="at least two: one to choose the checkpoint by, one to measure on",
            fix="give tasks with outputs as path, and tasks without under train_paths",
        )
    count = min(config.num_validation, len(order) // 2)
    return {"validation": tuple(order[:count]), "test": tuple(order[count : count + config.num_test])}


def _pairs(format: PuzzleFormat, tasks: Iterable[tuple[TaskForms, Sequence[ArcPair]]]) -> PuzzleSet:
    """Pairs on the canvas, each with the row of its task."""
    inputs, labels, ids = [], [], []
    for task, pairs in tasks:
        for pair in pairs:
            question, answer = _lay(format, task.task, pair, Form())
            inputs.append(question)
            labels.append(answer)
            ids.append(task.ids[0])
    return PuzzleSet(np.stack(inputs), np.stack(labels), np.array(ids, dtype=np.int64))


def _lay(
    format: PuzzleFormat, task: ArcTask, pair: ArcPair, form: Form, move: Random | None = None
) -> tuple[Cells, Cells]:
    """Both grids of a pair in a form, at the same place of the canvas: its corner, or one that is drawn."""
    assert pair.output is not None
    question, answer = form.apply(pair.input), form.apply(pair.output)
    top = left = 0
    if move is not None:
        top = move.randint(0, max(0, format.rows - max(len(question), len(answer))))
        left = move.randint(0, max(0, format.columns - max(question.shape[1], answer.shape[1])))
    try:
        return place(question, format.rows, format.columns, top, left), place(
            answer, format.rows, format.columns, top, left
        )
    except DataError as error:
        raise DataError(error.what, where=task.where, expected=error.expected, fix=error.fix) from error


def known_forms(tasks: Iterable[ArcTask], identifiers: Sequence[TaskForm]) -> list[TaskForms | None]:
    """The forms of each task that have rows, from the names of all rows; None where a task has none.

    Raises:
        DataError: a name names no form.
    """
    tasks = list(tasks)
    rows: dict[str, list[tuple[int, Form]]] = {task.id: [] for task in tasks}
    for row, name in enumerate(identifiers):
        task_id, form = parse_form(name)
        if task_id in rows:
            rows[task_id].append((row, form))
    found = [(task, rows[task.id]) for task in tasks]
    return [
        TaskForms(task, tuple(form for _, form in own), tuple(row for row, _ in own)) if own else None
        for task, own in found
    ]


class ArcStream:
    """Training samples by number: an epoch shows every training pair once, each task in one form that is drawn for it.

    Pairs of a task stay together, as in the reference. A sample depends on the seed and its number alone.
    """

    def __init__(self, tasks: Sequence[TaskForms], format: PuzzleFormat, *, translate: bool, seed: int) -> None:
        self._tasks, self._format, self._translate, self._seed = tasks, format, translate, seed
        self._num_pairs = sum(len(task.pairs) for task in tasks)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def take(self, first: int, size: int) -> Samples:
        """The samples from number `first` on."""
        inputs, labels, ids = [], [], []
        for number in range(first, first + size):
            epoch, place_in_epoch = divmod(number, self._num_pairs)
            index, form, pair, moves = self._order(epoch)[place_in_epoch]
            task = self._tasks[index]
            move = Random(derive_seed(self._seed, "place", number)) if moves else None
            question, answer = _lay(self._format, task.task, task.pairs[pair], task.forms[form], move)
            inputs.append(question)
            labels.append(answer)
            ids.append(task.ids[form])
        return Samples(np.stack(inputs), np.stack(labels), np.array(ids, dtype=np.int64))

    def _shuffle(self, epoch: int) -> list[tuple[int, int, int, bool]]:
        """Task, form, pair, and whether it is moved: of each form that is shown, one pair stays in the corner."""
        random = Random(derive_seed(self._seed, "epoch", epoch))
        order = list(range(len(self._tasks)))
        random.shuffle(order)
        samples = []
        for index in order:
            task = self._tasks[index]
            form = random.randrange(len(task.forms))
            pairs = random.sample(range(len(task.pairs)), len(task.pairs))
            still = random.choice(pairs)
            samples += [(index, form, pair, self._translate and pair != still) for pair in pairs]
        return samples
