"""Text from tokens: whole characters only, stop strings across pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.engine.text import StopBuffer, TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def stream_bytes(data: bytes) -> list[str]:
    stream = TextStream(decode_bytes)
    return [stream.push(byte) for byte in data] + [stream.flush()]


@pytest.mark.parametrize("text", ["plain", "ثمانية وأربعون", "😀🤔👨‍👩‍👧", "a😀b ب", "x\ufffdy", ""])
def test_characters_come_whole(text: str) -> None:
    pieces = stream_bytes(text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
@settings(max_examples=120, deadline=None)
def test_any_text_byte_by_byte(text: str) -> None:
    assert "".join(stream_bytes(text.encode())) == text


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_show_what_the_whole_would_but_for_an_unfinished_end(data: bytes) -> None:
    whole = decode_bytes(data)
    shown = "".join(stream_bytes(data))
    unfinished = 1 if whole.endswith("\ufffd") else 0
    assert shown.rstrip("\ufffd") == whole[: len(whole) - unfinished].rstrip("\ufffd")
    assert len(whole) - len(shown) in (0, unfinished)


def test_an_unfinished_last_character_is_left_out() -> None:
    assert "".join(stream_bytes("ab😀".encode()[:-1])) == "ab"


def push_all(buffer: StopBuffer, pieces: Sequence[str]) -> list[str]:
    return [buffer.push(piece) for piece in pieces]


def test_stop_strings_across_pieces() -> None:
    buffer = StopBuffer(["END", "STOP"])
    assert push_all(buffer, ["a", "bE", "N", "x", "EN", "D more", "more"]) == ["a", "b", "", "ENx", "", "", ""]
    assert buffer.matched == "END"
    assert buffer.flush() == ""


def test_the_first_match_wins_and_a_piece_is_cut() -> None:
    buffer = StopBuffer(["lo", "ell"])
    assert buffer.push("hello") == "h"
    assert buffer.matched == "ell"


def test_what_was_held_comes_out_at_the_end() -> None:
    buffer = StopBuffer(["stop"])
    assert buffer.push("do not st") == "do not "
    assert (buffer.flush(), buffer.matched) == ("st", None)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=120, deadline=None)
def test_pieces_equal_one_search(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    buffer = StopBuffer(stops)
    shown = "".join(push_all(buffer, pieces)) + buffer.flush()
    # Character by character: the match that ends first is the one that a stream can act on.
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (shown, buffer.matched) == (text, None)
    else:
        assert buffer.matched in stops
        assert text.startswith(shown + str(buffer.matched))
        assert not any(stop in shown for stop in stops)
