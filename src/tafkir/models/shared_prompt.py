"""Attention for groups of completions that share a prompt: the prompt is computed once per group.

Shape legend: N tokens, H query heads, G key/value heads, K head dim, B groups, S completions of all groups,
P longest prompt, C longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SharedPromptCausal"]


def _padded_index(starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of a flat tensor laid out as (rows, longest): the index of each cell, and which cells are real."""
    offsets = torch.arange(max(1, *lengths))
    length = torch.tensor(lengths, dtype=torch.int64)
    real = offsets[None, :] < length[:, None]
    index = torch.tensor(starts, dtype=torch.int64)[:, None] + offsets[None, :]
    return torch.where(real, index, 0), real


class SharedPromptCausal:
    """Attention state for the flat layout `prompt 0, completions of prompt 0, prompt 1, ...`.

    A prompt token sees the prompt up to itself; a completion token sees its group's whole prompt and its own
    completion up to itself. Positions of a completion go on from the prompt's length. The result is that of
    running every prompt + completion as a document of its own, for the cost of one prompt per group.
    """

    def __init__(self, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> None:
        """Args:
        prompt_lengths: tokens of each group's prompt.
        completion_lengths: tokens of each completion of each group, in the order of the flat layout.
        """
        prompt_starts, starts, lengths, group_of = [], [], [], []
        cursor = 0
        for group, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
            prompt_starts.append(cursor)
            cursor += prompt
            for length in completions:
                starts.append(cursor)
                lengths.append(length)
                group_of.append(group)
                cursor += length
        self.num_tokens = cursor
        self._prompt_index, self._prompt_real = _padded_index(prompt_starts, prompt_lengths)
        self._own_index, self._own_real = _padded_index(starts, lengths)
        self._group_of = torch.tensor(group_of, dtype=torch.int64)
        num, longest = self._own_index.shape
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        sees_prompt = self._prompt_real[self._group_of][:, None, :].expand(num, longest, -1)
        self._mask = torch.cat([sees_prompt, causal.expand(num, -1, -1)], dim=2)[:, None]
        prompt_cells = self._prompt_real.flatten().nonzero().squeeze(1)
        own_cells = self._own_real.flatten().nonzero().squeeze(1)
        flat = torch.cat([self._prompt_index.flatten()[prompt_cells], self._own_index.flatten()[own_cells]])
        self._order = torch.argsort(flat)
        self._prompt_cells, self._own_cells = prompt_cells, own_cells

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Attend over the prompt and the own completion; returns (N, H, K)."""
        repeats = q_NHK.shape[1] // k_NGK.shape[1]
        q_BHPK, k_BHPK, v_BHPK = (
            _gather(x, self._prompt_index, heads) for x, heads in ((q_NHK, 1), (k_NGK, repeats), (v_NGK, repeats))
        )
        prompt_out = F.scaled_dot_product_attention(q_BHPK, k_BHPK, v_BHPK, is_causal=True)
        q_SHCK, k_SHCK, v_SHCK = (
            _gather(x, self._own_index, heads) for x, heads in ((q_NHK, 1), (k_NGK, repeats), (v_NGK, repeats))
        )
        k_SHLK = torch.cat([k_BHPK[self._group_of], k_SHCK], dim=2)
        v_SHLK = torch.cat([v_BHPK[self._group_of], v_SHCK], dim=2)
        own_out = F.scaled_dot_product_attention(q_SHCK, k_SHLK, v_SHLK, attn_mask=self._mask)
        flat = torch.cat([_cells(prompt_out, self._prompt_cells), _cells(own_out, self._own_cells)])
        return flat[self._order]


def _gather(x_NGK: Tensor, index: Tensor, repeats: int) -> Tensor:
    """Flat tokens to (rows, heads, longest, K), each head repeated `repeats` times."""
    rows, longest = index.shape
    padded = x_NGK[index.flatten()].view(rows, longest, *x_NGK.shape[1:]).transpose(1, 2)
    return padded.repeat_interleave(repeats, dim=1) if repeats > 1 else padded


def _cells(out_BHTK: Tensor, cells: Tensor) -> Tensor:
    """The real cells of a padded result, as (cells, H, K)."""
    rows, heads, longest, dim = out_BHTK.shape
    return out_BHTK.transpose(1, 2).reshape(rows * longest, heads, dim)[cells]
