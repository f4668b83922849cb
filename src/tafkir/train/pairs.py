"""From preference pairs to tensors: each prompt once, then its two answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.data.preference import EncodedPair
from tafkir.models.shared_prompt import SharedPromptCausal
from tafkir.train.language import split_evenly
from tafkir.train.ranks import Ranks

__all__ = ["SCORE_BATCH", "AnswerBatch", "build_answer_batch", "build_pair_batch", "score_pairs_in_shares"]

SCORE_BATCH = 32
"""Pairs or groups that are scored at once, without a gradient."""


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Answers behind their prompts, in the shared-prompt layout. N input tokens; T answer tokens of S answers.

    `source_T[t]` is the input position whose hidden state predicts answer token t; `last_S` is where each answer's
    last token stands.
    """

    input_ids_N: Tensor
    positions_N: Tensor
    attention: SharedPromptCausal
    source_T: Tensor
    targets_T: Tensor
    sequence_T: Tensor
    lengths_S: Tensor
    last_S: Tensor


def build_pair_batch(pairs: Sequence[EncodedPair]) -> AnswerBatch:
    """Answers 2 i and 2 i + 1 are the chosen and the rejected one of pair i."""
    return build_answer_batch([(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs])


def build_answer_batch(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> AnswerBatch:
    """Lay out groups of answers, each group's prompt once before them.

    Args:
        groups: tokens of a prompt, and of each of its answers; none is empty.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    lengths: list[int] = []
    last: list[int] = []
    for prompt, answers in groups:
        input_ids.extend(prompt)
        positions.extend(range(len(prompt)))
        last_prompt = len(input_ids) - 1
        for tokens in answers:
            start = len(input_ids)
            input_ids.extend(tokens)
            positions.extend(range(len(prompt), len(prompt) + len(tokens)))
            source.append(last_prompt)
            source.extend(range(start, start + len(tokens) - 1))
            targets.extend(tokens)
            sequence.extend([len(lengths)] * len(tokens))
            lengths.append(len(tokens))
            last.append(len(input_ids) - 1)
    return AnswerBatch(
        input_ids_N=torch.tensor(input_ids),
        positions_N=torch.tensor(positions),
        attention=SharedPromptCausal(
            [len(prompt) for prompt, _ in groups], [[len(tokens) for tokens in answers] for _, answers in groups]
        ),
        source_T=torch.tensor(source),
        targets_T=torch.tensor(targets),
        sequence_T=torch.tensor(sequence),
        lengths_S=torch.tensor(lengths),
        last_S=torch.tensor(last),
    )


@torch.no_grad()
def score_pairs_in_shares(pairs: Sequence[EncodedPair], score: Callable[[AnswerBatch], Tensor], ranks: Ranks) -> Tensor:
    """What `score` says of both answers of every pair, (P, 2): data shards share the pairs out, and all get all.

    Args:
        score: one number an answer, (S,); every rank calls it equally often.
    """
    scored = [torch.zeros(0, 2)]
    stride = SCORE_BATCH * ranks.sizes.data_shards
    for start in range(0, len(pairs), stride):
        window = pairs[start : start + stride]
        parts = split_evenly(range(len(window)), ranks.sizes.data_shards)
        mine = ranks.own(parts)
        # Sharded weights are gathered by all ranks at once, so one without pairs computes and does not count.
        part = (mine or parts)[0]
        values_P2 = score(build_pair_batch([window[i] for i in part])).view(-1, 2)
        rows_P2 = values_P2.new_zeros(len(window), 2)
        if mine:
            rows_P2[list(part)] = values_P2
        scored.append(ranks.sum_tensor(rows_P2))
    return torch.cat(scored)
