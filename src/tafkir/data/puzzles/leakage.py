"""Whether tasks that are trained on hold what is measured: pairs are compared in all their turns and colours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from tafkir.data.puzzles.arc import ArcGrid, ArcPair, ArcTask
from tafkir.data.puzzles.canvas import turn

__all__ = ["clean_tests", "known_pairs", "mark_pair", "shared_tasks", "training_pairs"]


def mark_pair(pair: ArcPair) -> bytes:
    """The same 16 bytes for a pair in all its forms: turned, mirrored, with the colours 1 to 9 exchanged."""
    assert pair.output is not None
    sides = [(turn(pair.input, number), turn(pair.output, number)) for number in range(8)]
    return min(_first_come(question, answer) for question, answer in sides)


def _first_come(question: ArcGrid, answer: ArcGrid) -> bytes:
    """A hash of the pair with its colours renamed in the order in which they turn up; 0 stays."""
    cells = np.concatenate(([0], question.reshape(-1), answer.reshape(-1)))
    colours, first, inverse = np.unique(cells, return_index=True, return_inverse=True)
    ranks = np.empty(len(colours), dtype=np.uint8)
    ranks[np.argsort(first)] = np.arange(len(colours), dtype=np.uint8)
    return hashlib.blake2b(bytes((*question.shape, *answer.shape)) + ranks[inverse].tobytes(), digest_size=16).digest()


def training_pairs(task: ArcTask, *, measured: bool) -> tuple[ArcPair, ...]:
    """The pairs of a task that training may see: of a measured task its demonstrations, else all that have outputs."""
    return task.train if measured else (*task.train, *(pair for pair in task.test if pair.output is not None))


def known_pairs(tasks: Iterable[ArcTask]) -> set[bytes]:
    """Marks of all pairs of tasks."""
    return {mark_pair(pair) for task in tasks for pair in training_pairs(task, measured=False)}


def shared_tasks(tasks: Sequence[ArcTask], measured: AbstractSet[bytes]) -> list[ArcTask]:
    """The tasks that share a pair with measured ones, whose marks these are: the same tasks, or parts of them."""
    return [task for task in tasks if not measured.isdisjoint(known_pairs([task]))]


def clean_tests(measured: Sequence[ArcTask], others: Iterable[ArcTask]) -> list[tuple[int, ...]]:
    """For each measured task its test inputs whose known outputs training does not see.

    A pair that another task has among its training pairs, in whatever form, is out, and one that is equal to a
    demonstration of its own task. Another form of an own demonstration belongs to the task.
    """
    owners: dict[bytes, set[int]] = {}
    for index, task in enumerate(measured):
        for pair in task.train:
            owners.setdefault(mark_pair(pair), set()).add(index)
    foreign = known_pairs(others)
    found = []
    for index, task in enumerate(measured):
        own = {_exact(pair) for pair in task.train}
        found.append(
            tuple(
                number
                for number, pair in enumerate(task.test)
                if pair.output is not None
                and _exact(pair) not in own
                and (mark := mark_pair(pair)) not in foreign
                and not owners.get(mark, set()) - {index}
            )
        )
    return found


def _exact(pair: ArcPair) -> tuple[bytes, ...]:
    assert pair.output is not None
    return tuple(bytes(grid.shape) + grid.tobytes() for grid in (pair.input, pair.output))
