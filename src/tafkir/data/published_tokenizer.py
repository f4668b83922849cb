"""Tokenizers of checkpoints that others published: their own splitting, special tokens, ends and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tafkir.data.tokenizer import Tokenizer, byte_of_character, is_own, read_backend
from tafkir.errors import DataError, RequestError
from tafkir.records import Message

__all__ = ["PublishedTokenizer", "load_tokenizer"]

# Noncharacters, which no text holds: they stand for special tokens that a user spelled out.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, Tafkir's own or another byte-level one.

    Raises:
        DataError: it is missing or damaged, or not byte-level.
    """
    backend, where = read_backend(folder)
    return Tokenizer.load(folder) if is_own(backend) else PublishedTokenizer(backend, folder, where)


class PublishedTokenizer(Tokenizer):
    """A byte-level tokenizer as `transformers` would run it.

    Args:
        backend: what tokenizer.json says.
        folder: where the chat template and the tokens that end an answer are told of.
        where: names the file in errors.
    """

    def __init__(self, backend: Backend, folder: Path, where: str) -> None:
        plain = json.loads(backend.to_str())
        if "ByteLevel" not in json.dumps(plain["decoder"]):
            raise DataError("the tokenizer is not byte-level", where=where, expected="a ByteLevel decoder")
        added = plain["added_tokens"]
        plain["added_tokens"] = []
        self._backend, self._plain = backend, Backend.from_str(json.dumps(plain))
        self._texts = {}
        self._special = {token["content"]: token["id"] for token in added}
        self._added = {id: token for token, id in self._special.items()}
        self._control_ids = {token["id"] for token in added if token["special"]}
        names = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "(?!)")
        self._settings = _read(folder / "tokenizer_config.json")
        self._ends = _end_ids(folder, self._settings, self._special)
        if not self._ends:
            raise DataError(
                "nothing says which token ends an answer", where=str(folder), expected="eos_token_id in config.json"
            )
        file = folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else self._settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        self.template: str | None = template

    @property
    def document_end_id(self) -> int:
        return self._ends[-1]

    @property
    def turn_end_id(self) -> int:
        return self._ends[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._ends

    def token_bytes(self, id: int) -> bytes:
        """As of `Tokenizer`; none for a row of the model's vocabulary that the tokenizer does not use."""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        return bytes(byte_of_character[character] for character in token) if token is not None else b""

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """As of `Tokenizer`, with what the tokenizer puts around a text, such as a token for its beginning."""
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        backend = self._backend if allow_special else self._plain
        return list(backend.encode(clean, add_special_tokens=allow_special).ids)

    @property
    def can_think(self) -> bool:
        """Whether the chat template knows of thinking."""
        return self.template is not None and "think" in self.template

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> list[int]:
        """Token ids of a conversation by the checkpoint's own template; special tokens in a turn stay plain text.

        Raises:
            RequestError: there is no template, or it refuses the conversation.
        """
        text = self._render(messages, add_generation_prompt, thinking)
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)):
            if i % 2:
                ids += self._plain.encode(self._added[int(part)], add_special_tokens=False).ids
            elif part:
                ids += self._backend.encode(part, add_special_tokens=False).ids
        return ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, thinking: bool | None) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            what = "the model has no chat template"
            raise RequestError(what, where="messages", expected="a chat model", fix="use /v1/completions")

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        turns = [_turn(message, self._hide(message.content), self._hide(message.reasoning)) for message in messages]
        names = {name: self._settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        names = {name: value["content"] if isinstance(value, dict) else value for name, value in names.items()}
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return environment.from_string(self.template).render(
                messages=turns, add_generation_prompt=add_generation_prompt, **names, **options
            )
        except TemplateError as error:
            raise RequestError(f"the chat template refuses the conversation ({error})", where="messages") from None

    def _hide(self, text: str | None) -> str | None:
        if text is None:
            return None
        text = text.replace(_OPEN, "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._special_pattern.sub(lambda found: f"{_OPEN}{self._special[found[0]]}{_CLOSE}", text)


def _turn(message: Message, content: str | None, reasoning: str | None) -> dict[str, Any]:
    return {"role": message.role, "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"the file cannot be read ({error})", where=str(path)) from None
    return found if isinstance(found, dict) else {}


def _end_ids(folder: Path, settings: dict[str, Any], special: dict[str, int]) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's own, then those of generation_config.json and config.json."""
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = [special[token]] if token in special else []
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
    return tuple(dict.fromkeys(found))
