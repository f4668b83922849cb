"""Byte-level BPE in which every digit is a token of its own, with the special tokens of the chat format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tafkir.data.chat_template import CHAT_TEMPLATE
from tafkir.errors import DataError
from tafkir.runlog.atomic import write_text

__all__ = [
    "DOCUMENT_END",
    "THINK_END",
    "THINK_START",
    "TURN_END",
    "TURN_START",
    "Tokenizer",
    "byte_of_character",
    "is_own",
    "read_backend",
]

DOCUMENT_END = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"

_CONTROL = (DOCUMENT_END, TURN_START, TURN_END)
_VISIBLE = (THINK_START, THINK_END)

# A LaTeX command with its brace; an English clitic; a word with the space before it; one digit; one other sign; spaces.
_PATTERN = (
    r"\\[A-Za-z]+\{?|['\u2019](?:[sdmt]|ll|ve|re)(?!\p{L})| ?\p{L}[\p{L}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
)
# The same for ASCII text, where Python's own regular expressions are enough.
_ASCII_PATTERN = re.compile(
    r"\\[A-Za-z]+\{?|'(?:[sdmt]|ll|ve|re)(?![A-Za-z])| ?[A-Za-z]+|[0-9]"
    r"| ?[^ \t\n\r\f\vA-Za-z0-9]|[ \t\n\r\f\v]+(?![^ \t\n\r\f\v])|[ \t\n\r\f\v]+"
)
_CACHE_SIZE = 1 << 16


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


byte_of_character = _byte_of_character()
"""The byte of each character of a byte-level vocabulary."""


class _Pieces(dict[str, list[int]]):
    """Token ids of pre-tokenized pieces, remembered: byte-pair merges never cross a piece."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, piece: str) -> list[int]:
        ids = self.encode(piece)
        if len(self) < _CACHE_SIZE:
            self[piece] = ids
        return ids


class Tokenizer:
    """Text to token ids and back.

    `encode` loses nothing: `decode(encode(text), skip_special=False)` is the text, whatever its script. A lone
    surrogate, which is no text, becomes U+FFFD. `<think>` and `</think>` stay visible when special tokens are skipped.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        plain = json.loads(backend.to_str())
        plain["added_tokens"] = []
        self._plain = Backend.from_str(json.dumps(plain))
        self._pieces = _Pieces(self._encode_slowly)
        self._special: dict[str, int] = {}
        self._texts: dict[int, str] = {}  # of single tokens, as streams ask for them
        for token in (*_CONTROL, *_VISIBLE):
            id = backend.token_to_id(token)
            if id is None:
                raise DataError(f"the tokenizer has no token {token}", expected="a tokenizer that Tafkir trained")
            self._special[token] = id
        self._control_ids = {self._special[token] for token in _CONTROL}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @property
    def vocab_size(self) -> int:
        """Entries, the special tokens among them."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def document_end_id(self) -> int:
        """`<|endoftext|>`, the end of a pre-training document."""
        return self._special[DOCUMENT_END]

    @property
    def turn_end_id(self) -> int:
        """`<|im_end|>`, the end of a chat turn."""
        return self._special[TURN_END]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        return self.turn_end_id, self.document_end_id

    @property
    def eos_id(self) -> int:
        """What ends a generation in the chat format: `<|im_end|>`."""
        return self._special[TURN_END]

    @property
    def pad_id(self) -> int:
        """`<|endoftext|>`, where something has to fill up a row."""
        return self._special[DOCUMENT_END]

    def special_id(self, token: str) -> int:
        """The id of a special token such as `<think>`. Raises KeyError for any other text."""
        return self._special[token]

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, which need not be whole characters. Raises KeyError for an id that no token has."""
        token = self._backend.id_to_token(id)
        if token is None:
            raise KeyError(id)
        if token in self._special:
            return token.encode()
        return bytes(byte_of_character[character] for character in token)

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Token ids of a text, without anything added.

        Args:
            allow_special: read `<|im_end|>` and its like as special tokens; False takes them for ordinary characters,
                so that a user's text cannot forge a turn.
        """
        ids: list[int] = []
        for i, part in enumerate(self._special_pattern.split(text) if allow_special and "<" in text else (text,)):
            if i % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if not text.isascii():
            return self._encode_slowly(text)
        return list(chain.from_iterable(map(self._pieces.__getitem__, _ASCII_PATTERN.findall(text))))

    def _encode_slowly(self, text: str) -> list[int]:
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._plain.encode(clean, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 (a cut character) show as U+FFFD.

        Args:
            skip_special: leave out `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`.
        """
        if skip_special and len(ids) == 1 and (known := self._texts.get(ids[0])) is not None:
            return known
        kept = [id for id in ids if id not in self._control_ids] if skip_special else list(ids)
        text = str(self._backend.decode(kept, skip_special_tokens=False))
        if skip_special and len(ids) == 1:
            self._texts[ids[0]] = text
        return text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A tokenizer of at most `vocab_size` entries; equal texts give equal tokenizers.

        Raises:
            DataError: the size leaves no room for the 256 bytes and the special tokens.
        """
        smallest = 256 + len(_CONTROL) + len(_VISIBLE)
        if vocab_size < smallest:
            raise DataError(
                f"vocab_size={vocab_size} is too small",
                where="tokenizer.vocab_size",
                expected=f"at least {smallest}: every byte and the special tokens",
            )
        backend = Backend(models.BPE())
        split = pre_tokenizers.Split(Regex(_PATTERN.replace(r"\u2019", "\u2019")), behavior="isolated")
        bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_level])
        backend.decoder = decoders.ByteLevel()
        specials = [AddedToken(token, special=True, normalized=False) for token in (*_CONTROL, *_VISIBLE)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        trained = json.loads(backend.to_str())
        for token in trained["added_tokens"]:
            # as in Qwen3: skipping special tokens leaves the chain's limits visible
            token["special"] = token["content"] not in _VISIBLE
        return cls(Backend.from_str(json.dumps(trained)))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and what `transformers` needs beside it (tokenizer_config.json, chat_template.jinja).

        Raises:
            RunDirError: the place is not writable, or the disk is full.
        """
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": DOCUMENT_END,
            "additional_special_tokens": [TURN_START],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_eos_token": False,
        }
        for name, text in (
            ("tokenizer.json", self._backend.to_str(pretty=False)),
            ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
            ("chat_template.jinja", CHAT_TEMPLATE),
        ):
            write_text(folder / name, text)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder that `save` wrote, or a tokenizer.json.

        Raises:
            DataError: the file is missing, damaged, or lacks a special token.
        """
        backend, where = read_backend(folder)
        try:
            return cls(backend)
        except DataError as error:
            raise DataError(error.what, where=where, expected=error.expected) from None


def read_backend(folder: str | Path) -> tuple[Backend, str]:
    """A tokenizer.json as the library reads it, and its path for errors.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() or path.suffix != ".json" else path
    try:
        text = path.read_text(encoding="utf-8")
        # the library reports a parse error as a bare Exception: look for broken JSON before it does
        if not isinstance(json.loads(text), dict):
            raise ValueError("not a JSON object")
        return _parse_backend(text), str(path)
    except FileNotFoundError:
        fix = "point to a checkpoint, or to the folder that the tokenizer stage wrote"
        raise DataError("there is no tokenizer", where=str(path), fix=fix) from None
    except (OSError, ValueError) as error:
        raise DataError(f"the tokenizer cannot be read ({error})", where=str(path), fix="copy it again") from None


def is_own(backend: Backend) -> bool:
    """Whether Tafkir trained it: its way of splitting, its special tokens."""
    splits = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    pattern = _PATTERN.replace(r"\u2019", "\u2019")
    own = any(each.get("pattern") == {"Regex": pattern} for each in splits.get("pretokenizers", ()))
    return own and all(backend.token_to_id(token) is not None for token in (*_CONTROL, *_VISIBLE))


def _parse_backend(text: str) -> Backend:
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
