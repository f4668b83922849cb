"""Breaks text, bytes and JSON values at random, as files and requests break: cut, doubled, misspelt, huge, nested."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

__all__ = ["SCALARS", "mutate_bytes", "mutate_text", "mutate_value", "to_json"]

SCALARS: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 10**6, 10**18, -(10**18), 10**400,
    0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "a", "x" * 300, "\ud800", "\x00", "٣", "½", "-", "1/0", "9" * 400, "1e999999999", "\\boxed{", "<|im_end|>",
    "../../etc/passwd", "/dev/zero", "train", "number", [], {}, [[]], [[[]]], [None], {"": None},
)  # fmt: skip

_PIECES = (
    *(
        b"{ } [ ] ( ) \" ' , : = == # \\ / \n \r\n \t . - + * ^ % $ 0 1 7 e null true nan inf 1e999 -0 99999999999"
        b" \\boxed{ \\frac{ } \\sqrt{ ^{ <think> </think> #### ``` [[ ]] {{ }} \"\"\" ''' <|im_start|> ../ ~"
    ).split(b" "),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", "٣".encode(), "\u202e".encode(), "½".encode()),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"((((" * 500, b"\\frac{" * 400, b"-" * 2000, b"2^" * 300),
)


def mutate_bytes(random: Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to six changes at random places; pieces of `others` may come in."""
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        start = random.randrange(len(content) + 1)
        end = min(len(content), start + random.choice((0, 0, 1, 2, 8, 40, 400)))
        kind = random.randrange(6)
        if kind == 0:
            piece = b""
        elif kind == 1:
            piece = content[start:end] * random.choice((2, 3, 50))
        elif kind == 2:
            piece = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 8))))
        elif kind == 3 and others:
            other = random.choice(others)
            begin = random.randrange(len(other) + 1)
            piece = other[begin : begin + random.choice((4, 30, 300))]
        elif kind == 4 and start < len(content):
            piece, end = bytes([content[start] ^ 1 << random.randrange(8)]), start + 1
        else:
            piece = random.choice(_PIECES)
        content = content[:start] + piece + content[end:]
        if random.random() < 0.03:
            content = content[: random.randrange(len(content) + 1)]
    return content


def mutate_text(random: Random, text: str, others: Sequence[str] = ()) -> str:
    """`mutate_bytes` on text; what is no UTF-8 any more becomes U+FFFD, or halves of surrogate pairs."""
    broken = mutate_bytes(random, text.encode("utf-8", "surrogatepass"), [other.encode() for other in others[:3]])
    return broken.decode("utf-8", random.choice(("replace", "surrogateescape")))


def mutate_value(random: Random, value: Any, words: Sequence[str] = ()) -> Any:
    """A copy of a JSON value with one to three nodes changed: another value, a key misspelt, lost, new or exchanged."""
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _change(random, value, words, depth=0)
    return value


def _change(random: Random, value: Any, words: Sequence[str], depth: int) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0
    if inside and random.random() < 0.75 and depth < 12:
        keys: Any = list(value) if isinstance(value, dict) else range(len(value))
        key = random.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = _change(random, value[key], words, depth + 1)
        return copy
    kind = random.randrange(7)
    if kind == 0 and isinstance(value, dict) and value:
        copy = dict(value)
        gone = copy.pop(random.choice(list(copy)))
        if random.random() < 0.5:
            copy[random.choice((*words, "x", "", "a" * 200))] = gone
        return copy
    if kind == 1 and isinstance(value, dict):
        return {**value, random.choice((*words, "x")): random.choice(SCALARS)}
    if kind == 2 and isinstance(value, list):
        return value * random.choice((0, 2, 30))
    if kind == 3 and isinstance(value, str):
        return mutate_text(random, value)
    if kind == 4 and isinstance(value, int | float) and not isinstance(value, bool):
        return random.choice((-value, value + 1, value * 2**31, value // 3, str(value), [value]))
    if kind == 5:
        return random.choice(([value], {"a": value}, to_json(value).decode()))
    if kind == 6 and random.random() < 0.05:
        for _ in range(random.choice((50, 3000))):
            value = [value]
        return value
    return random.choice(SCALARS)


def to_json(value: Any) -> bytes:
    """JSON as a client may send it, with NaN and halves of surrogate pairs."""
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):
        return b"[" * 100_000
