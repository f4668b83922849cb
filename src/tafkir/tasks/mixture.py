"""Several tasks as one: a mixture that draws problems by weight and level, and grades each by its own task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol

from tafkir.data.chat import encode_chat, render_assistant
from tafkir.data.tokenizer import Tokenizer
from tafkir.protocols import Task
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.tasks import TaskConfig
from tafkir.records import Example, Message, Split, Verdict
from tafkir.tasks.backends import open_sandbox
from tafkir.tasks.choice import MULTIPLE_CHOICE
from tafkir.tasks.code import CodeProblems
from tafkir.tasks.generated import GeneratedTask, PuzzleKind
from tafkir.tasks.instruct import INSTRUCTIONS
from tafkir.tasks.puzzles.countdown import COUNTDOWN, GAME_24
from tafkir.tasks.puzzles.grids import GRIDS
from tafkir.tasks.puzzles.knights import KNIGHTS_AND_KNAVES
from tafkir.tasks.puzzles.maze import MAZE
from tafkir.tasks.puzzles.sudoku import SUDOKU
from tafkir.tasks.sandbox import Limits

__all__ = [
    "KINDS",
    "Conversation",
    "DrawnTask",
    "MixtureStream",
    "Prompted",
    "TaskMixture",
    "build_task",
    "kind_of",
    "solved_texts",
]

Prompted = tuple[Example, list[int]]
"""A problem with the tokens of its prompt."""

Conversation = tuple[list[int], list[bool]]
"""Token ids, and which of them are targets."""

Levels = Callable[[str, int], int]
"""From a kind and a seed to the level that a problem is drawn from."""

KINDS: Mapping[str, PuzzleKind] = {
    kind.name: kind
    for kind in (COUNTDOWN, GAME_24, SUDOKU, MAZE, KNIGHTS_AND_KNAVES, GRIDS, INSTRUCTIONS, MULTIPLE_CHOICE)
}
"""The kinds that are generated, by the name that recipes call them."""

WORD_PROBLEMS = "word_problems"


class DrawnTask(Task, Protocol):
    """A task whose problems can be drawn one by one, and come with a solution to learn from."""

    def example(self, seed: int, level: int, split: Split = "train") -> Example: ...

    def solution(self, example: Example) -> tuple[str, str]: ...


def build_task(config: TaskConfig, *, samples: int = 100, seed: int = 0) -> DrawnTask:
    """The task of one table of the recipe; not for word problems, which come from files.

    Raises:
        BackendUnavailable: code is asked for, and there is no sandbox here.
    """
    if config.kind == "code":
        # who writes "rlimit" into a recipe has said that it is unsafe
        sandbox = open_sandbox(config.sandbox, unsafe=True, limits=Limits(timeout_s=config.timeout_s))
        return CodeProblems(levels=config.difficulty, sandbox=sandbox)
    return GeneratedTask(KINDS[config.kind], levels=config.difficulty, samples=samples, seed=seed)


def kind_of(example: Example) -> str:
    """The kind of task that an example belongs to."""
    kind, slash, _ = example.source.partition("/")
    return kind if slash and (kind in KINDS or kind == "code") else WORD_PROBLEMS


class TaskMixture:
    """A task that hands every example to the task it comes from.

    Args:
        configs: kinds, weights and levels.
        word_problems: grades the word problems; needed where `configs` names them.
        samples: generated examples for each level in `examples`.
        seed: of the generated examples.

    Raises:
        BackendUnavailable: code is asked for, and there is no sandbox here.
    """

    def __init__(
        self, configs: Sequence[TaskConfig], word_problems: Task | None = None, *, samples: int = 100, seed: int = 0
    ) -> None:
        self.configs = tuple(configs)
        self.drawn: dict[str, DrawnTask] = {
            config.kind: build_task(config, samples=samples, seed=derive_seed(seed, config.kind))
            for config in configs
            if config.kind != WORD_PROBLEMS
        }
        self.tasks: dict[str, Task] = {**self.drawn}
        if any(config.kind == WORD_PROBLEMS for config in configs):
            assert word_problems is not None
            self.tasks[WORD_PROBLEMS] = word_problems

    @property
    def name(self) -> str:
        """The one task's name, or "tasks"."""
        return next(iter(self.tasks.values())).name if len(self.tasks) == 1 else "tasks"

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of all tasks, task by task."""
        return [example for task in self.tasks.values() for example in task.examples(split)]

    def prompt(self, example: Example) -> list[Message]:
        return self.tasks[kind_of(example)].prompt(example)

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """The verdict of the example's own task."""
        return self.tasks[kind_of(example)].grade(example, text, finished=finished)

    def choose(self, seed: int) -> str:
        """A kind, drawn by weight."""
        weights = [config.weight for config in self.configs]
        return Random(derive_seed(seed, "kind")).choices(self.configs, weights)[0].kind


class MixtureStream:
    """The problems of each training step, drawn from a mixture: a function of (seed, position) and of the levels.

    Args:
        per_step: problems a step.
        levels: chooses a problem's level; any of the recipe's levels, each as often, when None.
        word_problem: the word problem at a position, with its prompt; for `at`, where the mixture has them.
        word_conversation: the same with its solution, for `solved_at`.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        tokenizer: Tokenizer,
        *,
        per_step: int,
        seed: int,
        levels: Levels | None = None,
        word_problem: Callable[[int], Prompted] | None = None,
        word_conversation: Callable[[int], Conversation] | None = None,
    ) -> None:
        self.mixture, self.tokenizer, self.per_step, self.seed = mixture, tokenizer, per_step, seed
        self.word_problem, self.word_conversation = word_problem, word_conversation
        self._difficulty: dict[str, tuple[int, ...]] = {each.kind: each.difficulty for each in mixture.configs}
        self.levels: Levels = levels or self._any_level

    def at(self, position: int) -> Prompted:
        """The problem at a position of the endless sequence, with the tokens of its prompt."""
        kind, seed = self._choose(position)
        if kind == WORD_PROBLEMS:
            assert self.word_problem is not None
            return self.word_problem(position)
        example = self._draw(kind, seed)
        return example, encode_chat(self.tokenizer, self.mixture.prompt(example))

    def batch_at(self, step: int) -> list[Prompted]:
        """The problems of a step, counted from 0."""
        return [self.at(position) for position in self._positions(step)]

    def solved_at(self, position: int) -> Conversation:
        """The same problem as a conversation with its solution, which is the target."""
        kind, seed = self._choose(position)
        if kind == WORD_PROBLEMS:
            assert self.word_conversation is not None
            return self.word_conversation(position)
        return self.solved(self._draw(kind, seed))

    def solved_batch_at(self, step: int) -> list[Conversation]:
        """The conversations of a step, counted from 0."""
        return [self.solved_at(position) for position in self._positions(step)]

    def solved(self, example: Example) -> Conversation:
        """A problem with its solution; the assistant's body with its `<|im_end|>` is the target.

        Raises:
            KeyError: it is a word problem, whose solutions belong to its stream.
        """
        prompt = encode_chat(self.tokenizer, self.mixture.prompt(example))
        body = [*self.tokenizer.encode(_render_solution(self.mixture, example)), self.tokenizer.turn_end_id]
        return prompt + body, [False] * len(prompt) + [True] * len(body)

    def _positions(self, step: int) -> range:
        return range(step * self.per_step, (step + 1) * self.per_step)

    def _choose(self, position: int) -> tuple[str, int]:
        seed = derive_seed(self.seed, "problem", position)
        return self.mixture.choose(seed), seed

    def _draw(self, kind: str, seed: int) -> Example:
        return self.mixture.drawn[kind].example(seed, self.levels(kind, derive_seed(seed, "level")))

    def _any_level(self, kind: str, seed: int) -> int:
        return Random(seed).choice(self._difficulty[kind])


def _render_solution(mixture: TaskMixture, example: Example) -> str:
    reasoning, content = mixture.drawn[kind_of(example)].solution(example)
    return render_assistant(content, reasoning)


def solved_texts(mixture: TaskMixture, count: int, seed: int) -> list[str]:
    """Questions and solutions of `count` problems, word problems left out: what a tokenizer is trained on."""
    texts = []
    for index in range(count):
        own = derive_seed(seed, index)
        kind = mixture.choose(own)
        if kind in mixture.drawn:
            level = Random(own).choice(next(each.difficulty for each in mixture.configs if each.kind == kind))
            example = mixture.drawn[kind].example(own, level)
            texts += [example.question, _render_solution(mixture, example)]
    return texts
