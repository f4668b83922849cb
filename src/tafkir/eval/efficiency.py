"""The efficiency card: recursive and language models on the same puzzles, with what an answer costs each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch

from tafkir.checkpoint.load import load_config
from tafkir.checkpoint.trm import load_trm
from tafkir.data.chat import encode_chat
from tafkir.data.puzzles.rules import has_rules, solve_by_rules
from tafkir.data.puzzles.votes import ATTEMPTS
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.arc import answer_tasks
from tafkir.errors import CapacityError, DataError
from tafkir.eval.costs import Meter
from tafkir.eval.metrics import Estimate, accuracy
from tafkir.eval.puzzles import answer_arc, answer_recursively, count_seen, seconds_alone
from tafkir.eval.records import GREEDY, EvalRecord
from tafkir.eval.run import checkpoint_fingerprint, evaluate
from tafkir.plan.flops import completion_flops, recursion_flops
from tafkir.protocols import Completer
from tafkir.records import Example, Request, SamplingParams, Split
from tafkir.runlog.atomic import read_json
from tafkir.tasks.arc_task import ArcSetTask
from tafkir.tasks.puzzle_sets import PuzzleSetTask

__all__ = ["CardRow", "CardSettings", "Contestant", "is_recursive", "measure_card", "render_card_table"]

Kind = Literal["recursive", "language", "search"]
BuildCompleter = Callable[[Path], Completer]
PuzzleTask = PuzzleSetTask | ArcSetTask

_logger = logging.getLogger(__name__)

# Rough room for an answer's layout and box beside its cells.
_BESIDE_CELLS = 32


@dataclass(frozen=True, slots=True)
class Contestant:
    """A checkpoint folder of either kind, and what to call it."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class CardSettings:
    """How the puzzles are asked.

    Attributes:
        split: which part of them.
        limit: at most so many; 0 is all.
        max_tokens: most tokens of a language model's answer; 0 is two for each cell and a few more.
        halt_threshold: on the logit of a recursive model's halting head.
        timed: puzzles that each contestant solves one by one against the clock.
        threads: of torch, for all alike.
    """

    split: Split = "test"
    limit: int = 0
    max_tokens: int = 0
    halt_threshold: float = 0.0
    timed: int = 16
    threads: int = 1


@dataclass(frozen=True, slots=True)
class CardRow:
    """One way to answer, with its accuracy and its costs.

    Attributes:
        name: of the checkpoint.
        kind: what answers.
        answered: how, in words.
        accuracy: share of puzzles right, with Wilson's 95 % interval.
        parameters: weights; `active_parameters` those that one token or cell goes through.
        bytes_on_disk: of the weights' files.
        flops: mean FLOPs of a puzzle; None for a search.
        seconds: wall time of one puzzle by itself, the median of a few.
        amount: mean supervision steps or tokens of an answer.
        curve: (FLOPs, accuracy) after each supervision step.
        outcomes: answers by outcome.
        records: file of the graded answers, relative to the run directory.
        first_attempt: share right at once, where two attempts count (ARC).
        seen_in_training: puzzles that training had in some form; None where nobody knows.
        joules, peak_bytes: of one of the puzzles that `seconds` times, as `Meter` has them.
    """

    name: str
    kind: Kind
    answered: str
    accuracy: Estimate
    parameters: int
    active_parameters: int
    bytes_on_disk: int
    flops: float | None
    seconds: float
    amount: float
    curve: Sequence[tuple[float, float]] = ()
    outcomes: dict[str, int] | None = None
    records: str | None = None
    first_attempt: float | None = None
    seen_in_training: int | None = None
    joules: float | None = None
    peak_bytes: int | None = None


def is_recursive(checkpoint: Path) -> bool:
    """Whether a checkpoint folder holds a recursive model."""
    config = checkpoint / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "trm"


def measure_card(
    task: PuzzleTask,
    contestants: Sequence[Contestant],
    settings: CardSettings,
    *,
    build_completer: BuildCompleter,
    folder: Path,
) -> dict[str, Any]:
    """Ask every contestant the same puzzles; answers go to `folder/eval/`, from where a language model's go on.

    Args:
        contestants: with different names.
        build_completer: gives the completer of a language model's folder.
        folder: the run directory.

    Returns:
        `task`, `settings`, `num_puzzles`, `format`, `notes`, and `rows` as `CardRow` has them; where the rules are
        known, the last row is a search by them, which says what exactness costs.

    Raises:
        DataError: two contestants share a name, there is no puzzle, or a recursive model is made for others.
        CheckpointError: a checkpoint is missing or damaged.
        CapacityError: a language model's context has no room for a puzzle and its answer.
    """
    names = [contestant.name for contestant in contestants]
    if len(set(names)) != len(names):
        raise DataError("two checkpoints share a name", where=", ".join(names), fix="write NAME=PATH")
    examples = list(task.examples(settings.split))[: settings.limit or None]
    if not examples:
        raise DataError(f"no puzzle is in the {settings.split} part", where=task.name)
    torch.set_num_threads(settings.threads)
    rows: list[CardRow] = []
    for contestant in contestants:
        path = folder / "eval" / f"{task.name}-{contestant.name}.jsonl"
        if not is_recursive(contestant.path):
            rows.append(_language_row(contestant, task, examples, settings, build_completer(contestant.path), path))
        elif isinstance(task, ArcSetTask):
            rows.append(_arc_row(contestant, task, examples, settings, path))
        else:
            rows += _recursive_rows(contestant, task, examples, settings, path)
    if isinstance(task, PuzzleSetTask) and has_rules(task.format):
        rows.append(_search_row(task, examples, settings))
    for row in rows:
        _logger.info("%s, %s: %.1f %% of %d", row.name, row.answered, 100 * row.accuracy.value, len(examples))
    return {
        "task": task.name,
        "format": task.format.model_dump(mode="json"),
        "settings": asdict(settings),
        "num_puzzles": len(examples),
        "rows": [asdict(row) for row in rows],
        "notes": _notes(rows),
    }


def _notes(rows: Sequence[CardRow]) -> list[str]:
    """What a reader has to know of the accuracies."""
    seen = {row.name: row.seen_in_training for row in rows if row.seen_in_training}
    return [f"{name} was trained on {count} of these puzzles, in some form." for name, count in seen.items()]


# ---- who answers -------------------------------------------------------------------------------------------------


def _recursive_rows(
    contestant: Contestant, task: PuzzleSetTask, examples: Sequence[Example], settings: CardSettings, path: Path
) -> list[CardRow]:
    """After all supervision steps, and where the model halts itself."""
    solver = load_trm(contestant.path)
    shape, threshold = solver.model.shape, settings.halt_threshold
    found = answer_recursively(
        solver,
        task,
        examples,
        halt_threshold=threshold,
        path=path,
        fingerprint=checkpoint_fingerprint(contestant.path),
        label=f"eval {contestant.name}",
    )
    inputs = task.cells(examples[: settings.timed])
    steps = len(found.by_step)
    curve = [(recursion_flops(shape, step), share) for step, share in enumerate(found.by_step, start=1)]
    mean_steps = float(found.halts.mean())
    halting = path.with_name(f"{path.stem}-halting{path.suffix}")
    seen = count_seen(contestant.path, task, examples) if settings.split != "train" else None
    variants = (
        (f"after all {steps} steps", found.final, float(steps), None, path, curve),
        (f"halts itself, q > {threshold:g}", found.halted, mean_steps, threshold, halting, ()),
    )
    return [
        CardRow(
            name=contestant.name,
            kind="recursive",
            answered=answered,
            accuracy=accuracy([record.correct for record in records]),
            parameters=shape.num_parameters(),
            active_parameters=shape.num_parameters(),
            bytes_on_disk=_weight_bytes(contestant.path),
            flops=recursion_flops(shape, amount),
            **_timed(partial(seconds_alone, solver.model, inputs, halt_threshold=stop), len(inputs) + 1),
            amount=amount,
            curve=points,
            outcomes=_count(record.outcome for record in records),
            records=f"eval/{file.name}",
            seen_in_training=seen,
        )
        for answered, records, amount, stop, file, points in variants
    ]


def _arc_row(
    contestant: Contestant, task: ArcSetTask, examples: Sequence[Example], settings: CardSettings, path: Path
) -> CardRow:
    """Two attempts by the votes of all forms."""
    solver = load_trm(contestant.path)
    shape, fingerprint = solver.model.shape, checkpoint_fingerprint(contestant.path)
    label = f"eval {contestant.name}"
    records, forms = answer_arc(solver, task, examples, path=path, fingerprint=fingerprint, label=label)
    durations = []
    for own in task.tasks(examples[: settings.timed]):
        began = time.perf_counter()
        answer_tasks(solver, [own])
        durations.append((time.perf_counter() - began) / len(own.test))
    steps = shape.max_supervision_steps
    return CardRow(
        name=contestant.name,
        kind="recursive",
        answered=f"two attempts, {forms:.0f} forms vote, {steps} steps each",
        accuracy=_any_right(records),
        parameters=shape.num_parameters(),
        active_parameters=shape.num_parameters(puzzle_table=False),
        bytes_on_disk=_weight_bytes(contestant.path),
        flops=recursion_flops(shape, steps * forms),
        seconds=median(durations),
        amount=steps * forms,
        outcomes=_count(record.outcome for record in records if record.repeat == GREEDY),
        records=f"eval/{path.name}",
        first_attempt=fmean(record.correct for record in records if record.repeat == GREEDY),
    )


def _any_right(records: Sequence[EvalRecord]) -> Estimate:
    """Share of examples with a right answer among theirs."""
    right: dict[str, bool] = {}
    for record in records:
        right[record.example_id] = right.get(record.example_id, False) or record.correct
    return accuracy(list(right.values()))


def _language_row(
    contestant: Contestant,
    task: PuzzleTask,
    examples: Sequence[Example],
    settings: CardSettings,
    completer: Completer,
    path: Path,
) -> CardRow:
    """One greedy answer a puzzle; of ARC tasks a second one, sampled, for two attempts count."""
    attempts = ATTEMPTS if isinstance(task, ArcSetTask) else 1
    config, tokenizer = load_config(contestant.path), Tokenizer.load(contestant.path)
    limit = settings.max_tokens or 2 * task.format.num_cells + _BESIDE_CELLS
    prompts = [encode_chat(tokenizer, task.prompt(example)) for example in examples]
    longest = max(map(len, prompts)) + limit
    if longest > config.max_position_embeddings:
        raise CapacityError(
            f"a puzzle with its answer takes {longest} tokens",
            where=str(contestant.path),
            expected=f"at most its context of {config.max_position_embeddings}",
            fix="lower --max-tokens, or leave this checkpoint out",
        )
    records = evaluate(
        completer,
        tokenizer,
        task,
        examples,
        samples=attempts - 1,
        temperature=1.0,
        max_tokens=limit,
        seed=0,
        path=path,
        fingerprint=checkpoint_fingerprint(contestant.path),
        label=f"eval {contestant.name}",
    )
    timed = prompts[: settings.timed]
    asked = [prompt for prompt in prompts for _ in range(attempts)]
    flops = [completion_flops(config, len(p), r.tokens) for p, r in zip(asked, records, strict=True)]
    first = [record for record in records if record.repeat == GREEDY]
    return CardRow(
        name=contestant.name,
        kind="language",
        answered=f"{'greedy' if attempts == 1 else 'greedy and sampled'}, at most {limit} tokens",
        accuracy=_any_right(records),
        parameters=config.num_parameters(),
        active_parameters=config.num_parameters(active=True),
        bytes_on_disk=_weight_bytes(contestant.path),
        flops=attempts * fmean(flops),
        **_timed(
            lambda: attempts * _seconds_of_completions(completer, tokenizer, timed, limit), (len(timed) + 1) / attempts
        ),
        amount=attempts * fmean(record.tokens for record in records),
        outcomes=_count(record.outcome for record in first),
        records=f"eval/{path.name}",
        first_attempt=fmean(record.correct for record in first) if attempts > 1 else None,
    )


def _search_row(task: PuzzleSetTask, examples: Sequence[Example], settings: CardSettings) -> CardRow:
    """The exact search of `tafkir.data.puzzles`: no weights, and no FLOPs that compare with a network's."""
    durations, right = [], []
    for example, question in zip(examples, task.cells(examples), strict=True):
        began = time.perf_counter()
        answer = solve_by_rules(task.format, question)
        durations.append(time.perf_counter() - began)
        right.append(task.grade(example, task.write(answer)).correct)
    seconds = median(durations[: settings.timed])
    return CardRow("search", "search", "by the rules, exact", accuracy(right), 0, 0, 0, None, seconds, 0.0)


def _seconds_of_completions(
    completer: Completer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], limit: int
) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=(tokenizer.turn_end_id,), seed=0)
    durations = []
    for number in range(-1, len(prompts)):
        # The first one, asked twice, warms up.
        request = Request(f"timed-{number}", tuple(prompts[max(0, number)]), params)
        began = time.perf_counter()
        assert sum(1 for _ in completer.complete([request])) == 1
        durations.append(time.perf_counter() - began)
    return median(durations[1:])


def _timed(measure: Callable[[], float], puzzles: float) -> dict[str, Any]:
    """`seconds` as `measure` returns them, and what else it took while it answered so many puzzles."""
    with Meter() as meter:
        seconds = measure()
    joules = None if meter.joules is None else meter.joules / puzzles
    return {"seconds": seconds, "joules": joules, "peak_bytes": meter.peak_bytes}


def _weight_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _count(outcomes: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


# ---- as a table --------------------------------------------------------------------------------------------------

_HEAD = ("model", "answer", "right", "95 % interval", "parameters", "FLOP/puzzle", "s/puzzle", "on disk")


def render_card_table(card: dict[str, Any]) -> str:
    """The card as lines for a terminal."""
    lines = [_HEAD, *(_cells(row) for row in card["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines]
    rule = "-" * len(text[0])
    part = card["settings"]["split"]
    title = f"{card['task']}: {card['num_puzzles']:,} puzzles of the {part} part"
    return "\n".join([title, "", text[0], rule, *text[1:], *(f"Note: {note}" for note in card["notes"])])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["accuracy"]
    parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
    return (
        row["name"],
        row["answered"],
        f"{100 * share['value']:.1f} %",
        f"{100 * share['low']:.1f} to {100 * share['high']:.1f}",
        parameters,
        _short(row["flops"]),
        f"{row['seconds']:.2g}",
        _bytes(row["bytes_on_disk"]),
    )


def _short(flops: float | None) -> str:
    """`1.2e9` -> `1.2 G`."""
    if flops is None:
        return "-"
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{flops / size:.3g} {sign}"
    return f"{flops:.0f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count else "-"
