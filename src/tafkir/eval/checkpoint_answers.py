"""A checkpoint under evaluation: answers come from a completer in this process, started when the first is asked for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import tafkir
from tafkir.checkpoint.fingerprint import checkpoint_fingerprint
from tafkir.data.chat import CHAT_TEMPLATE, encode_chat
from tafkir.data.tokenizer import Tokenizer
from tafkir.eval.answers import Ask, Reply
from tafkir.protocols import Completer
from tafkir.records import Message, Request

__all__ = ["CheckpointAnswers"]


class CheckpointAnswers:
    """Answers of a checkpoint folder; an `Answerer`.

    Args:
        name: for tables.
        folder: with its tokenizer.
        context: most tokens of a prompt and its answer; `max_tokens` is cut to what the prompt leaves of it.
        build_completer: loads the weights.
        settings: what else the answers depend on, such as the number format of the cache.
        chunk: answers asked for at once. A running chunk is finished before a budget is looked at again.

    Raises:
        DataError: it has no tokenizer.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        context: int,
        build_completer: Callable[[], Completer],
        settings: str = "",
        chunk: int = 8192,
    ) -> None:
        self.name = name
        self._context, self._build, self._chunk = context, build_completer, chunk
        self._tokenizer = Tokenizer.load(folder)
        engine = f"tafkir {tafkir.__version__}, torch {importlib.metadata.version('torch')}"
        parts = [checkpoint_fingerprint(folder), hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest(), engine, settings]
        self.fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
        self._completer: Completer | None = None

    def read(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins."""
        return encode_chat(self._tokenizer, messages)

    def answers(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Yield every answer as it is finished; a prompt that fills the context is an error of that answer alone."""
        drawn = iter(asks)
        while chunk := {ask.key: ask for ask in itertools.islice(drawn, self._chunk)}:
            completer = self._start()
            began = time.perf_counter()
            fitting = []
            for ask in chunk.values():
                room = self._context - len(ask.prompt)
                if room < 1:
                    reason = f"the prompt has {len(ask.prompt)} tokens, the context {self._context}"
                    yield ask, Reply(failure="error", reason=reason)
                else:
                    params = replace(
                        ask.params,
                        max_tokens=min(ask.params.max_tokens, room),
                        stop_token_ids=(self._tokenizer.turn_end_id,),
                    )
                    fitting.append(Request(ask.key, tuple(ask.prompt), params))
            for completion in completer.complete(fitting) if fitting else ():
                ask = chunk[completion.request_id]
                yield (
                    ask,
                    Reply(
                        text=self._tokenizer.decode(list(completion.token_ids)),
                        tokens=len(completion.token_ids),
                        prompt_tokens=len(ask.prompt),
                        finish_reason=completion.finish_reason,
                        latency_s=time.perf_counter() - began,
                    ),
                )

    def score(self, text: str) -> tuple[float, int]:
        """Every token once, the first after the end of a document; a text longer than the context in parts.

        A part begins with the last token of the one before it, which is all that it knows of that.
        """
        ids = [self._tokenizer.document_end_id, *self._tokenizer.encode(text, allow_special=False)]
        step = self._context - 1
        parts = [ids[first : first + self._context] for first in range(0, len(ids) - 1, step)]
        logprobs = self._start().score(parts)
        return sum(float(part.sum()) for part in logprobs), len(ids) - 1

    def _start(self) -> Completer:
        if self._completer is None:
            self._completer = self._build()
        return self._completer

    def close(self) -> None:
        """Let go of the weights."""
        self._completer = None
