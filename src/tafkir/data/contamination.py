"""Proves that no held-out problem leaks into training: shared wording is found, removed from training and listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tafkir.data.sources import Problem
from tafkir.data.split import normalized_words

__all__ = ["NGRAM", "ContaminationReport", "Overlap", "find_overlaps", "remove_overlaps", "seen_in"]

NGRAM = 13


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training problem that shares `text` (numbers written as 0) with a held-out problem."""

    train_id: str
    heldout_id: str
    text: str


@dataclass(frozen=True, slots=True)
class ContaminationReport:
    """The outcome of the check, as the report prints it.

    `removed` lists the training problems that were taken out, each with one held-out problem it overlaps;
    `remaining` counts the overlaps that a second pass over what stays still finds, and must be 0.
    """

    ngram: int
    num_train: int
    num_heldout: int
    removed: tuple[Overlap, ...]
    remaining: int

    @property
    def clean(self) -> bool:
        return self.remaining == 0


@lru_cache(maxsize=1 << 14)
def _words(question: str) -> tuple[str, ...]:
    return tuple(normalized_words(question))


def _fingerprints(question: str) -> Iterator[tuple[str, ...]]:
    """Every run of 13 number-normalised words, and the whole text where it is shorter."""
    words = _words(question)
    for start in range(max(1, len(words) - NGRAM + 1)):
        yield words[start : start + NGRAM]


def find_overlaps(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[Overlap]:
    """One `Overlap` for each training problem that shares a 13-gram, or a whole shorter text, with a held-out one."""
    owner: dict[tuple[str, ...], str] = {}
    for problem in heldout:
        for words in _fingerprints(problem.question):
            owner.setdefault(words, problem.id)
    overlaps = []
    for problem in train:
        for words in _fingerprints(problem.question):
            if words in owner:
                overlaps.append(Overlap(problem.id, owner[words], " ".join(words)))
                break
    return overlaps


def remove_overlaps(
    train: Sequence[Problem], heldout: Sequence[Problem]
) -> tuple[tuple[Problem, ...], ContaminationReport]:
    """The training problems that share no wording with a held-out one, and the report that proves it."""
    removed = find_overlaps(train, heldout)
    gone = {overlap.train_id for overlap in removed}
    kept = tuple(problem for problem in train if problem.id not in gone)
    remaining = len(find_overlaps(kept, heldout))
    return kept, ContaminationReport(NGRAM, len(kept), len(heldout), tuple(removed), remaining)


def seen_in(questions: Mapping[str, str], texts: Iterable[str]) -> dict[str, str]:
    """Items whose question shares a 13-gram with a text, or is the whole of one where it is shorter, with those words.

    Texts are read once, one at a time; numbers count as alike.
    """
    owners: dict[tuple[str, ...], list[str]] = {}
    for item, question in questions.items():
        for words in _fingerprints(question):
            owners.setdefault(words, []).append(item)
    owners.pop((), None)
    found: dict[str, str] = {}
    for text in texts:
        words = tuple(normalized_words(text))
        for start in range(max(1, len(words) - NGRAM + 1)):
            for item in owners.get(words[start : start + NGRAM], ()):
                found.setdefault(item, " ".join(words[start : start + NGRAM]))
    return found
