"""Sampled text, coloured by how far the training engine's probability of each token is from the sampling engine's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Piece", "colour_text", "legend", "log_ratios", "style_of", "whole_pieces"]

# |log k| from which a shade begins, and the colours for k < 1 and k > 1: readable on dark and on light terminals.
_SHADES = (
    (0.02, "color(75)", "color(217)"),
    (0.1, "color(33)", "color(203)"),
    (0.5, "bold color(27)", "bold color(196)"),
)
_MASKED = "underline"
# Letters that join their neighbours: a change of colour inside a word would tear them apart on a terminal.
_JOINING = re.compile(r"[\u0600-\u06FF\u0750-\u077F\u08A0-\u08FF\uFB50-\uFDFF\uFE70-\uFEFF]")
_WORD = re.compile(r"\s+|\S+")


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole characters with the log-ratio of the tokens that make them: that of the one furthest from 0."""

    text: str
    log_ratio: float | None
    masked: bool


def log_ratios(train: Sequence[float | None] | None, sampling: Sequence[float | None]) -> list[float | None]:
    """log k of each token, k = p_train / p_sampling; None where one of them is not known."""
    if train is None:
        return [None] * len(sampling)
    return [None if a is None or b is None else a - b for a, b in zip(train, sampling, strict=True)]


def whole_pieces(
    token_ids: Sequence[int],
    ratios: Sequence[float | None],
    masked: Sequence[int],
    token_bytes: Callable[[int], bytes],
) -> list[Piece]:
    """Tokens as pieces of whole characters; Arabic ones as whole words, so that their letters stay joined."""
    dropped = set(masked)
    pieces: list[Piece] = []
    pending, members = b"", []
    for place, token in enumerate(token_ids):
        pending += token_bytes(token)
        members.append(Piece("", ratios[place], place in dropped))
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError:
            continue
        pieces.append(_merged(text, members))
        pending, members = b"", []
    if pending:
        pieces.append(_merged(pending.decode("utf-8", "replace"), members))
    return list(_join_words(pieces))


def _merged(text: str, members: Sequence[Piece]) -> Piece:
    known = [piece.log_ratio for piece in members if piece.log_ratio is not None]
    return Piece(text, max(known, key=abs) if known else None, any(piece.masked for piece in members))


def _join_words(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Merge neighbours that share an Arabic word; a word ends at white space."""
    parts = [Piece(part, piece.log_ratio, piece.masked) for piece in pieces for part in _WORD.findall(piece.text)]
    word: list[Piece] = []
    for part in (*parts, None):
        if part is not None and not part.text.isspace():
            word.append(part)
            continue
        if any(_JOINING.search(each.text) for each in word):
            yield _merged("".join(each.text for each in word), word)
        else:
            yield from word
        word = []
        if part is not None:
            yield part


def style_of(log_ratio: float | None, masked: bool) -> str:
    """The rich style of a token: blue below k = 1, red above, stronger further away; underlined where it is dropped."""
    shade = ""
    for limit, below, above in _SHADES:
        if log_ratio is not None and abs(log_ratio) >= limit:
            shade = below if log_ratio < 0 else above
    return " ".join(part for part in (shade, _MASKED if masked else "") if part)


def colour_text(pieces: Sequence[Piece]) -> Text:
    """The pieces as one rich text."""
    from rich.text import Text

    text = Text()
    for piece in pieces:
        # Control characters would move the cursor.
        clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in piece.text)
        text.append(clean, style_of(piece.log_ratio, piece.masked))
    return text


def legend() -> Text:
    """What the colours mean."""
    from rich.text import Text

    text = Text("k = p_train / p_sampling:  ")
    for limit, below, _ in reversed(_SHADES):
        text.append(f"k < {math.exp(-limit):.2f}", below).append("  ")
    text.append("k = 1  ")
    for limit, _, above in _SHADES:
        text.append(f"k > {math.exp(limit):.2f}", above).append("  ")
    return text.append("dropped", _MASKED)
