"""What each training step reads: pure functions of (seed, step), so a resumed run sees what an unbroken one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from random import Random

from tafkir.data.augment import augment
from tafkir.data.chat import encode_conversation, encode_document, encode_prompt
from tafkir.data.crowded import make_crowded_story
from tafkir.data.drills import drill
from tafkir.data.sources import Problem
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError
from tafkir.recipe.schema import AugmentConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example

__all__ = [
    "EpochOrder",
    "PretrainStream",
    "PromptStream",
    "SftStream",
    "heldout_conversations",
    "heldout_documents",
    "repeat_sources",
]

Ids = list[int]
Mask = list[bool]


class EpochOrder:
    """Indices 0 ... size - 1 again and again, each epoch in an order of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, list(range(size))

    def __getitem__(self, position: int) -> int:
        """The index that stands at `position` of the endless sequence."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            order = list(range(self.size))
            Random(derive_seed(self.seed, "epoch", epoch)).shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[place]


def _with_steps(problems: Sequence[Problem]) -> list[Problem]:
    usable = [problem for problem in problems if problem.steps]
    if not usable:
        raise DataError(
            "no problem has equations to learn from",
            where="data.sources",
            expected="GSM8K-style solutions or an 'equation' field",
            fix="add such a source, or train with rlvr alone",
        )
    return usable


class _Variants:
    """Training problems in epoch order, each time varied afresh."""

    def __init__(self, problems: Sequence[Problem], config: AugmentConfig | None, seed: int) -> None:
        self.problems, self.config, self.seed = problems, config, seed
        self.order = EpochOrder(len(problems), derive_seed(seed, "order"))

    def __getitem__(self, position: int) -> Problem:
        problem = self.problems[self.order[position]]
        if self.config is None:
            return problem
        return augment(problem, derive_seed(self.seed, "augment", position), self.config)


def _make_problem(crowded: bool, seed: int) -> Problem:
    return make_crowded_story(seed) if crowded else make_story(seed)


def repeat_sources(problems: Sequence[Problem], times: Mapping[str, int]) -> list[Problem]:
    """Each problem as often as `times` says for its source (once where it says nothing)."""
    return [problem for problem in problems for _ in range(times.get(problem.source, 1))]


class PretrainStream:
    """Documents for next-token training: problems with solutions, made-up stories, and arithmetic drills.

    Args:
        problems: training problems; those without equations are left out.
        config: how problems are varied; None leaves them as they are.
        batch_problems: documents a step.
        drill_share: the share of documents that are drills.
        story_share: the share of documents that are stories.
        crowded_share: the share of the stories that have more numbers than the question needs.
        question_loss: whether the tokens of the question are targets too.
        seed: seed of order, variants, stories and drills.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        config: AugmentConfig | None,
        *,
        batch_problems: int,
        drill_share: float,
        story_share: float = 0.0,
        crowded_share: float = 0.0,
        question_loss: bool = True,
        seed: int,
    ) -> None:
        self.variants = _Variants(_with_steps(problems), config, seed)
        self.tokenizer, self.batch_problems = tokenizer, batch_problems
        self.drill_share, self.story_share, self.crowded_share = drill_share, story_share, crowded_share
        self.question_loss, self.seed = question_loss, seed

    def batch_at(self, step: int) -> list[tuple[Ids, Mask | None]]:
        """The documents of a step, counted from 0, each with its mask of targets (None: all but the first token)."""
        first = step * self.batch_problems
        return [self._document(index) for index in range(first, first + self.batch_problems)]

    def _document(self, index: int) -> tuple[Ids, Mask | None]:
        kind = Random(derive_seed(self.seed, "kind", index)).random()
        if kind < self.drill_share:
            text = drill(derive_seed(self.seed, "drill", index))
            return [*self.tokenizer.encode(text), self.tokenizer.document_end_id], None
        if kind < self.drill_share + self.story_share:
            crowded = kind < self.drill_share + self.story_share * self.crowded_share
            problem = _make_problem(crowded, derive_seed(self.seed, "story", index))
        else:
            problem = self.variants[index]
        ids, mask = encode_document(self.tokenizer, problem)
        return ids, None if self.question_loss else mask


class SftStream:
    """Conversations with a chain of thought; only the assistant's turn is a target.

    Arguments as in `PretrainStream`.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        config: AugmentConfig | None,
        *,
        batch_problems: int,
        story_share: float = 0.0,
        crowded_share: float = 0.0,
        seed: int,
    ) -> None:
        self.variants = _Variants(_with_steps(problems), config, seed)
        self.tokenizer, self.batch_problems = tokenizer, batch_problems
        self.story_share, self.crowded_share, self.seed = story_share, crowded_share, seed

    def batch_at(self, step: int) -> list[tuple[Ids, Mask]]:
        """The conversations of a step, counted from 0, each with its mask of targets."""
        first = step * self.batch_problems
        return [self.at(position) for position in range(first, first + self.batch_problems)]

    def at(self, position: int) -> tuple[Ids, Mask]:
        """The conversation at a position of the endless sequence, with its mask of targets."""
        return encode_conversation(self.tokenizer, self._problem(position))

    def _problem(self, position: int) -> Problem:
        kind = Random(derive_seed(self.seed, "kind", position)).random()
        if kind >= self.story_share:
            return self.variants[position]
        return _make_problem(kind < self.story_share * self.crowded_share, derive_seed(self.seed, "story", position))


class PromptStream:
    """Problems for reinforcement learning, with their prompts.

    Args:
        problems: training problems.
        config: how problems are varied; None asks them as they are.
        prompts_per_step: problems a step.
        story_share: the share of the problems that are made up.
        max_steps: made-up problems take at most this many steps to solve; 0 takes all.
        seed: seed of order, variants and stories.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        config: AugmentConfig | None,
        *,
        prompts_per_step: int,
        story_share: float = 0.0,
        max_steps: int = 0,
        seed: int,
    ) -> None:
        if not problems:
            raise DataError("there are no problems to train on", where="data.sources")
        self.variants = _Variants(problems, config, seed)
        self.tokenizer, self.prompts_per_step = tokenizer, prompts_per_step
        self.story_share, self.max_steps, self.seed = story_share, max_steps, seed

    def batch_at(self, step: int) -> list[tuple[Example, Ids]]:
        """The problems of a step, counted from 0, each with the tokens of its prompt."""
        first = step * self.prompts_per_step
        return [self.at(position) for position in range(first, first + self.prompts_per_step)]

    def at(self, position: int) -> tuple[Example, Ids]:
        """The problem at a position of the endless sequence, with the tokens of its prompt."""
        problem = self._problem(position)
        return problem.as_example(), encode_prompt(self.tokenizer, problem.question)

    def _problem(self, position: int) -> Problem:
        if Random(derive_seed(self.seed, "kind", position)).random() >= self.story_share:
            return self.variants[position]
        stories = (make_story(derive_seed(self.seed, "story", position, attempt)) for attempt in count())
        return next(story for story in stories if not self.max_steps or len(story.steps) <= self.max_steps)


def heldout_documents(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[tuple[Ids, Mask]]:
    """Problems as they are, in the pre-training form, for a validation loss on their solutions."""
    return [encode_document(tokenizer, problem) for problem in _with_steps(problems)]


def heldout_conversations(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[tuple[Ids, Mask]]:
    """Problems as they are, in the chat form, for a validation loss."""
    return [encode_conversation(tokenizer, problem) for problem in _with_steps(problems)]
