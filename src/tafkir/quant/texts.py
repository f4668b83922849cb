"""Text to measure predictions on: which tokens of it count, and made-up word problems as a model is used to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.chat import encode_conversation, encode_document
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder

__all__ = ["Passage", "familiar_problems"]

_TRIED = 8


class Passage(NamedTuple):
    """Token ids, and for each whether the prediction of it counts.

    A model that was trained on solutions alone says nothing of use about questions: the bundled base has a perplexity
    of 10,000 on problems with their questions, and of 1.1 on solutions.
    """

    ids: Sequence[int]
    counted: Sequence[bool]

    @classmethod
    def whole(cls, ids: Sequence[int]) -> Passage:
        """Text of which every token counts."""
        return cls(ids, [True] * len(ids))

    @property
    def places(self) -> list[int]:
        """Where a counted token is predicted: the place before it."""
        return [place - 1 for place, counts in enumerate(self.counted) if counts and place]


@torch.no_grad()
def familiar_problems(source: Path, max_tokens: int, first_story: int) -> list[Passage]:
    """Made-up problems of which the solutions count, `max_tokens` in all and the rest of the last one.

    What a model does off the text that it was trained for says little of what it is used for: a base model gets the
    plain form, one that was fine-tuned in the chat format conversations.

    Args:
        source: checkpoint folder, with a tokenizer.
        max_tokens: in all.
        first_story: seed of the first problem; those that follow count up.
    """
    tokenizer, decoder = Tokenizer.load(source), load_checkpoint(source).decoder
    stories = [make_story(first_story + i) for i in range(_TRIED)]
    tried = [[render(tokenizer, story) for story in stories] for render in (encode_document, encode_conversation)]
    costs = [sum(_surprise(decoder, *document) for document in documents) for documents in tried]
    render = encode_document if costs[0] <= costs[1] else encode_conversation
    passages: list[Passage] = []
    while sum(len(passage.ids) for passage in passages) < max_tokens:
        passages.append(Passage(*render(tokenizer, make_story(first_story + len(passages)))))
    return passages


def _surprise(decoder: Decoder, ids: Sequence[int], solution: Sequence[bool]) -> float:
    """Mean nats a token of the solution."""
    hidden_ND = decoder(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), VarlenCausal([0, len(ids) - 1])).hidden_ND
    logs = torch.log_softmax(decoder.logits(hidden_ND), dim=-1)
    nats = -logs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float(nats[torch.tensor(solution[1:])].mean())
