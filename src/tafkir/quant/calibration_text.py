"""What a model reads to be calibrated: made-up word problems, a text file, or JSON lines."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend

from tafkir.data.chat import encode_conversation, encode_document
from tafkir.data.lines import BadRowError, numbered_lines, parse_row
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.quantize import CalibrationConfig

__all__ = ["read_calibration_text"]

# Problems that no stage draws, and no comparison of logits: those count from 0, 1e9 and 2e9.
_FIRST_STORY = 3 * 10**9


def read_calibration_text(source: Path | str, config: CalibrationConfig) -> list[list[int]]:
    """Token ids of documents of at most `window` tokens, at most `tokens` in all.

    JSON lines have `text`, or `token_ids` as they are; every other file is one running text.

    Raises:
        DataError: the checkpoint has no tokenizer, the file cannot be read, a line is no such object, or there are no
            two tokens.
    """
    folder = find_checkpoint(source)
    if config.text == "task":
        tokenizer, documents, count = Tokenizer.load(folder), list[list[int]](), 0
        while count < config.tokens:
            # In turn as text and as a conversation, for a base model and for one that was fine-tuned.
            encode = (encode_document, encode_conversation)[len(documents) % 2]
            ids = encode(tokenizer, make_story(_FIRST_STORY + len(documents)))[0][: config.window]
            documents.append(ids[: config.tokens - count])
            count += len(ids)
        return documents
    path = Path(config.text)
    texts = _from_json_lines(path, folder) if path.suffix in (".jsonl", ".gz") else [_encode(folder, _read(path))]
    documents, count = [], 0
    for ids in texts:
        for start in range(0, len(ids), config.window):
            piece = ids[start : start + min(config.window, config.tokens - count)]
            if len(piece) > 1:
                documents.append(piece)
                count += len(piece)
    if not documents:
        raise DataError("there is no text to calibrate on", where=str(path), expected="two tokens or more")
    return documents


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text ({error})", where=str(path)) from error


def _encode(folder: Path, text: str) -> list[int]:
    """By the checkpoint's own tokenizer.json, whoever trained it; nothing is added."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            fix="copy the tokenizer there, or give JSON lines with token_ids",
        )
    ids: list[int] = Backend.from_file(str(file)).encode(text, add_special_tokens=False).ids
    return ids


def _from_json_lines(path: Path, folder: Path) -> list[list[int]]:
    documents = []
    for number, line in numbered_lines(path, str(path), expected="JSON lines", fix="give --calibrate an existing file"):
        where = f"{path}:{number}"
        try:
            found = parse_row(line)
        except BadRowError as error:
            raise DataError(str(error), where=where) from error
        ids, text = found.get("token_ids"), found.get("text")
        if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids):
            documents.append(ids)
        elif isinstance(text, str):
            documents.append(_encode(folder, text))
        else:
            raise DataError("neither text nor ids", where=where, expected='{"text": "..."} or {"token_ids": [...]}')
    return documents
