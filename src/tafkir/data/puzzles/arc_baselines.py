"""What simple rules make of ARC tasks: what a learned answer has to beat.

Shapes: a grid is [R, C], colours 0 to 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tafkir.data.puzzles.arc import ArcGrid, ArcPair, ArcTask
from tafkir.data.puzzles.canvas import turn
from tafkir.data.puzzles.votes import Candidate

__all__ = ["answer_by_copying", "answer_by_rules"]

_Rule = Callable[[ArcGrid], ArcGrid]


def answer_by_copying(task: ArcTask) -> list[list[Candidate]]:
    """The input as it is, for each test input."""
    return [[Candidate(pair.input, 1, 1.0)] for pair in task.test]


def answer_by_rules(task: ArcTask) -> list[list[Candidate]]:
    """Answers of simple rules, the one that holds in the most demonstrations first; equal ones in order of simplicity.

    Rules: the input; a turn or mirror image; colours renamed as in the demonstrations, with or without a turn; the
    outputs' most frequent grid; the input's halves and quarters; twice the input side by side, above, and both.
    """
    rules = list(_rules(task.train))
    known = [(pair.input, pair.output) for pair in task.train if pair.output is not None]
    scores = [sum(np.array_equal(rule(question), answer) for question, answer in known) for rule in rules]
    order = sorted(range(len(rules)), key=lambda index: -scores[index])
    answers = []
    for pair in task.test:
        found: dict[bytes, Candidate] = {}
        for index in order:
            grid = np.ascontiguousarray(rules[index](pair.input))
            key = bytes(grid.shape) + grid.tobytes()
            if grid.size and key not in found:
                found[key] = Candidate(grid, scores[index], scores[index] / len(task.train))
        answers.append(list(found.values()))
    return answers


def _rules(pairs: Sequence[ArcPair]) -> Iterator[_Rule]:
    for number in range(8):
        yield lambda grid, number=number: turn(grid, number)  # type: ignore[misc]  # the default binds the loop's value
    for number in range(8):
        table = _renaming(pairs, number)
        yield lambda grid, number=number, table=table: table[turn(grid, number)]  # type: ignore[misc]
    outputs = [pair.output for pair in pairs if pair.output is not None]
    common = max(outputs, key=lambda output: sum(np.array_equal(output, other) for other in outputs))
    yield lambda _: common
    yield lambda grid: grid[: len(grid) // 2]
    yield lambda grid: grid[(len(grid) + 1) // 2 :]
    yield lambda grid: grid[:, : grid.shape[1] // 2]
    yield lambda grid: grid[:, (grid.shape[1] + 1) // 2 :]
    yield lambda grid: grid[: (len(grid) + 1) // 2, : (grid.shape[1] + 1) // 2]
    for repeats in ((1, 2), (2, 1), (2, 2)):
        yield lambda grid, repeats=repeats: np.tile(grid, repeats)  # type: ignore[misc]


def _renaming(pairs: Sequence[ArcPair], number: int) -> ArcGrid:
    """For each colour the one that stands most often in its place, in demonstrations whose sizes allow it."""
    counts = np.zeros((10, 10), dtype=np.int64)
    for pair in pairs:
        turned = turn(pair.input, number)
        if pair.output is not None and turned.shape == pair.output.shape:
            np.add.at(counts, (turned.reshape(-1), pair.output.reshape(-1)), 1)
    unseen = ~counts.any(1)
    counts[unseen, np.arange(10)[unseen]] = 1
    table: ArcGrid = counts.argmax(1).astype(np.uint8)
    return table
