"""The seams: what a stage needs from another floor, as a few methods.

`train` and `eval` reach generation only through `Completer`, so the in-process engine, a fake in a test and a
remote server are interchangeable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from tafkir.records import Answer, Completion, Example, Message, Request, Split, Verdict

__all__ = ["BatchGrader", "Completer", "Counting", "Grader", "MetricSink", "PausingCompleter", "Task"]


@runtime_checkable
class Completer(Protocol):
    """Anything that turns token prompts into sampled tokens with log-probabilities."""

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish."""
        ...

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probabilities: for each sequence of n tokens, n - 1 float32 values."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the policy's weights; completions from now on carry `version`."""
        ...


@runtime_checkable
class PausingCompleter(Completer, Protocol):
    """A completer that can be stopped, and go on later with what it had begun (`Request.prefix_ids`)."""

    def cancel_all(self) -> list[Completion]:
        """Stop every request; what each has sampled so far, with the finish reason "cancelled".

        What `complete` has finished already still comes out of its iterator, which then ends.
        """
        ...


@runtime_checkable
class Counting(Protocol):
    """What counts the trouble that it made good, such as servers that died: a pool of servers or of workers."""

    def metrics(self) -> Mapping[str, float]:
        """All that was counted so far, by metric name."""
        ...


class Grader(Protocol):
    """Judges one completion of one example: the metric of `eval` and the reward of `rlvr` alike."""

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        """Grade the text of an assistant turn; `finished` is False when the length limit cut it off."""
        ...


@runtime_checkable
class BatchGrader(Protocol):
    """A grader that takes many answers at once, such as a pool of verifiers."""

    def grade_all(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Grade all answers; verdicts in their order."""
        ...


class Task(Grader, Protocol):
    """A set of examples with a prompt and a grader."""

    @property
    def name(self) -> str: ...

    def examples(self, split: Split) -> Sequence[Example]: ...

    def prompt(self, example: Example) -> list[Message]: ...


class MetricSink(Protocol):
    """Where numbers go. Names look like `train/loss`."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
