"""Log-probabilities of prompts: what `echo` with `logprobs` and vLLM's `prompt_logprobs` show."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from tafkir.engine.sequence import TokenEvent
from tafkir.engine.text import TextStream
from tafkir.serve.errors import ApiError
from tafkir.serve.generate import Prompt
from tafkir.serve.responses import CompletionFormat
from tafkir.serve.served import Served
from tafkir.serve.stream import TokenText, token_name

if TYPE_CHECKING:
    from tafkir.engine.prompt_scores import PromptScores

__all__ = ["EchoFormat", "Echoed", "completion_entries", "score"]


async def score(served: Served, http: Request, prompts: Sequence[tuple[int, ...]], count: int) -> list[PromptScores]:
    """Scores of prompts, with the `count` most probable tokens of each place (one at least: the greedy choice).

    Raises:
        ApiError: 400 for a token that does not exist, or an empty prompt.
        Overloaded, Stopped: the server cannot take them.
    """
    vocab = served.engine.decoder.config.vocab_size
    for ids in prompts:
        if not ids or min(ids) < 0 or max(ids) >= vocab:
            message = f"prompt: empty, or a token outside of 0 to {vocab - 1}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
    futures = [asyncio.wrap_future(future) for future in served.worker.score(prompts, max(1, count), served.engine)]
    try:
        return list(await asyncio.gather(*futures))
    finally:
        for future in futures:
            future.cancel()


@dataclass(frozen=True, slots=True)
class Echoed:
    """A prompt as it is shown: its text, and OpenAI's `logprobs` columns of its tokens."""

    text: str
    num_tokens: int
    columns: dict[str, list[Any]] | None


def completion_entries(tokenizer: TokenText, ids: Sequence[int], scores: PromptScores | None) -> Echoed:
    """The prompt's part of an echoed completion; the first token, which nothing precedes, has no log-probability."""
    text = tokenizer.decode(ids)
    if scores is None:
        return Echoed(text, len(ids), None)
    stream, offsets, at = TextStream(tokenizer.decode), [], 0
    for id in ids:
        offsets.append(at)
        at += len(stream.push(id))
    tops: list[Any] = [None]
    for token, logprob, top in zip(ids[1:], scores.logprobs, scores.tops, strict=True):
        best = {token_name(tokenizer, id): value for id, value in top}
        tops.append({**best, token_name(tokenizer, token): logprob})
    columns: dict[str, list[Any]] = {
        "tokens": [token_name(tokenizer, id) for id in ids],
        "token_logprobs": [None, *scores.logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return Echoed(text, len(ids), columns)


class EchoFormat(CompletionFormat):
    """`text_completion` with the prompt before the answer.

    Args:
        entries: the prompts, one each.
        n: choices of each.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: TokenText,
        *,
        logprobs: bool,
        entries: Sequence[Echoed],
        n: int,
    ) -> None:
        super().__init__(request_id, model, tokenizer, logprobs=logprobs)
        self._entries = [entry for entry in entries for _ in range(n)]

    def _choice(self, index: int, text: str, shown: Sequence[tuple[TokenEvent, int]], reason: Any) -> dict[str, Any]:
        choice = super()._choice(index, text, shown, reason)
        echoed = self._entries[index]
        choice["text"] = echoed.text + choice["text"]
        if echoed.columns is not None:
            own = choice["logprobs"] or {}
            moved = [offset + len(echoed.text) for offset in own.get("text_offset", [])]
            own = {**own, "text_offset": moved}
            choice["logprobs"] = {name: column + own.get(name, []) for name, column in echoed.columns.items()}
        return choice

    def prompts_alone(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The answer to a request for no tokens."""
        choices = [self._finish(i, self._choice(i, "", (), "length")) for i in range(len(self._entries))]
        count = sum(len(ids) for ids, _ in prompts)
        usage = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
        return self.whole(choices, usage)
