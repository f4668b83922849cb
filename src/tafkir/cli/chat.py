"""`tafkir chat CHECKPOINT`: ask a model questions in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.records import SamplingParams

__all__ = ["chat"]

_DIM, _BOLD, _PLAIN = "\033[2m", "\033[1m", "\033[0m"


def chat(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, run directory, or bundled name.")],
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens of this total share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Fixes what is drawn at a temperature above 0.")] = None,
) -> None:
    """Ask a model questions in the terminal; each stands alone.

    Questions come from the terminal, or one a line from a pipe.
    """
    from tafkir.cli.completer import build_completer, checkpoint_of
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.errors import RequestError
    from tafkir.records import SamplingParams

    folder = checkpoint_of(checkpoint)
    engine, tokenizer = build_completer(folder), Tokenizer.load(folder)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    if sys.stdin.isatty():
        print(f"{folder}: {engine.decoder.config.num_parameters():,} parameters. An empty line ends the chat.")
    for question in _questions():
        try:
            for piece in _answer(engine, tokenizer, question, params):
                print(piece, end="", flush=True)
            print("\n" if sys.stdin.isatty() else "")
        except RequestError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}")


def _questions() -> Iterator[str]:
    """Questions until an empty line or the end of the input."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        yield question


def _answer(engine: Engine, tokenizer: Tokenizer, question: str, params: SamplingParams) -> Iterator[str]:
    """The text of one answer as it comes; on a terminal the chain of thought is dim and the answer bold."""
    from tafkir.data.chat import encode_prompt
    from tafkir.data.tokenizer import THINK_END, THINK_START
    from tafkir.engine.text import TextStream
    from tafkir.records import Request

    marks = {tokenizer.special_id(THINK_START): _DIM, tokenizer.special_id(THINK_END): _PLAIN + _BOLD}
    colours = sys.stdout.isatty()
    stream = TextStream(lambda ids: tokenizer.decode(ids, skip_special=False))
    engine.add_request(Request("chat", tuple(encode_prompt(tokenizer, question)), params))
    try:
        while engine.has_work:
            for event in engine.step():
                if event.token_id in engine.eos_ids:
                    continue
                text = stream.push(event.token_id)
                mark = marks.get(event.token_id) if colours else None
                yield text if mark is None else (mark + text if mark == _DIM else text + mark)
        yield _PLAIN if colours else ""
    except KeyboardInterrupt:
        yield (_PLAIN if colours else "") + " (interrupted)"
    finally:
        engine.cancel("chat")
