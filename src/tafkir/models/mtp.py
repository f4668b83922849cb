"""Multi-token prediction (arXiv 2412.19437, section 2.2): after the decoder, layer k predicts the token k + 1 ahead.

Shapes: N tokens of a flat batch, M of them that depth k reads, D hidden, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tafkir.models.attention import VarlenCausal
from tafkir.models.layers import Embedding, Linear, RMSNorm
from tafkir.models.residual import build_residual
from tafkir.models.router import Router
from tafkir.ops.rope import rope_table
from tafkir.recipe.model import ModelConfig

__all__ = ["MtpLayer", "MtpOutput", "MultiTokenPredictor", "ShiftedBatch", "shift_documents"]


@dataclass(frozen=True, slots=True)
class ShiftedBatch:
    """What depth k reads of a flat batch: the positions that have a token k places on and one more to predict.

    Attributes:
        rows_M: int64, each position's place in the whole batch.
        rows_before_M: int64, its place among the rows of depth k - 1 (for k = 1, in the whole batch).
        input_ids_M: int64, the token k places on, t_{i+k}.
        positions_M: int64, the position's own id, not the shifted token's.
        labels_M: int64, what is to be predicted, t_{i+k+1}, or -100.
        cu_seqlens: boundaries of the documents that are long enough; first 0, last M.
        idle: one row that stands in for none, where others wait for this process to compute a depth with them.
    """

    rows_M: Tensor
    rows_before_M: Tensor
    input_ids_M: Tensor
    positions_M: Tensor
    labels_M: Tensor
    cu_seqlens: tuple[int, ...]
    idle: bool = False


def shift_documents(
    input_ids_N: Tensor,
    positions_N: Tensor,
    labels_N: Tensor,
    cu_seqlens: Sequence[int],
    depth: int,
    *,
    every_depth: bool = False,
) -> list[ShiftedBatch]:
    """The rows of depth 1 to `depth`, cut at document boundaries: of T tokens, depth k reads the first T - k - 1.

    Nothing is padded: a row whose shifted token or label would lie beyond its document is left out, which changes no
    other row, for attention only looks back.

    Args:
        labels_N: int64; `labels_N[i]` is the token that the decoder predicts at i, or -100.
        cu_seqlens: document boundaries; first 0, last N.
        every_depth: put an idle batch where every document is too short.

    Returns:
        At most `depth` batches: it ends before the first depth at which every document is too short.
    """
    bounds = [int(bound) for bound in cu_seqlens]
    batches: list[ShiftedBatch] = []
    before = torch.arange(len(input_ids_N), device=input_ids_N.device)
    for k in range(1, depth + 1):
        docs = [(start, stop - k - 1) for start, stop in pairwise(bounds) if stop - start > k + 1]
        if not docs:
            break
        rows = torch.cat([torch.arange(start, stop) for start, stop in docs]).to(input_ids_N.device)
        cu = [0]
        for start, stop in docs:
            cu.append(cu[-1] + stop - start)
        batches.append(
            ShiftedBatch(
                rows_M=rows,
                rows_before_M=torch.searchsorted(before, rows),
                input_ids_M=input_ids_N[rows + k],
                positions_M=positions_N[rows],
                labels_M=labels_N[rows + k],
                cu_seqlens=tuple(cu),
            )
        )
        before = rows
    if every_depth:
        none = torch.zeros(1, dtype=torch.int64, device=input_ids_N.device)
        batches += [ShiftedBatch(none, none, none, none, none - 100, (0, 1), idle=True)] * (depth - len(batches))
    return batches


@dataclass(frozen=True, slots=True)
class MtpOutput:
    """What one depth computes, for each of its rows.

    Attributes:
        hidden_MD: after the layer's own norm; the shared head turns it into logits of t_{i+k+1}.
        pre_norm_MD: the same before that norm.
        expert_ids_MA: chosen experts, int64; None in a dense layer.
    """

    hidden_MD: Tensor
    pre_norm_MD: Tensor
    expert_ids_MA: Tensor | None


class MtpLayer(nn.Module):
    """h' = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h)], then one decoder block and a norm of its own (equations 21, 22)."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        assert config.mtp is not None
        self.hidden_first = config.mtp.concat_order == "hidden_first"
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.residual = build_residual(config)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_MD: Tensor, embedded_MD: Tensor, cos: Tensor, sin: Tensor, attention: VarlenCausal
    ) -> MtpOutput:
        """One depth over rows that are already aligned.

        Args:
            hidden_MD: h^{k-1}, the states of the depth before (of the decoder for k = 1).
            embedded_MD: Emb(t_{i+k}).
            cos, sin: RoPE table of the rows' own positions.
        """
        joined_MD = self.eh_proj(self.halves(hidden_MD, embedded_MD))
        state, routing = self.block(self.residual.enter(joined_MD), cos, sin, attention)
        pre_norm_MD = self.residual.exit(state)
        return MtpOutput(self.norm(pre_norm_MD), pre_norm_MD, routing.expert_ids_NA if routing else None)

    def halves(self, hidden_MD: Tensor, embedded_MD: Tensor) -> Tensor:
        """What `eh_proj` reads, [M, 2D]: both inputs, normed, side by side."""
        halves = [self.enorm(embedded_MD), self.hnorm(hidden_MD)]
        return torch.cat(halves[::-1] if self.hidden_first else halves, dim=-1)


class MultiTokenPredictor(nn.Module):
    """The D layers of a decoder. Embedding table and output head are the decoder's own.

    Args:
        config: with `mtp` set.
        blocks: one `DecoderLayer` per depth, given from outside: the decoder holds this module, not the other way.
    """

    def __init__(self, config: ModelConfig, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        assert config.mtp is not None
        self.config = config
        self.shape = config.mtp
        self.layers = nn.ModuleList(MtpLayer(config, block) for block in blocks)

    @property
    def routers(self) -> list[Router]:
        """The routers of the layers, first depth first; none where they are dense."""
        return [module for layer in self.layers for module in layer.modules() if isinstance(module, Router)]

    def forward(
        self, hidden_ND: Tensor, pre_norm_ND: Tensor, embed_tokens: Embedding, batches: Sequence[ShiftedBatch]
    ) -> Iterator[MtpOutput]:
        """Depth after depth, each computed when it is asked for.

        Args:
            hidden_ND: the decoder's hidden states after its final norm.
            pre_norm_ND: the same before that norm; `config.mtp.input_state` says which of both is read.
            embed_tokens: the decoder's table.
            batches: from `shift_documents`.
        """
        post_norm = self.shape.input_state == "post_norm"
        target_ND = hidden_ND if post_norm else pre_norm_ND
        state_ND = target_ND
        for layer, batch in zip(self.layers, batches, strict=False):
            config = self.config
            cos, sin = rope_table(batch.positions_M, config.rotary_size, config.rope_theta, config.rope_scaling)
            rows = batch.rows_before_M if self.shape.chain_hidden else batch.rows_M
            hidden_MD = (state_ND if self.shape.chain_hidden else target_ND).index_select(0, rows)
            attention = VarlenCausal(batch.cu_seqlens, hidden_MD.device)
            out: MtpOutput = layer(hidden_MD, embed_tokens(batch.input_ids_M), cos, sin, attention)
            state_ND = out.hidden_MD if post_norm else out.pre_norm_MD
            yield out
