"""Needles in a haystack: numbers hidden at a known depth of a text of a known length, and one asked for at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random
from typing import Any

from tafkir.errors import DataError
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, Message, Split, Verdict
from tafkir.tasks.answers import read_value
from tafkir.tasks.math import WordProblems

__all__ = ["FILLER", "NAMES", "NUMBERS", "Haystack", "Needles", "make_haystack", "render_question"]

FILLER = tuple(
    "apple boat bread brook chair cloud coat dust fern field fire floor grass hill ice lamp leaf mist moon moss "
    "night oak path pond rain reed river road roof root salt sand sea snow stone storm straw sun wave wind".split()
)
"""What the haystack is made of: lower-case words, none of them a name or a number."""

NAMES = tuple(
    "Adam Amal Anna Ben Clara Dalia David Emil Farah Hana Hugo Ida Jonas Karim Laila Leo Maria Nadia Nils Omar Paul "
    "Rania Rosa Salim Samira Tariq Tom Vera Walid Yara Yusuf Zoe".split()
)
"""Keys: each stands for one number in a haystack."""

NUMBERS = tuple(str(number) for number in range(10, 100))
"""Values; no two needles of a haystack share one."""


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text of words with needles `name: number.` in it.

    Attributes:
        words: the text; a needle is two words that stand together.
        needles: names and numbers, in the order of the text.
        asked: which of `needles` is asked for.
    """

    words: tuple[str, ...]
    needles: tuple[tuple[str, str], ...]
    asked: int

    @property
    def name(self) -> str:
        return self.needles[self.asked][0]

    @property
    def number(self) -> str:
        return self.needles[self.asked][1]


def make_haystack(seed: int, *, num_words: int, num_needles: int, depth: float | None = None) -> Haystack:
    """A haystack that is a pure function of its arguments.

    Args:
        seed: of words, names, numbers and places.
        num_words: length of the text; every needle takes two.
        num_needles: how many names there are. More than one makes it RULER's multi-key test (arXiv 2404.06654): the
            right number must be found by its name.
        depth: where the asked needle stands: 0 at the beginning, 1 at the end of the text, None anywhere.

    Raises:
        DataError: the needles do not fit, or the depth is no share.
    """
    if not 1 <= num_needles <= len(NAMES):
        raise DataError(f"{num_needles} needles", expected=f"1 to {len(NAMES)}, the names that there are")
    if 2 * num_needles > num_words:
        raise DataError(
            f"{num_needles} needles do not fit into {num_words} words",
            expected=f"at least {2 * num_needles} words",
            fix="ask for a longer text or for fewer needles",
        )
    if depth is not None and not 0 <= depth <= 1:
        raise DataError(f"depth {depth}", expected="a share of the text, 0 (its beginning) to 1 (its end)")
    random = Random(derive_seed(seed, "haystack"))
    needles = tuple(zip(random.sample(NAMES, num_needles), random.sample(NUMBERS, num_needles), strict=True))
    num_items = num_words - num_needles
    place = random.randrange(num_items) if depth is None else round(depth * (num_items - 1))
    others = random.sample([i for i in range(num_items) if i != place], num_needles - 1)
    places = sorted([place, *others])
    words = random.choices(FILLER, k=num_words - 2 * num_needles)
    for before, (i, (name, number)) in enumerate(zip(places, needles, strict=True)):
        at = i + before  # each needle before it is one item of two words
        words[at:at] = [f"{name}:", f"{number}."]
    return Haystack(tuple(words), needles, places.index(place))


def render_question(text: str, name: str) -> str:
    """The text and the question for a name's number."""
    return f"{text}\n\nWhat number stands after {name} in this text?"


class Needles:
    """The needle test as a task: every length with every depth, `samples` haystacks each.

    An example's `source` is its length, so that scores come out by length; `extra` holds `length`, `depth` and the
    other needles.

    Args:
        lengths: of the haystack, in words, or in whatever `measure` counts.
        depths: where the asked needle stands, as shares of the text.
        samples: haystacks for each length and depth.
        num_needles: names in each haystack, one of which is asked for.
        seed: the same seed gives the same examples.
        measure: from a text to its length, such as `lambda text: len(tokenizer.encode(text))`; a haystack then comes
            close to the length and does not exceed it. None counts words.
        split: the part that the examples belong to; nothing is trained on them.

    Raises:
        DataError: a depth is no share, or the needles do not fit into a length.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        *,
        samples: int = 20,
        num_needles: int = 4,
        seed: int = 0,
        measure: Callable[[str], int] | None = None,
        split: Split = "test",
    ) -> None:
        self._measure, self._num_needles, self._split = measure, num_needles, split
        self._grader = WordProblems(name=self.name)
        self._examples = [
            self._example(length, depth, i, derive_seed(seed, f"needle {length} {depth}", i))
            for length in lengths
            for depth in depths
            for i in range(samples)
        ]

    @property
    def name(self) -> str:
        return "needle"

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples, shortest length and first depth first; none in another split than the task's own."""
        return self._examples if split == self._split else []

    def prompt(self, example: Example) -> list[Message]:
        """The haystack and the question after it."""
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Reward 1 for the asked number, compared as `WordProblems` compares; a number of another needle is named."""
        verdict = self._grader.grade(example, text, finished=finished)
        value = read_value(verdict.extracted) if verdict.outcome == "wrong" and verdict.extracted else None
        if value is not None:
            for name, number in example.extra["others"].items():
                if value.equals(Fraction(number)):
                    return replace(verdict, reason=f"the number of {name}")
        return verdict

    def _example(self, length: int, depth: float, index: int, seed: int) -> Example:
        haystack = self._haystack(length, depth, seed)
        extra: dict[str, Any] = {
            "length": length,
            "depth": depth,
            "others": {name: number for name, number in haystack.needles if name != haystack.name},
        }
        question = render_question(" ".join(haystack.words), haystack.name)
        return Example(f"needle-{length}-{depth:g}-{index}", str(length), self._split, question, haystack.number, extra)

    def _haystack(self, length: int, depth: float, seed: int) -> Haystack:
        def make(num_words: int) -> Haystack:
            return make_haystack(seed, num_words=num_words, num_needles=self._num_needles, depth=depth)

        measure = self._measure
        if measure is None:
            return make(length)

        # Another number of words is another text, whose words may be longer: aim a few times, then shorten.
        num_words = max(64, 2 * self._num_needles)
        made = make(num_words)
        for _ in range(4):
            size = measure(" ".join(made.words))
            num_words = max(2 * self._num_needles, num_words * length // size)
            made = make(num_words)
        while measure(" ".join(made.words)) > length:
            num_words -= 1
            made = make(num_words)
        return made
