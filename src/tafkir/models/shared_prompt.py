"""Attention for groups of completions that share a prompt: the prompt is computed once per group.

Shape legend: N tokens, H query heads, G key/value heads, R query heads per key/value head, K head dim, B groups,
S completions of one group, P longest prompt, C longest completion, L cells of a padded block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tafkir.ops.attention import MAX_SHORT_LENGTH

__all__ = ["SharedPromptCausal"]

MAX_BLOCK_SCORES = 1 << 17
"""Scores of one head that a block of groups may have: with a few heads they stay in the cache."""
MAX_BLOCK_WASTE = 1.25
"""A block's scores may exceed those of its groups, each laid out alone, by this factor."""

Span = tuple[int, int]
"""First token and length."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A prompt and its non-empty completions in the flat layout."""

    prompt: Span
    completions: tuple[Span, ...]


def _lay_out(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> list[_Group]:
    groups = []
    cursor = 0
    for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        start, cursor = cursor, cursor + prompt
        spans = []
        for length in lengths:
            spans.append((cursor, length))
            cursor += length
        groups.append(_Group((start, prompt), tuple(span for span in spans if span[1])))
    return groups


def _cells(spans: Sequence[Span], longest: int, padding: int) -> Tensor:
    """Tokens of each span as a padded row: (spans, longest)."""
    start, length = torch.tensor(spans, dtype=torch.int64).view(-1, 2, 1).unbind(1)
    steps = torch.arange(longest)
    return torch.where(steps < length, start + steps, padding)


@dataclass(frozen=True, slots=True)
class _Block:
    """Groups of alike sizes as padded blocks; padding is the token N, one past the last.

    Attributes:
        prompt_BP: the token of each cell.
        own_BSC: the same for the completions.
        mask_B1P: 0 on a prompt's tokens, -inf on its padding.
    """

    prompt_BP: Tensor
    own_BSC: Tensor
    mask_B1P: Tensor

    @staticmethod
    def build(groups: Sequence[_Group], num_tokens: int, device: torch.device) -> _Block:
        longest_prompt, most, longest = _block_sizes(groups)
        prompt_BP = _cells([group.prompt for group in groups], longest_prompt, num_tokens)
        rows = [span for g in groups for span in (*g.completions, *[(0, 0)] * (most - len(g.completions)))]
        own_BSC = _cells(rows, longest, num_tokens).view(len(groups), most, longest)
        mask_BP = torch.zeros(prompt_BP.shape).masked_fill_(prompt_BP == num_tokens, -torch.inf)
        return _Block(prompt_BP.to(device), own_BSC.to(device), mask_BP.unsqueeze(1).to(device))


def _block_sizes(groups: Sequence[_Group]) -> tuple[int, int, int]:
    """Longest prompt, most completions of one group, longest completion."""
    prompt = max(group.prompt[1] for group in groups)
    most = max(len(group.completions) for group in groups)
    return prompt, most, max((length for group in groups for _, length in group.completions), default=0)


def _num_scores(groups: Sequence[_Group]) -> int:
    """Scores of one head when the groups make one block."""
    prompt, most, longest = _block_sizes(groups)
    return len(groups) * (prompt * prompt + most * longest * (prompt + longest))


def _cut(groups: Sequence[_Group]) -> list[list[_Group]]:
    """Runs of alike groups, each small enough for a block (the same groups give the same runs)."""
    runs: list[list[_Group]] = []
    alone = 0
    for group in sorted(groups, key=lambda group: (_block_sizes([group])[2], group.prompt[1])):
        needed = _num_scores([group])
        if runs:
            together = _num_scores([*runs[-1], group])
            if together <= min(MAX_BLOCK_SCORES, MAX_BLOCK_WASTE * (alone + needed)):
                runs[-1].append(group)
                alone += needed
                continue
        runs.append([group])
        alone = needed
    return runs


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """Where a block's cells stand in tables of (token, head) rows; flat, in the order of the matmuls' operands."""

    query_prompt: Tensor
    """[B, G, R, P]"""
    query_own: Tensor
    """[B, G, S, R, C]"""
    key_prompt: Tensor
    """[B, G, P]"""
    key_own: Tensor
    """[B, G, S, C]"""
    mask: Tensor
    """[B G, 1, P]"""
    sizes: tuple[int, int, int, int]
    """B G, S, P, C"""

    @staticmethod
    def build(block: _Block, num_tokens: int, num_kv_heads: int, repeats: int) -> _HeadRows:
        def rows(cells_BSC: Tensor, repeats: int) -> Tensor:
            heads = num_kv_heads * repeats
            head = torch.arange(heads).view(num_kv_heads, 1, repeats, 1)
            # All heads of the padding token share the row past the last.
            return (cells_BSC[:, None, :, None] * heads + head).clamp_(max=num_tokens * heads).flatten()

        prompt_B1P, own_BSC = block.prompt_BP.unsqueeze(1), block.own_BSC
        return _HeadRows(
            rows(prompt_B1P, repeats),
            rows(own_BSC, repeats),
            rows(prompt_B1P, 1),
            rows(own_BSC, 1),
            block.mask_B1P.repeat_interleave(num_kv_heads, dim=0),
            (len(own_BSC) * num_kv_heads, own_BSC.shape[1], prompt_B1P.shape[2], own_BSC.shape[2]),
        )


class _ShortGroups(torch.autograd.Function):
    """A block at a time with its score matrices, which are kept for the backward: nothing is computed twice.

    The queries of all completions of a group meet the prompt's keys in one matmul, so these are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, blocks: Sequence[_HeadRows], future: Tensor
    ) -> Tensor:
        dim = q_NHK.shape[-1]
        q, k, v = _table(q_NHK, dim**-0.5), _table(k_NGK), _table(v_NGK)
        out = torch.empty_like(q)
        saved: list[Tensor] = []
        for rows in blocks:
            size, most, prompt, longest = rows.sizes
            k_P, v_P = (x.index_select(0, rows.key_prompt).view(size, prompt, dim) for x in (k, v))
            q_P = q.index_select(0, rows.query_prompt).view(size, -1, dim)
            scores = torch.bmm(q_P, k_P.mT)
            scores.view(-1, prompt, prompt).add_(future[:prompt, :prompt])
            weights_P = torch.softmax(scores, -1)
            out.index_copy_(0, rows.query_prompt, torch.bmm(weights_P, v_P).view(-1, dim))
            saved += [q_P, k_P, v_P, weights_P]
            if not longest:
                continue
            k_C, v_C = (x.index_select(0, rows.key_own).view(-1, longest, dim) for x in (k, v))
            q_C = q.index_select(0, rows.query_own).view(size, -1, dim)
            own = torch.bmm(q_C.view(size * most, -1, dim), k_C.mT)
            own.view(-1, longest, longest).add_(future[:longest, :longest])
            scores = torch.cat([torch.baddbmm(rows.mask, q_C, k_P.mT), own.view(size, -1, longest)], dim=-1)
            weights = torch.softmax(scores, -1)
            own_out = torch.bmm(weights[..., :prompt], v_P)
            own_out.view(size * most, -1, dim).baddbmm_(_by_completion(weights, prompt, most), v_C)
            out.index_copy_(0, rows.query_own, own_out.view(-1, dim))
            saved += [q_C, k_C, v_C, weights]
        ctx.blocks, ctx.num_kv_heads = blocks, k_NGK.shape[1]
        ctx.save_for_backward(*saved)
        return out[:-1].view_as(q_NHK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor | None, ...]:
        num_tokens, _, dim = grad_NHK.shape
        grad = _table(grad_NHK)
        grad_q = torch.empty_like(grad)
        grad_k, grad_v = (grad.new_empty(num_tokens * ctx.num_kv_heads + 1, dim) for _ in range(2))
        saved = iter(ctx.saved_tensors)
        for rows in ctx.blocks:
            size, most, prompt, longest = rows.sizes
            q_P, k_P, v_P, weights_P = (next(saved) for _ in range(4))
            grad_P = grad.index_select(0, rows.query_prompt).view(size, -1, dim)
            grad_scores = _softmax_backward(torch.bmm(grad_P, v_P.mT), weights_P)
            grad_q.index_copy_(0, rows.query_prompt, torch.bmm(grad_scores, k_P).view(-1, dim))
            grad_k_P, grad_v_P = torch.bmm(grad_scores.mT, q_P), torch.bmm(weights_P.mT, grad_P)
            if longest:
                q_C, k_C, v_C, weights = (next(saved) for _ in range(4))
                grad_C = grad.index_select(0, rows.query_own).view(size, -1, dim)
                apart = grad_C.view(size * most, -1, dim)
                parts = [torch.bmm(grad_C, v_P.mT), torch.bmm(apart, v_C.mT).view(size, -1, longest)]
                grad_scores = _softmax_backward(torch.cat(parts, dim=-1), weights)
                own_scores = _by_completion(grad_scores, prompt, most)
                grad_q_C = torch.bmm(grad_scores[..., :prompt], k_P)
                grad_q_C.view(size * most, -1, dim).baddbmm_(own_scores, k_C)
                grad_q.index_copy_(0, rows.query_own, grad_q_C.view(-1, dim))
                grad_k_P.baddbmm_(grad_scores[..., :prompt].mT, q_C)
                grad_v_P.baddbmm_(weights[..., :prompt].mT, grad_C)
                grad_k_C = torch.bmm(own_scores.mT, q_C.view(size * most, -1, dim))
                grad_v_C = torch.bmm(_by_completion(weights, prompt, most).mT, apart)
                grad_k.index_copy_(0, rows.key_own, grad_k_C.view(-1, dim))
                grad_v.index_copy_(0, rows.key_own, grad_v_C.view(-1, dim))
            grad_k.index_copy_(0, rows.key_prompt, grad_k_P.view(-1, dim))
            grad_v.index_copy_(0, rows.key_prompt, grad_v_P.view(-1, dim))
        grads = (x[:-1].view(num_tokens, -1, dim) for x in (grad_q.mul_(dim**-0.5), grad_k, grad_v))
        return *grads, None, None


def _table(x_NHK: Tensor, scale: float = 1.0) -> Tensor:
    """(token, head) rows, scaled, and a last row of zeros for padding."""
    dim = x_NHK.shape[-1]
    table = x_NHK.new_empty(x_NHK.shape[0] * x_NHK.shape[1] + 1, dim)
    torch.mul(x_NHK, scale, out=table[:-1].view_as(x_NHK))
    table[-1] = 0
    return table


def _by_completion(scores: Tensor, prompt: int, most: int) -> Tensor:
    """The columns after the prompt's, [B G, S R C, P + C] to [B G S, R C, C], as a view."""
    apart: Tensor = scores[..., prompt:].unflatten(1, (most, -1))
    return apart.flatten(0, 1)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


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
        self.num_tokens = sum(prompt_lengths) + sum(map(sum, completion_lengths))
        self._groups = _lay_out(prompt_lengths, completion_lengths)
        self._sizes = _block_sizes(self._groups)
        self._short: dict[tuple[int, int], list[_HeadRows]] = {}
        self._long: _Block | None = None

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Attend over the prompt and the own completion; returns (N, H, K)."""
        prompt, _, longest = self._sizes
        if q_NHK.device.type == "cpu" and q_NHK.dtype == torch.float32 and prompt + longest <= MAX_SHORT_LENGTH:
            heads = (k_NGK.shape[1], q_NHK.shape[1] // k_NGK.shape[1])
            if heads not in self._short:
                blocks = [_Block.build(run, self.num_tokens, q_NHK.device) for run in _cut(self._groups)]
                self._short[heads] = [_HeadRows.build(block, self.num_tokens, *heads) for block in blocks]
            future = q_NHK.new_full((max(prompt, longest),) * 2, -torch.inf).triu_(1)
            out = _ShortGroups.apply(q_NHK, k_NGK, v_NGK, self._short[heads], future)  # type: ignore[no-untyped-call]
            return cast(Tensor, out)
        if self._long is None:
            self._long = _Block.build(self._groups, self.num_tokens, q_NHK.device)
        return _fused_attention(q_NHK, k_NGK, v_NGK, self._long)


def _fused_attention(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, block: _Block) -> Tensor:
    """All groups as one padded block with the fused kernel, which keeps no scores; keys are repeated for it."""
    repeats = q_NHK.shape[1] // k_NGK.shape[1]
    own_SC = block.own_BSC.flatten(0, 1)
    num_groups, num_rows, longest = len(block.prompt_BP), *own_SC.shape
    q_P, k_P, v_P = (_padded(x, block.prompt_BP, n) for x, n in ((q_NHK, 1), (k_NGK, repeats), (v_NGK, repeats)))
    cells = [block.prompt_BP.flatten()]
    outs = [F.scaled_dot_product_attention(q_P, k_P, v_P, is_causal=True)]
    if longest:
        q_C, k_C, v_C = (_padded(x, own_SC, n) for x, n in ((q_NHK, 1), (k_NGK, repeats), (v_NGK, repeats)))
        most = num_rows // num_groups
        k_L, v_L = (
            torch.cat([x_P.repeat_interleave(most, dim=0), x_C], dim=2) for x_P, x_C in ((k_P, k_C), (v_P, v_C))
        )
        future = block.mask_B1P.new_full((longest, longest), -torch.inf).triu_(1).expand(num_rows, -1, -1)
        prompt_mask = block.mask_B1P.repeat_interleave(most, dim=0).expand(-1, longest, -1)
        mask = torch.cat([prompt_mask, future], dim=2).to(q_NHK.dtype).unsqueeze(1)
        cells.append(own_SC.flatten())
        outs.append(F.scaled_dot_product_attention(q_C, k_L, v_L, attn_mask=mask))
    # Padding is the token N, so it sorts last.
    order_N = torch.argsort(torch.cat(cells))[: len(q_NHK)]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])[order_N]


def _padded(x_NHK: Tensor, cells: Tensor, repeats: int) -> Tensor:
    """Tokens to (rows, heads, longest, K), each head repeated `repeats` times; padding takes the last token."""
    rows = x_NHK[cells.clamp(max=len(x_NHK) - 1)].transpose(1, 2)
    return rows.repeat_interleave(repeats, dim=1) if repeats > 1 else rows
