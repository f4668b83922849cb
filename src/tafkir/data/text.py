"""Running text as bytes: a bundled play or a file of one's own, cut into windows to train on and windows held out."""

from __future__ import annotations

import gzip
import zlib
from importlib.resources import files
from pathlib import Path
from random import Random

from tafkir.data.packing import Document
from tafkir.errors import DataError
from tafkir.recipe.seeds import derive_seed

__all__ = ["BUNDLED_TEXTS", "TextStream", "heldout_windows", "read_text", "split_text"]

BUNDLED_TEXTS = ("tinyshakespeare",)

_HELDOUT_SHARE = 0.1


def read_text(source: str) -> bytes:
    """The bytes of a bundled text by its name, or of a plain or gzipped file by its path.

    Raises:
        DataError: there is no such text, or its file is damaged.
    """
    bundled = source in BUNDLED_TEXTS
    path = files("tafkir") / "datasets" / source / "input.txt.gz" if bundled else Path(source)
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if bundled or source.endswith(".gz") else raw
    except FileNotFoundError:
        raise DataError(
            "there is no such text",
            where=source,
            expected=f"a file, or one of the bundled texts {', '.join(BUNDLED_TEXTS)}",
            fix="correct lab.text in the recipe",
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the gzip file is truncated or damaged ({error})", where=source, fix="copy it again") from None
    except OSError as error:
        raise DataError(f"the text cannot be read ({error.strerror})", where=source) from None


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """The part to train on, and the last tenth, which is held out."""
    cut = len(text) - round(_HELDOUT_SHARE * len(text))
    return text[:cut], text[cut:]


class TextStream:
    """Windows at random places of a text; those of a step depend on (seed, step) alone."""

    def __init__(self, text: bytes, *, sequence_length: int, batch_sequences: int, seed: int) -> None:
        if len(text) < sequence_length:
            raise _too_short(len(text), "training", sequence_length)
        self.text, self.seed = text, seed
        self.sequence_length, self.batch_sequences = sequence_length, batch_sequences

    def batch_at(self, step: int) -> list[Document]:
        """The windows of a step; every byte but a window's first is a target."""
        random = Random(derive_seed(self.seed, "step", step))
        last = len(self.text) - self.sequence_length
        starts = [random.randint(0, last) for _ in range(self.batch_sequences)]
        return [(list(self.text[start : start + self.sequence_length]), None) for start in starts]


def heldout_windows(text: bytes, *, sequence_length: int, count: int) -> list[Document]:
    """Windows that do not overlap, spread over the whole text.

    Raises:
        DataError: the text does not hold so many.
    """
    if len(text) < sequence_length * count:
        raise _too_short(len(text), "held-out", sequence_length * count)
    stride = len(text) // count
    return [(list(text[i * stride : i * stride + sequence_length]), None) for i in range(count)]


def _too_short(size: int, part: str, wanted: int) -> DataError:
    return DataError(
        f"the {part} part of the text has {size} bytes",
        where="lab.text",
        expected=f"at least {wanted}",
        fix="take a longer text, or lower lab.sequence_length or lab.validation_sequences",
    )
