"""Teachers of a recursive model: answers to puzzles that come without one, and distributions to imitate.

Soft targets are those of Hinton et al. 2015 (arXiv 1503.02531): both distributions are softened by a temperature T, and
their distance counts T^2 times.

Shapes: B puzzles, L cells, V symbols.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.format import PAD, Cells, PuzzleFormat
from tafkir.data.puzzles.rules import has_rules, is_right
from tafkir.data.puzzles.sets import PuzzleSet, PuzzleSets
from tafkir.errors import CheckpointError, DataError, RecipeError
from tafkir.models.solving import solve_puzzles
from tafkir.ops.stable_max import stable_max_log_probs
from tafkir.recipe.teacher import AnswersTeacher, CheckpointTeacher
from tafkir.recipe.trm import TrmConfig
from tafkir.tasks.answers import extract_text
from tafkir.tasks.puzzle_sets import read_answer, read_question

__all__ = ["SoftTeacher", "Taught", "load_teacher", "teach"]


@dataclass(frozen=True, slots=True)
class Taught:
    """Puzzles whose training part holds what is known or taught, and what became of the teacher's answers."""

    puzzles: PuzzleSets
    counts: dict[str, int]


class SoftTeacher:
    """A recursive model whose last supervision step is imitated.

    Args:
        solver: trained on the same kind of puzzles.
        config: the recipe's `[trm]`, whose teacher it is.
    """

    def __init__(self, solver: TrmCheckpoint, config: TrmConfig, weight: float, temperature: float) -> None:
        self._model, self._loss = solver.model, config.loss
        self.weight, self.temperature = weight, temperature

    def to(self, device: torch.device) -> None:
        """Think on this device."""
        self._model.to(device)

    def logits(self, inputs_BL: Tensor) -> Tensor:
        """What it says of each cell after all its supervision steps, float32 [B, L, V]."""
        for out in self._model.steps(inputs_BL.long()):
            logits = out.logits
        return logits.float()

    def distance(self, logits_BLV: Tensor, targets_BLV: Tensor, inputs_BL: Tensor) -> Tensor:
        """T^2 KL(teacher || student), the mean over the cells of each grid, float32 [B]."""
        student, teacher = (self._log_probs(value.float() / self.temperature) for value in (logits_BLV, targets_BLV))
        distance_BL = (teacher.exp() * (teacher - student)).sum(-1) * self.temperature**2
        inside_BL = inputs_BL != PAD
        return distance_BL.where(inside_BL, 0.0).sum(1) / inside_BL.sum(1).clamp(min=1)

    def _log_probs(self, logits: Tensor) -> Tensor:
        return stable_max_log_probs(logits) if self._loss == "stable_max" else F.log_softmax(logits, -1)


def load_teacher(teacher: CheckpointTeacher, format: PuzzleFormat) -> TrmCheckpoint:
    """The recursive model that a recipe names.

    Raises:
        CheckpointError: it is missing or damaged, or solves other puzzles.
    """
    solver = load_trm(teacher.folder())
    if solver.puzzles != format:
        found, wanted = (f"{kind.kind}, {kind.rows} x {kind.columns}" for kind in (solver.puzzles, format))
        raise CheckpointError(
            f"the teacher solves {found}", where="trm.teacher.checkpoint", expected=wanted, fix="name another one"
        )
    return solver


def teach(config: TrmConfig, puzzles: PuzzleSets, solver: TrmCheckpoint | None) -> Taught:
    """The puzzles with a training part of what is known (the first `num_labelled`) and what the teacher adds.

    Args:
        solver: the teacher, where it is a checkpoint.

    Raises:
        DataError: the file of answers is not what it should be, or nothing is left to train on.
        RecipeError: right answers are to be kept, and no rules are known.
    """
    train, known = puzzles.train, config.num_labelled
    known = len(train) if known is None else min(known, len(train))
    teacher = config.teacher
    counts = {"labelled": known}
    inputs, labels = [train.inputs[:known]], [train.labels[:known]]
    if teacher is not None:
        if teacher.keep == "right" and not has_rules(puzzles.format):
            raise RecipeError(
                f"no rules of {puzzles.format.kind} are known, so right answers cannot be told",
                where="trm.teacher.keep",
                fix='set it to "all"',
            )
        unknown = train.inputs[known:]
        if isinstance(teacher, AnswersTeacher):
            answers = _read_answers(Path(teacher.path), puzzles, unknown, counts)
        else:
            assert solver is not None
            answers = dict(enumerate(solve_puzzles(solver.model, unknown).answers[-1])) if len(unknown) else {}
        counts |= {"unlabelled": len(unknown), "answered": len(answers)}
        if teacher.keep == "right":
            answers = {i: a for i, a in answers.items() if is_right(puzzles.format, unknown[i], a)}
        counts["kept"] = len(answers)
        if answers:
            places = sorted(answers)
            inputs.append(unknown[places])
            labels.append(np.stack([answers[place] for place in places]))
    taught = PuzzleSet(np.concatenate(inputs), np.concatenate(labels))
    if not len(taught):
        raise DataError(
            "no training puzzle has an answer", where="trm", fix="raise num_labelled, or give a teacher that answers"
        )
    return Taught(replace(puzzles, train=taught), counts)


def _read_answers(path: Path, puzzles: PuzzleSets, unknown: Cells, counts: dict[str, int]) -> dict[int, Cells]:
    """The most frequent answer to each of the unlabelled puzzles; answers to others are counted and left out."""
    places = {question.tobytes(): place for place, question in enumerate(unknown)}
    held_out = {q.tobytes() for part in (puzzles.validation, puzzles.test) for q in part.inputs}
    found: dict[int, Counter[bytes]] = {}
    missed = Counter[str]()
    for question, text in _rows(path, puzzles.format):
        mark = question.tobytes()
        if mark not in places:
            missed["held_out" if mark in held_out else "foreign"] += 1
            continue
        boxed = extract_text(text)
        try:
            answer = read_answer(puzzles.format, question, boxed.text or "")
        except DataError:
            missed["unreadable"] += 1
            continue
        found.setdefault(places[mark], Counter())[answer.tobytes()] += 1
    counts |= {name: missed[name] for name in ("held_out", "foreign", "unreadable")}
    best = {place: answers.most_common(1)[0][0] for place, answers in found.items()}
    return {place: np.frombuffer(answer, dtype=np.uint8) for place, answer in best.items()}


def _rows(path: Path, format: PuzzleFormat) -> Iterator[tuple[Cells, str]]:
    """Question and text of every line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({error})", where=str(path)) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"is not JSON ({error.msg})", where=where) from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "text")):
            raise DataError("is no answer", where=where, expected='{"question": "...", "text": "..."}')
        try:
            yield read_question(format, row["question"]), row["text"]
        except DataError as error:
            fix = "give puzzles of this recipe"
            raise DataError(error.what, where=where, expected=error.expected, fix=fix) from error
