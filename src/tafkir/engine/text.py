"""From a stream of tokens to a stream of text: whole UTF-8 characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopBuffer", "TextStream"]

_INCOMPLETE = "�"
# An unfinished UTF-8 character spans three bytes at most, and every token holds at least one.
_MAX_HELD_TOKENS = 3


class TextStream:
    """Decodes tokens one by one and holds a character back until its last byte has come.

    Args:
        decode: turns token ids into text, with U+FFFD where the bytes are no UTF-8 (a byte-level tokenizer).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._held: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        self._held.append(token_id)
        text = self._decode(self._held)
        # An unfinished character decodes to exactly one U+FFFD at the end; any other stands for broken bytes.
        unfinished = text.endswith(_INCOMPLETE)
        stable = len(text) - 1 if unfinished else len(text)
        delta = text[self._shown : stable]
        if not unfinished:
            self._held, self._shown = [], 0
        elif len(self._held) > _MAX_HELD_TOKENS:
            self._held = self._held[-_MAX_HELD_TOKENS:]
            self._shown = len(self._decode(self._held)) - 1
        else:
            self._shown = max(self._shown, stable)
        return delta

    def flush(self) -> str:
        """Called at the end: a character that never got its last byte is left out, as is a U+FFFD meant as such."""
        self._held, self._shown = [], 0
        return ""


class StopBuffer:
    """Passes text on up to the first stop string; holds back what may still become one.

    Attributes:
        matched: the stop string that was met, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not shown before."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            at, self.matched = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = self._partial_match()
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        return out

    def _partial_match(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def flush(self) -> str:
        """Called at the end: what was held back and did not become a stop string."""
        out, self._held = self._held, ""
        return out
