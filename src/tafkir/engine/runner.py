"""Runs the decoder over prompts (prefill) and over one new token per sequence (decode).

Shapes: N tokens, D hidden, P prompts, B sequences, W tokens of each, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.engine.batch import Column, RunningBatch
from tafkir.engine.expert_log import ExpertLog
from tafkir.engine.paged_cache import PagedRows
from tafkir.engine.sequence import Prompt
from tafkir.engine.static_steps import StaticDecode
from tafkir.engine.views import Grouping
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput

__all__ = ["Runner"]


class Runner:
    """The decoder and its cache; no policy lives here.

    `expert_log` is told where tokens went, where there is one; `kept_state` names the field of `DecoderOutput` that
    prompts keep of all their tokens, where somebody wants it.

    Attributes:
        static: decodes over buffers that stay in place, where a paged engine has set it up.
    """

    static: StaticDecode | None = None

    def __init__(
        self, decoder: Decoder, cache: Any, expert_log: ExpertLog | None = None, kept_state: str | None = None
    ) -> None:
        self.decoder, self.cache, self.expert_log, self.kept_state = decoder, cache, expert_log, kept_state
        self.device = decoder.embed_tokens.weight.device

    def prefill(self, prompts: SequenceOf[Prompt]) -> Tensor:
        """Fill the prompts' cache rows; the hidden state of each one's last token, [P, D]."""
        lengths = [len(prompt.ids) for prompt in prompts]
        view = self.cache.prefill_view([prompt.row for prompt in prompts], lengths, self.device)
        ids_N = torch.tensor([token for prompt in prompts for token in prompt.ids], device=self.device)
        output: DecoderOutput = self.decoder(ids_N, view.positions_N, view)
        if self.expert_log is not None:
            self.expert_log.note_prompts(prompts, output.expert_ids)
        if self.kept_state is not None:
            for prompt, part in zip(prompts, getattr(output, self.kept_state).split(lengths), strict=True):
                prompt.state_PD = part
        return output.hidden_ND[view.last_N]

    def decode(self, batch: RunningBatch, grouping: Grouping | PagedRows) -> Tensor:
        """Feed every row's newest token; logits of the next one, [B, V]."""
        if self.static is not None and isinstance(grouping, PagedRows):
            cached_B = batch.column(Column.COUNT) - 1
            positions_B = grouping.prompt_lengths_B + cached_B
            logits_BV, expert_ids = self.static(batch.column(Column.TOKEN), positions_B, grouping.tables_BT)
            if self.expert_log is not None:
                self.expert_log.note_tokens(batch.sequences, cached_B, expert_ids)
            return logits_BV
        return self.decoder.logits(self.feed(batch, grouping, batch.column(Column.TOKEN).unsqueeze(1)).hidden_ND)

    def feed(self, batch: RunningBatch, grouping: Grouping | PagedRows, ids_BW: Tensor) -> DecoderOutput:
        """Feed every row its newest token and given ones after it, such as drafts; N = B W, row after row.

        What the batch counts stays: record the tokens that hold (`RunningBatch.record`), or count back
        (`RunningBatch.truncate`); entries beyond a row's count are overwritten by the next step.

        Args:
            ids_BW: int64; the first column is the rows' newest tokens. The cache must have room for W - 1 tokens more
                than the batch's longest row.
        """
        width = ids_BW.shape[1]
        cached_B = batch.column(Column.COUNT) - 1
        view = self.cache.decode_view(grouping, cached_B, batch.longest + width - 1, width)
        place_N, lengths_N = cached_B, batch.column(Column.PROMPT_LENGTH)
        if width > 1:
            place_N = (cached_B.unsqueeze(1) + torch.arange(width, device=self.device)).flatten()
            lengths_N = lengths_N.repeat_interleave(width)
        positions_N = lengths_N + place_N
        output: DecoderOutput = self.decoder(ids_BW.flatten(), positions_N, view)
        if self.expert_log is not None:
            rows = [seq for seq in batch.sequences for _ in range(width)]
            self.expert_log.note_tokens(rows, place_N, output.expert_ids)
        return output

    def score(self, sequences: SequenceOf[SequenceOf[int]]) -> list[Tensor]:
        """Log-probability of each token but the first, given those before it; nothing is cached."""
        bounds = [0]
        for ids in sequences:
            bounds.append(bounds[-1] + len(ids))
        ids_N = torch.tensor([token for ids in sequences for token in ids], device=self.device)
        positions_N = torch.cat([torch.arange(len(ids), device=self.device) for ids in sequences])
        hidden_ND = self.decoder(ids_N, positions_N, VarlenCausal(bounds, device=self.device)).hidden_ND
        # The last token of a sequence has no next one; its target is a stand-in and is cut off below.
        nll_N = F.cross_entropy(self.decoder.logits(hidden_ND), ids_N.roll(-1), reduction="none")
        return [-nll_N[a : b - 1] for a, b in pairwise(bounds)]
