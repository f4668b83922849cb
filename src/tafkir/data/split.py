"""Which part a problem belongs to: fixed rules on problem ids, written here and nowhere else.

- GSM8K: a row of the test file is a test problem. A row of the training file is a validation problem when the first
  eight bytes of sha256(id) are below 300/7473 of their range (about 300 rows), else a training problem.
- SVAMP: problems are variants of each other, so clusters that share a number-normalised word 10-gram stay together.
  The clusters, in the order of sha256(smallest id), fill the test part to 300 problems and then the validation part
  to 100, a cluster that does not fit being passed over; the rest trains. `datasets/svamp/split.json` holds the outcome,
  so that it can never drift.
- A generated question: by sha256 of its text as it stands, 5 % validation, 15 % test.
- A file of one's own without a `split` field: by sha256 of the number-normalised question, 5 % validation, 15 % test.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from tafkir.data.numbers import number_words
from tafkir.records import Split

__all__ = [
    "assign_clusters",
    "cluster",
    "generated_split",
    "gsm8k_split",
    "normalized_words",
    "own_split",
    "svamp_split",
]

CLUSTER_NGRAM = 10

_WORD = re.compile(r"\d[\d,.]*\d|\d|[^\W\d_]+")
_NUMBER_WORDS = number_words()


def normalized_words(text: str) -> list[str]:
    """Lower-case words with every number, digits or words, replaced by "0"; punctuation is left out."""
    words = _WORD.findall(text.lower().replace("\u2019", "'"))
    return ["0" if word[0].isdigit() or word in _NUMBER_WORDS else word for word in words]


def _position(text: str) -> float:
    """A fixed pseudo-random point of [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def gsm8k_split(id: str, file: Literal["train", "test"]) -> Split:
    """The part of a GSM8K row, by its file and its id such as `gsm8k-train-17`."""
    if file == "test":
        return "test"
    return "validation" if _position(id) < 300 / 7473 else "train"


def own_split(question: str) -> Split:
    """The part of a row that names none: variants of a question that differ only in numbers stay together."""
    return _part_at(_position(" ".join(normalized_words(question))))


def generated_split(question: str) -> Split:
    """The part of a question that a generator made: equal questions are always in the same part."""
    return _part_at(_position(question))


def _part_at(position: float) -> Split:
    return "validation" if position < 0.05 else "test" if position < 0.2 else "train"


@cache
def _svamp_parts() -> dict[str, Split]:
    path = files("tafkir") / "datasets" / "svamp" / "split.json"
    table: dict[Split, list[str]] = json.loads(path.read_text("utf-8"))
    return {id: part for part, ids in table.items() for id in ids}


def svamp_split(id: str) -> Split:
    """The part of an SVAMP problem such as `svamp-chal-17`."""
    return _svamp_parts()[id]


def cluster(texts: Mapping[str, str], ngram: int = CLUSTER_NGRAM) -> list[list[str]]:
    """Ids grouped by shared number-normalised word n-grams (texts shorter than that: by the whole text)."""
    parent = {id: id for id in texts}

    def root(id: str) -> str:
        while parent[id] != id:
            parent[id] = parent[parent[id]]
            id = parent[id]
        return id

    first_with: dict[tuple[str, ...], str] = {}
    for id, text in texts.items():
        words = normalized_words(text)
        for start in range(max(1, len(words) - ngram + 1)):
            other = first_with.setdefault(tuple(words[start : start + ngram]), id)
            parent[root(id)] = root(other)
    groups: dict[str, list[str]] = {}
    for id in texts:
        groups.setdefault(root(id), []).append(id)
    return list(groups.values())


def assign_clusters(clusters: list[list[str]], num_test: int, num_validation: int) -> dict[Split, list[str]]:
    """Whole clusters to parts: test is filled first, then validation; what is left trains. Ids are sorted."""
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for group in sorted(clusters, key=lambda ids: _position(min(ids))):
        if len(parts["test"]) + len(group) <= num_test:
            parts["test"] += group
        elif len(parts["validation"]) + len(group) <= num_validation:
            parts["validation"] += group
        else:
            parts["train"] += group
    return {part: sorted(ids, key=lambda id: (len(id), id)) for part, ids in parts.items()}
