"""Log-probabilities of a prompt's own tokens, with the most probable ones beside each.

Shapes: N tokens, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput

__all__ = ["PromptScores", "score_prompts"]

# Rows of logits at once: a vocabulary of 150,000 takes 150 MB.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class PromptScores:
    """For every token but the first: its log-probability at temperature 1, its rank (1 is the most probable), and
    (token, log-probability) of the most probable ones, best first."""

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]


@torch.inference_mode()
def score_prompts(decoder: Decoder, sequences: Sequence[Sequence[int]], count: int) -> list[PromptScores]:
    """Teacher-forced scores of whole sequences in one pass; nothing is cached.

    Args:
        decoder: the policy.
        sequences: token ids, one or more each.
        count: how many of the most probable tokens to report.
    """
    device = decoder.embed_tokens.weight.device
    bounds = [0]
    for ids in sequences:
        bounds.append(bounds[-1] + len(ids))
    ids_N = torch.tensor([token for ids in sequences for token in ids], device=device)
    positions_N = torch.cat([torch.arange(len(ids), device=device) for ids in sequences])
    output: DecoderOutput = decoder(ids_N, positions_N, VarlenCausal(bounds, device=device))
    target_N = ids_N.roll(-1)
    logprobs: list[float] = []
    ranks: list[int] = []
    tops: list[tuple[tuple[int, float], ...]] = []
    for hidden_RD, target_R in zip(output.hidden_ND.split(_ROWS), target_N.split(_ROWS), strict=True):
        all_RV = torch.log_softmax(decoder.logits(hidden_RD).float(), dim=-1)
        own_R1 = all_RV.gather(-1, target_R.unsqueeze(-1))
        logprobs += own_R1.squeeze(-1).tolist()
        ranks += ((all_RV > own_R1).sum(dim=-1) + 1).tolist()
        values, tokens = torch.topk(all_RV, min(count, all_RV.shape[-1]), dim=-1)
        tops += [tuple(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
    return [
        PromptScores(tuple(logprobs[a : b - 1]), tuple(ranks[a : b - 1]), tuple(tops[a : b - 1]))
        for a, b in pairwise(bounds)
    ]
