"""A chat in the terminal, or one answer per line of a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tafkir.errors import RequestError
from tafkir.records import Message, Request, SamplingParams
from tafkir.serve.stream import ChoiceStream

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine

__all__ = ["run_chat"]

_DIM, _BOLD, _RED, _PLAIN = "\033[2m", "\033[1m", "\033[31m", "\033[0m"
_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def run_chat(
    checkpoint: Path | str,
    *,
    params: SamplingParams | None = None,
    system: str | None = None,
    history: bool = False,
    show_thinking: bool = True,
    speculate: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> None:
    """Talk with a model until the input ends.

    Args:
        checkpoint: a checkpoint folder with a tokenizer.
        params: how to sample; None is greedy with at most 256 tokens.
        system: a system message that opens every conversation.
        history: keep the conversation; otherwise every message stands alone, as in the training of small models.
        show_thinking: show the chain of thought (dim on a terminal).
        speculate: what drafts tokens, as in `build_speculation`.
        stdin: where messages come from, one a line; a terminal gets a prompt.
        stdout: where answers go; only a terminal gets colours.

    Raises:
        CheckpointError, DataError: the checkpoint or its tokenizer is missing or damaged.
        RequestError: the sampling parameters are not valid; from a pipe, also a message that is too long.
    """
    from tafkir.data.published_tokenizer import load_tokenizer
    from tafkir.engine.requests import check_params
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.serve.loading import build_engine, name_of

    params = params or SamplingParams(temperature=0.0, max_tokens=256)
    check_params(params)
    path = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(path)
    engine = build_engine(path, tokenizer, None, max_batch=1, speculate=speculate)
    chat = _Chat(engine, tokenizer, params, system, history, _Screen(stdout or sys.stdout, show_thinking))
    source = stdin or sys.stdin
    if source.isatty():
        chat.screen.note(f"{name_of(path)} · {engine.decoder.config.num_parameters():,} parameters · {_HELP}")
        chat.talk(_typed_lines())
    else:
        chat.answer_lines(source)


def _typed_lines() -> Iterator[str]:
    """Lines typed at the prompt until Ctrl-D, or Ctrl-C on an empty one."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing
    while True:
        try:
            yield input("› ")
        except (EOFError, KeyboardInterrupt):
            return


class _Screen:
    """Writes an answer: the chain of thought dim, the answer plain."""

    def __init__(self, out: TextIO, show_thinking: bool) -> None:
        self._out, self._show_thinking = out, show_thinking
        self._colours = out.isatty() and "NO_COLOR" not in os.environ
        self._thinking = False

    def _style(self, text: str, style: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._colours and text else text

    def write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def note(self, text: str) -> None:
        self.write(self._style(text, _DIM) + "\n")

    def error(self, text: str) -> None:
        self.write(self._style(f"error: {text}", _RED) + "\n")

    def show(self, reasoning: str, content: str) -> None:
        if reasoning and self._show_thinking:
            self._thinking = True
            self.write(self._style(reasoning, _DIM))
        if content:
            if self._thinking:
                self.write("\n")
                self._thinking = False
            self.write(self._style(content, _BOLD))

    def end(self, remark: str = "") -> None:
        self._thinking = False
        self.write((self._style(f" [{remark}]", _DIM) if remark else "") + "\n")


class _Chat:
    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        system: str | None,
        history: bool,
        screen: _Screen,
    ) -> None:
        self.engine, self.tokenizer, self.params, self.screen = engine, tokenizer, params, screen
        self._opening = [Message("system", system)] if system else []
        self._history = history
        self._messages: list[Message] = list(self._opening)

    def talk(self, lines: Iterator[str]) -> None:
        for line in lines:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self._messages = list(self._opening)
                self.screen.note("forgotten")
            elif text.startswith("/"):
                self.screen.note(_HELP)
            elif text:
                try:
                    self._answer(text)
                except RequestError as error:
                    self.screen.error(str(error) + (". /reset starts over" if self._history else ""))

    def answer_lines(self, lines: TextIO) -> None:
        """Answer every line that is not blank; the commands of the terminal work here as well."""
        for line in lines:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self._messages = list(self._opening)
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        from tafkir.data.chat import encode_chat

        messages = [*self._messages, Message("user", text)]
        ids = tuple(encode_chat(self.tokenizer, messages))
        self.engine.add_request(Request("chat", ids, self.params))
        reasoning, content, remark = self._generate()
        self.screen.end(remark)
        if self._history:
            self._messages = [*messages, Message("assistant", content, reasoning or None)]

    def _generate(self) -> tuple[str, str, str]:
        """Show the answer as it comes; its reasoning, its text, and what cut it short."""
        stream = ChoiceStream(self.tokenizer, self.engine.eos_ids, self.params.stop, split_reasoning=True)
        reasoning, content, remark = "", "", ""
        with _interruptible() as stopped:
            while self.engine.has_work and not stopped:
                for event in self.engine.step():
                    delta = stream.push(event)
                    self.screen.show(delta.reasoning, delta.content)
                    reasoning, content = reasoning + delta.reasoning, content + delta.content
                    if event.finish_reason == "length":
                        remark = "cut at the token limit"
        if self.engine.cancel("chat") is not None:
            remark = "stopped"
        return reasoning, content, remark


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """While this runs, Ctrl-C only fills the list, so that it never lands in the middle of a step."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield stopped
        return
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
