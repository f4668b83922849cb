"""How prompts and new tokens attend, whatever the cache keeps of them; the views implement `AttentionState`.

Shapes: N tokens, H query heads, G key-value heads, K width of queries and keys, V of values, R query heads per kv head
(H = G R), P prompts, M most sequences of one prompt, B sequences, W new tokens of each, S cached length, T cached
prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafkir.models.attention import VarlenCausal

__all__ = ["DecodeView", "Grouping", "PrefillView"]


class PrefillView:
    """Attention for whole prompts, packed without padding; a cache's own view also keeps what decoding will read.

    The scores are those of the training forward (`VarlenCausal`), bit for bit.

    Args:
        rows: the prompt row of each prompt.
        lengths: its tokens.
        device: of the batch.

    Attributes:
        rows_N: int64 prompt row of each token.
        positions_N: int64 position of each token within its prompt.
        last_N: int64, where each prompt's last token stands.
    """

    def __init__(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        self._causal = VarlenCausal(bounds, device=device)
        repeats = torch.tensor(lengths, device=device)
        self.rows_N = torch.tensor(rows, device=device).repeat_interleave(repeats)
        starts = torch.tensor(bounds[:-1], device=device).repeat_interleave(repeats)
        self.positions_N = torch.arange(bounds[-1], device=device) - starts
        self.last_N = torch.tensor(bounds[1:], device=device) - 1

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        return self._causal.attend(layer_idx, q_NHK, k_NGK, v_NGK)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which sequences read which prompt row. It changes only when sequences come or go.

    Attributes:
        members_F: for each of P x M places (flat), the sequence that stands there; 0 where none does.
        prompt_B: the prompt row of each sequence.
        place_B: its place among the prompt's sequences.
        regular: every place is taken, in the order of the sequences, so that grouping is a mere reshape.
        mask_P1S: 0 where a position is below the prompt's length, -inf elsewhere; prompt rows repeated per kv head.
    """

    members_F: Tensor
    prompt_B: Tensor
    place_B: Tensor
    num_prompts: int
    num_places: int
    regular: bool
    mask_P1S: Tensor

    @staticmethod
    def build(prompt_B: Tensor, prompt_lengths_P: Tensor, num_heads: int, dtype: torch.dtype) -> Grouping:
        """Args:
        prompt_B: int64, the prompt row of each sequence.
        prompt_lengths_P: int64, tokens of each prompt row.
        num_heads: kv heads.
        dtype: of the cache.
        """
        num_prompts, batch = len(prompt_lengths_P), len(prompt_B)
        sorted_B, order_B = torch.sort(prompt_B, stable=True)
        counts_P = torch.bincount(prompt_B, minlength=num_prompts)
        first_P = counts_P.cumsum(0) - counts_P
        rows_B = torch.arange(batch, device=prompt_B.device)
        place_B = torch.empty_like(prompt_B)
        place_B[order_B] = rows_B - first_P[sorted_B]
        num_places = int(counts_P.max())
        members_F = torch.zeros(num_prompts * num_places, dtype=torch.int64, device=prompt_B.device)
        members_F[prompt_B * num_places + place_B] = rows_B
        regular = len(members_F) == batch and bool((members_F == rows_B).all())
        mask_P1S = _length_mask(prompt_lengths_P.repeat_interleave(num_heads), int(prompt_lengths_P.max()), dtype)
        return Grouping(members_F, prompt_B, place_B, num_prompts, num_places, regular, mask_P1S)

    def gather(self, x_BGRx: Tensor) -> Tensor:
        """Sequences to groups: [B, G, R, x] to [P G, M R, x]."""
        _, heads, repeats, width = x_BGRx.shape
        if not self.regular:
            x_BGRx = x_BGRx.index_select(0, self.members_F)
        x_PMGRx = x_BGRx.reshape(self.num_prompts, self.num_places, heads, repeats, width)
        return x_PMGRx.transpose(1, 2).reshape(self.num_prompts * heads, self.num_places * repeats, width)

    def scatter(self, x_PQx: Tensor, heads: int) -> Tensor:
        """Groups back to sequences: [P G, M R, x] to [B, G, R, x]."""
        width = x_PQx.shape[-1]
        x_PMGRx = x_PQx.view(self.num_prompts, heads, self.num_places, -1, width).transpose(1, 2)
        return x_PMGRx.flatten(0, 1) if self.regular else x_PMGRx[self.prompt_B, self.place_B]


def _length_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, longest]: 0 where a position is below the row's length, -inf elsewhere."""
    outside = torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(outside.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(outside, -torch.inf).unsqueeze(1)


class DecodeView:
    """Attention for the newest tokens of each sequence: over its prompt's row and its own row, under one softmax.

    The queries of all sequences that share a prompt meet its keys in one matmul. A cache's own view brings the keys and
    values. Entries beyond a sequence's length are never read, so a sequence is cut short by counting fewer of them.

    Args:
        store_BGSK: the sequence rows of one layer; all layers' have its shape.
        grouping: who shares which prompt.
        cached_B: int64, tokens in each sequence's own row before this step; the new ones are written from there on.
        longest: upper bound of `cached_B`, plus `width`.
        width: new tokens of each sequence, one sequence after the other in the batch; each sees those before it.
    """

    def __init__(self, store_BGSK: Tensor, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> None:
        self._grouping, self._longest, self._width = grouping, longest, width
        self._batch, self._heads, self._capacity = len(cached_B), store_BGSK.shape[1], store_BGSK.shape[2]
        self._rows = self._batch * self._heads
        cached_BW = cached_B.unsqueeze(1) + torch.arange(width, device=cached_B.device)
        first_BG = torch.arange(0, self._rows * self._capacity, self._capacity, device=cached_B.device)
        self._write_BG = (first_BG.view(-1, 1, self._heads) + cached_BW.unsqueeze(2)).flatten()
        lengths_BG = cached_BW.repeat_interleave(self._heads, dim=0).flatten() + 1
        self._mask_BWS = _length_mask(lengths_BG, longest, store_BGSK.dtype).view(self._rows, width, longest)

    @property
    def _prompt_rows(self) -> int:
        return self._grouping.num_prompts * self._heads

    @property
    def _longest_prompt(self) -> int:
        return self._grouping.mask_P1S.shape[-1]

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """As `AttentionState` says; refused by a view that keeps something else than keys and values."""
        raise TypeError("this cache keeps no keys and values")

    def _attend(self, q_NHK: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """One softmax over both parts, [N, H, V].

        Args:
            prompt: keys [P G, K, T] and values [P G, T, V] of the prompts.
            own: keys [B G, S, K] and values [B G, S, V] of the sequences.
            scale: on the scores.
        """
        group, longest_prompt = self._grouping, self._longest_prompt
        (prompt_keys, prompt_values), (keys, values) = prompt, own
        q_BWGRK = q_NHK.reshape(self._batch, self._width, self._heads, -1, q_NHK.shape[-1])
        repeats = q_BWGRK.shape[3]
        # The tokens of a sequence stand in line with the query heads of a kv head: R is W R from here on.
        q_BGRK = q_BWGRK.transpose(1, 2).flatten(2, 3)
        mask_BRS = self._mask_BWS if self._width == 1 else self._mask_BWS.repeat_interleave(repeats, dim=1)

        prompt_scores = torch.baddbmm(group.mask_P1S, group.gather(q_BGRK), prompt_keys, alpha=scale)
        own_scores = torch.baddbmm(mask_BRS, q_BGRK.flatten(0, 1), keys.transpose(1, 2), alpha=scale)
        scores = (group.scatter(prompt_scores, self._heads), own_scores.view(*q_BGRK.shape[:3], -1))
        weights_BGRS = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        own_out = torch.bmm(weights_BGRS[..., longest_prompt:].flatten(0, 1), values)
        prompt_out = torch.bmm(group.gather(weights_BGRS[..., :longest_prompt]), prompt_values)
        out_BGRV = own_out.view(*q_BGRK.shape[:3], -1) + group.scatter(prompt_out, self._heads)
        width = out_BGRV.shape[-1]
        out_BGWRV = out_BGRV.view(self._batch, self._heads, self._width, repeats, width)
        return out_BGWRV.permute(0, 2, 1, 3, 4).reshape(len(q_NHK), -1, width)

    def _append(self, cache_BGSK: Tensor, new_NGK: Tensor) -> Tensor:
        """Write each sequence's new entries; the cached entries of every sequence and kv head, [B G, S, K]."""
        dim = new_NGK.shape[-1]
        cache_BGSK.view(-1, dim).index_copy_(0, self._write_BG, new_NGK.reshape(-1, dim))
        return cache_BGSK.flatten(0, 1)[: self._rows, : self._longest]
