"""Needles by length and depth: what a checkpoint finds in a long text, and where it stops finding it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tafkir.data.chat import encode_chat
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import CapacityError, DataError
from tafkir.eval.metrics import accuracy
from tafkir.eval.records import EvalRecord
from tafkir.eval.run import checkpoint_fingerprint, evaluate
from tafkir.protocols import Completer
from tafkir.records import Example, Message
from tafkir.tasks.needle import NAMES, Needles, render_question

__all__ = ["NeedleSettings", "evaluate_needles", "render_needles"]

RUNNING_TOKENS = 1 << 18
"""Prompt tokens that are in the cache at once, unless one prompt alone is longer."""

MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class NeedleSettings:
    """Which haystacks are asked about.

    Attributes:
        lengths: tokens of the haystacks; empty for an eighth, a quarter, half and all of the context.
        depths: where the asked needle stands, as shares of the text.
        samples: haystacks for each length and depth.
        num_needles: names in each haystack.
        max_tokens: most tokens of an answer.
        seed: of the haystacks.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    num_needles: int = 4
    max_tokens: int = 64
    seed: int = 0


def evaluate_needles(
    checkpoint: Path,
    settings: NeedleSettings,
    *,
    context: int,
    build_completer: Callable[[int], Completer],
    path: Path,
) -> dict[str, Any]:
    """Ask about every haystack once, greedily; answers go to `path`, from where a killed evaluation goes on.

    Args:
        checkpoint: its folder, with a tokenizer.
        context: most tokens of a prompt and its answer.
        build_completer: gives the checkpoint's completer for a number of sequences that run at once.
        path: JSON-lines file of answers.

    Returns:
        `settings`, `context`, and shares of needles found, with Wilson's 95 % interval: `all`, `lengths` (one row a
        length) and `cells` (one row a length and depth, with the `outcomes` of its answers).

    Raises:
        CapacityError: a haystack, its question and the answer do not fit into the context.
        DataError: a depth is no share, the needles do not fit into a length, or there is nothing to ask about.
    """
    if min(settings.samples, settings.max_tokens, len(settings.depths)) < 1:
        raise DataError("there is no haystack to ask about", where="needle", expected="a depth, a sample and a token")
    tokenizer = Tokenizer.load(checkpoint)
    room = context - settings.max_tokens - _question_tokens(tokenizer)
    if room < 1:
        raise CapacityError(
            f"a context of {context} has no room for a question and {settings.max_tokens} tokens of an answer",
            where=str(checkpoint),
            fix="lower max_tokens",
        )
    lengths = settings.lengths or tuple(sorted({max(1, room // part) for part in (8, 4, 2, 1)}))
    task = _needles(tokenizer, lengths, settings)
    examples = task.examples("test")
    longest = max(len(encode_chat(tokenizer, task.prompt(example))) for example in examples)
    if longest + settings.max_tokens > context:
        raise CapacityError(
            f"a haystack of {max(lengths)} tokens takes {longest} with its question, its answer {settings.max_tokens}",
            where=str(checkpoint),
            expected=f"at most the context of {context} together",
            fix=f"ask for at most {room} tokens, or stretch the context (docs/long-context.md)",
        )
    batch = max(1, min(MAX_BATCH, RUNNING_TOKENS // longest))
    answers = evaluate(
        build_completer(batch),
        tokenizer,
        task,
        examples,
        samples=0,
        temperature=0.0,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        path=path,
        fingerprint=checkpoint_fingerprint(checkpoint),
        label="needle",
        batch_requests=4 * batch,
    )
    return {"settings": asdict(settings) | {"lengths": lengths}, "context": context, **_scores(examples, answers)}


def _needles(tokenizer: Tokenizer, lengths: Sequence[int], settings: NeedleSettings) -> Needles:
    return Needles(
        lengths,
        settings.depths,
        samples=settings.samples,
        num_needles=settings.num_needles,
        seed=settings.seed,
        measure=lambda text: len(tokenizer.encode(text)),
    )


def _question_tokens(tokenizer: Tokenizer) -> int:
    """What the longest question adds to its haystack, and a little for tokens that merge at its edge."""
    prompts = ([Message("user", render_question("", name))] for name in NAMES)
    return max(len(encode_chat(tokenizer, prompt)) for prompt in prompts) + 4


def _scores(examples: Sequence[Example], answers: Sequence[EvalRecord]) -> dict[str, Any]:
    """Shares of needles found, in all, by length, and by length and depth."""
    cells: dict[tuple[int, float], list[EvalRecord]] = {}
    for example, answer in zip(examples, answers, strict=True):
        cells.setdefault((example.extra["length"], example.extra["depth"]), []).append(answer)
    by_length: dict[int, list[EvalRecord]] = {}
    for (length, _), records in cells.items():
        by_length.setdefault(length, []).extend(records)
    return {
        "all": _found(answers),
        "lengths": [{"length": length, **_found(records)} for length, records in by_length.items()],
        "cells": [
            {"length": length, "depth": depth, **_found(records), "outcomes": dict(Counter(r.outcome for r in records))}
            for (length, depth), records in cells.items()
        ],
    }


def _found(records: Sequence[EvalRecord]) -> dict[str, Any]:
    return accuracy([record.correct for record in records]).to_dict()


def render_needles(result: dict[str, Any]) -> str:
    """A table of `evaluate_needles`: one row a length with its interval, one column a depth."""
    depths = result["settings"]["depths"]
    lines = [f"{'tokens':>9}   found{'':<22}" + "".join(f"{f'at {100 * depth:g} %':>10}" for depth in depths)]
    for row in result["lengths"]:
        cells = [cell for cell in result["cells"] if cell["length"] == row["length"]]
        interval = f"{100 * row['value']:5.1f} % [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]"
        lines.append(f"{row['length']:>9,}   {interval:<27}" + "".join(f"{100 * c['value']:>10.0f}" for c in cells))
    return "\n".join(lines)
