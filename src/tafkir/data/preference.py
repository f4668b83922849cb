"""Preference pairs: two answers to one prompt, one of them preferred; read from JSON lines or made up.

Formats, told apart by a row's keys:

    {"prompt": "...", "chosen": "...", "rejected": "..."}                       TRL's conventional format
    {"prompt": [MESSAGE, ...], "chosen": [MESSAGE], "rejected": [MESSAGE]}      TRL's conversational format
    {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}                      the same, the prompt repeated in both
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}           Anthropic's hh-rlhf
    {"conversations": [TURN, ...], "chosen": TURN, "rejected": TURN}            ShareGPT turns, as in LLaMA-Factory

with MESSAGE `{"role": "user", "content": "..."}` and TURN `{"from": "human", "value": "..."}`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any, Literal

from tafkir.data.chat import encode_chat, render_assistant, render_solution
from tafkir.data.flaws import spoil
from tafkir.data.lines import BadRowError, numbered_lines, parse_row
from tafkir.data.loader import EpochOrder
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import DOCUMENT_END, TURN_END, TURN_START, Tokenizer
from tafkir.errors import DataError
from tafkir.recipe.rlhf import Flaw, PreferencesConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Message, Split

__all__ = [
    "BUNDLED_PREFERENCES",
    "EncodedPair",
    "PairStream",
    "PreferencePair",
    "PreferenceReport",
    "PreferenceSet",
    "encode_pairs",
    "load_preferences",
    "make_pair",
    "read_preferences",
]

BUNDLED_PREFERENCES = ("dpo_en_demo",)
MADE_UP = "made_up"
"""The source of the pairs that `make_pair` makes; flaws other than a wrong result are named behind it."""

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A conversation up to the assistant's turn, and two bodies of that turn."""

    id: str
    source: str
    split: Split
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair as tokens; each side ends with `<|im_end|>`."""

    pair: PreferencePair
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PreferenceReport:
    """What reading one source gave; the lists name what was left out as `file:line`."""

    source: str
    rows: int
    bad_rows: tuple[str, ...] = ()
    equal_sides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceSet:
    """The pairs of a recipe as tokens, by part, and what was left out.

    `overlong` counts pairs whose prompt and longer side exceed the limit, by source.
    """

    train: tuple[EncodedPair, ...]
    heldout: tuple[EncodedPair, ...]
    reports: tuple[PreferenceReport, ...]
    overlong: Mapping[str, int]

    def counts(self) -> dict[str, Any]:
        """What `result.json` says of the data."""
        return {
            "train": len(self.train),
            "heldout": len(self.heldout),
            "overlong": dict(self.overlong),
            "equal_sides": {report.source: len(report.equal_sides) for report in self.reports},
            "bad_rows": {report.source: len(report.bad_rows) for report in self.reports},
        }


def load_preferences(config: PreferencesConfig, tokenizer: Tokenizer, seed: int) -> PreferenceSet:
    """Read every source of `[preferences]`, add the made-up pairs, and encode what is short enough.

    Args:
        seed: of the made-up pairs.

    Raises:
        DataError: a source is missing or malformed, or no pair is left to train on.
    """
    pairs: list[PreferencePair] = []
    reports: list[PreferenceReport] = []
    for source in config.sources:
        found, report = read_preferences(source, on_bad_row=config.on_bad_row, heldout_share=config.heldout_share)
        pairs += found
        reports.append(report)
        for what, where in (("malformed", report.bad_rows), ("with equal sides", report.equal_sides)):
            if where:
                message = "%s: %d of %d rows are left out as %s; the first: %s"
                _logger.warning(message, source, len(where), report.rows, what, where[0])
    seeds = (derive_seed(seed, "pair", i) for i in range(config.made_up))
    made_up = (make_pair(each, config.heldout_share, config.flaws) for each in seeds)
    pairs += {pair.id: pair for pair in made_up}.values()
    encoded, overlong = encode_pairs(pairs, tokenizer, config.max_length)
    if overlong:
        message = "%d of %d pairs are left out as longer than %d tokens"
        _logger.warning(message, sum(overlong.values()), len(pairs), config.max_length)
    train = tuple(pair for pair in encoded if pair.pair.split == "train")
    if not train:
        raise DataError(
            f"no preference pair is left to train on ({sum(overlong.values())} of {len(pairs)} are too long)",
            where="preferences.sources",
            fix="add pairs, raise preferences.max_length, or set preferences.made_up",
        )
    heldout = tuple(pair for pair in encoded if pair.pair.split != "train")
    return PreferenceSet(train, heldout, tuple(reports), overlong)


def read_preferences(
    source: str | Path, *, on_bad_row: Literal["error", "skip"] = "error", heldout_share: float = 0.2
) -> tuple[list[PreferencePair], PreferenceReport]:
    """Every pair of one source, in file order, with what was left out.

    Pairs whose sides are equal say nothing; they are left out and counted.

    Args:
        source: a bundled set's name, or the path of a JSON-lines file (`.gz` allowed) in one of the module's formats.
        on_bad_row: "error" stops at the first malformed row; "skip" counts and reports it.
        heldout_share: share of the prompts that are held out, by a hash of the prompt: equal prompts stay together.

    Raises:
        DataError: the file is missing or unreadable, a row is malformed, or no row is valid.
    """
    bundled = source in BUNDLED_PREFERENCES
    path = files("tafkir") / "datasets" / str(source) / "pairs.jsonl.gz" if bundled else Path(source)
    where = f"{source}/pairs.jsonl.gz" if bundled else str(source)
    name = str(source) if bundled else Path(source).name.removesuffix(".gz").removesuffix(".jsonl")
    expected = f"a JSONL file, or one of the bundled sets {', '.join(BUNDLED_PREFERENCES)}"
    pairs: list[PreferencePair] = []
    bad_rows: list[str] = []
    equal: list[str] = []
    rows = 0
    for number, line in numbered_lines(path, where, expected=expected, fix="correct preferences.sources"):
        rows += 1
        try:
            prompt, chosen, rejected = _parse(parse_row(line))
        except BadRowError as bad:
            if on_bad_row == "error":
                fix = 'correct the row, or set preferences.on_bad_row = "skip" to leave such rows out'
                raise DataError("malformed pair", where=f"{where}:{number}", expected=str(bad), fix=fix) from None
            bad_rows.append(f"{where}:{number}: expected {bad}")
            continue
        if chosen == rejected:
            equal.append(f"{where}:{number}")
            continue
        pairs.append(PreferencePair(f"{name}-{number}", name, _split(prompt, heldout_share), prompt, chosen, rejected))
    if not pairs:
        raise DataError(
            f"no valid pair ({len(bad_rows)} malformed, {len(equal)} with equal sides)",
            where=where,
            expected='lines like {"prompt": "...", "chosen": "...", "rejected": "..."}',
        )
    return pairs, PreferenceReport(str(source), rows, tuple(bad_rows), tuple(equal))


def make_pair(seed: int, heldout_share: float = 0.2, flaws: Sequence[Flaw] = ("result",)) -> PreferencePair:
    """A made-up word problem with its worked solution, preferred to the same with a flaw.

    Which flaw it is and what it looks like are functions of the seed.
    """
    problem = make_story(seed)
    reasoning, content = render_solution(problem)
    chosen = render_assistant(content, reasoning)
    prompt = (Message("user", problem.question),)
    digest = hashlib.sha256(f"{problem.question}\0{chosen}".encode()).hexdigest()[:16]
    flaw = Random(derive_seed(seed, "flaw")).choice(flaws)
    rejected = spoil(problem, flaw, Random(derive_seed(seed, "spoil")))
    source = MADE_UP if flaw == "result" else f"{MADE_UP}_{flaw}"
    return PreferencePair(f"{MADE_UP}-{digest}", source, _split(prompt, heldout_share), prompt, chosen, rejected)


def encode_pairs(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, max_length: int
) -> tuple[list[EncodedPair], dict[str, int]]:
    """Pairs as tokens, without those whose prompt and longer side have more than `max_length`; these by source."""
    encoded: list[EncodedPair] = []
    overlong: dict[str, int] = {}
    for pair in pairs:
        prompt = encode_chat(tokenizer, pair.prompt)
        chosen, rejected = ([*tokenizer.encode(text), tokenizer.turn_end_id] for text in (pair.chosen, pair.rejected))
        if len(prompt) + max(len(chosen), len(rejected)) > max_length:
            overlong[pair.source] = overlong.get(pair.source, 0) + 1
        else:
            encoded.append(EncodedPair(pair, tuple(prompt), tuple(chosen), tuple(rejected)))
    return encoded, overlong


class PairStream:
    """Training pairs in epoch order, `batch_pairs` a step; those of a step depend on (seed, step) alone."""

    def __init__(self, pairs: Sequence[EncodedPair], *, batch_pairs: int, seed: int) -> None:
        self.pairs, self.batch_pairs = pairs, batch_pairs
        self.order = EpochOrder(len(pairs), derive_seed(seed, "order"))

    def indices_at(self, step: int) -> list[int]:
        """Which pairs a step, counted from 0, takes."""
        first = step * self.batch_pairs
        return [self.order[position] for position in range(first, first + self.batch_pairs)]

    def batch_at(self, step: int) -> list[EncodedPair]:
        """The pairs of a step."""
        return [self.pairs[index] for index in self.indices_at(step)]


Parsed = tuple[tuple[Message, ...], str, str]


def _split(prompt: Sequence[Message], heldout_share: float) -> Split:
    text = "\0".join(f"{message.role}\0{message.content}" for message in prompt)
    position = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
    return "validation" if position < heldout_share else "train"


def _parse(row: Mapping[str, Any]) -> Parsed:
    """Prompt, chosen and rejected of a row, whatever its format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise BadRowError("fields 'chosen' and 'rejected'")
    read: Callable[[Mapping[str, Any]], Parsed]
    if "conversations" in row:
        read = _sharegpt
    elif isinstance(chosen, list):
        read = _conversational
    elif "prompt" in row:
        read = _conventional
    else:
        read = _hh
    prompt, good, bad = read(row)
    if not prompt or prompt[-1].role == "assistant":
        raise BadRowError("a prompt that ends with a user's turn")
    return prompt, _answer(good, "chosen"), _answer(bad, "rejected")


def _answer(text: Any, key: str) -> str:
    """The text of a side, which must not forge turns."""
    if not isinstance(text, str) or not text.strip():
        raise BadRowError(f"a non-empty answer in {key!r}")
    for token in (TURN_START, TURN_END, DOCUMENT_END):
        if token in text:
            raise BadRowError(f"no {token} inside {key!r}")
    return text


def _conventional(row: Mapping[str, Any]) -> Parsed:
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRowError("a non-empty string, or messages, in field 'prompt'")
    return (Message("user", prompt),), row["chosen"], row["rejected"]


def _conversational(row: Mapping[str, Any]) -> Parsed:
    sides = [list(_messages(row[key], key, "role", "content")) for key in ("chosen", "rejected")]
    if "prompt" in row:
        prompt = list(_messages(row["prompt"], "prompt", "role", "content"))
        if any(len(side) != 1 for side in sides):
            raise BadRowError("one assistant message in 'chosen' and in 'rejected' beside a prompt")
    else:
        prompt = sides[0][:-1]
        if prompt != sides[1][:-1]:
            raise BadRowError("sides that differ in their last message alone")
    if any(not side or side[-1].role != "assistant" for side in sides):
        raise BadRowError("sides that end with an assistant's message")
    return tuple(prompt), sides[0][-1].content, sides[1][-1].content


def _messages(value: Any, key: str, role: str, content: str) -> Iterator[Message]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"messages in field {key!r}")
    for turn in value:
        yield _message(turn, key, role, content)


def _message(turn: Any, key: str, role: str, content: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(content), str):
        raise BadRowError(f"objects with {role!r} and {content!r} in field {key!r}")
    name = _ROLES.get(str(turn.get(role)))
    if name is None:
        raise BadRowError(f"a {role!r} among {', '.join(_ROLES)} in field {key!r}, not {turn.get(role)!r}")
    return Message(name, turn[content])


def _sharegpt(row: Mapping[str, Any]) -> Parsed:
    prompt = tuple(_messages(row["conversations"], "conversations", "from", "value"))
    good, bad = (_message(row[key], key, "from", "value") for key in ("chosen", "rejected"))
    return prompt, good.content, bad.content


def _hh(row: Mapping[str, Any]) -> Parsed:
    good, bad = (_dialogue(row[key], key) for key in ("chosen", "rejected"))
    if good[:-1] != bad[:-1]:
        raise BadRowError("sides that differ in their last turn alone")
    return tuple(good[:-1]), good[-1].content, bad[-1].content


def _dialogue(text: Any, key: str) -> list[Message]:
    """The turns of a dialogue written as one text."""
    parts = _HH_TURN.split(text) if isinstance(text, str) else []
    if len(parts) < 5 or parts[0].strip() or parts[-2] != "Assistant":
        raise BadRowError(f"a field 'prompt', or a dialogue of \\n\\nHuman: and \\n\\nAssistant: turns in {key!r}")
    names = ("user" if name == "Human" else "assistant" for name in parts[1::2])
    return [Message(_ROLES[name], body.strip()) for name, body in zip(names, parts[2::2], strict=True)]
