"""Running text: where it comes from, what is held out, and that a step's windows are a function of its number."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from tafkir.data.text import TextStream, heldout_windows, read_text, split_text
from tafkir.errors import DataError


def test_the_bundled_text_is_whole_and_licensed() -> None:
    text = read_text("tinyshakespeare")
    assert len(text) == 1_115_394 and text.startswith(b"First Citizen:\nBefore we proceed")
    train, heldout = split_text(text)
    assert train + heldout == text and len(heldout) == 111_539
    folder = Path(__file__).parents[2] / "src/tafkir/datasets/tinyshakespeare"
    assert "public domain" in (folder / "LICENSE").read_text() and (folder / "README.md").exists()


def test_ones_own_text_may_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert read_text(str(tmp_path / "a.txt")) == read_text(str(tmp_path / "a.txt.gz")) == b"hello"


def test_windows_are_a_function_of_seed_and_step() -> None:
    text = bytes(range(256)) * 4
    streams = [TextStream(text, sequence_length=16, batch_sequences=3, seed=seed) for seed in (1, 1, 2)]
    batches = [stream.batch_at(5) for stream in streams]
    assert batches[0] == batches[1] != batches[2]
    assert batches[0] != streams[0].batch_at(6)
    for ids, mask in batches[0]:
        assert len(ids) == 16 and bytes(ids) in text and mask is None
    exact = TextStream(b"abcd", sequence_length=4, batch_sequences=1, seed=0)
    assert exact.batch_at(0) == [(list(b"abcd"), None)]


def test_held_out_windows_do_not_overlap() -> None:
    text = bytes(range(100))
    windows = heldout_windows(text, sequence_length=10, count=7)
    starts = [ids[0] for ids, _ in windows]
    assert len(windows) == 7 and all(b - a >= 10 for a, b in pairwise(starts))
    assert sum(ids == list(range(ids[0], ids[0] + 10)) for ids, _ in windows) == 7


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such text; expected .*tinyshakespeare.*lab\.text"):
        read_text("nowhere.txt")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_text(str(broken))
    with pytest.raises(DataError, match="cannot be read"):
        read_text(str(tmp_path))
    with pytest.raises(DataError, match="the training part of the text has 3 bytes; expected at least 4"):
        TextStream(b"abc", sequence_length=4, batch_sequences=1, seed=0)
    with pytest.raises(DataError, match="the held-out part of the text has 9 bytes; expected at least 10"):
        heldout_windows(b"123456789", sequence_length=5, count=2)
