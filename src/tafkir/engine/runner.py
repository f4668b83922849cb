"""Runs the decoder over prompts (prefill) and over one new token per sequence (decode).

Shapes: N tokens, D hidden, P prompts, B sequences, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.engine.batch import Column, RunningBatch
from tafkir.engine.expert_log import ExpertLog
from tafkir.engine.sequence import Prompt
from tafkir.engine.store import Cache
from tafkir.engine.views import Grouping
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder, DecoderOutput

__all__ = ["Runner"]


class Runner:
    """The decoder and its cache; no policy lives here. `expert_log` is told where tokens went, where there is one."""

    def __init__(self, decoder: Decoder, cache: Cache, expert_log: ExpertLog | None = None) -> None:
        self.decoder, self.cache, self.expert_log = decoder, cache, expert_log
        self.device = decoder.embed_tokens.weight.device

    def prefill(self, prompts: SequenceOf[Prompt]) -> Tensor:
        """Fill the prompts' cache rows; the hidden state of each one's last token, [P, D]."""
        lengths = [len(prompt.ids) for prompt in prompts]
        view = self.cache.prefill_view([prompt.row for prompt in prompts], lengths, self.device)
        ids_N = torch.tensor([token for prompt in prompts for token in prompt.ids], device=self.device)
        output: DecoderOutput = self.decoder(ids_N, view.positions_N, view)
        if self.expert_log is not None:
            self.expert_log.note_prompts(prompts, output.expert_ids)
        return output.hidden_ND[view.last_N]

    def decode(self, batch: RunningBatch, grouping: Grouping) -> Tensor:
        """Feed every row's newest token; logits of the next one, [B, V]."""
        cached_B = batch.column(Column.COUNT) - 1
        view = self.cache.decode_view(grouping, cached_B, batch.longest)
        positions_B = batch.column(Column.PROMPT_LENGTH) + cached_B
        output: DecoderOutput = self.decoder(batch.column(Column.TOKEN), positions_B, view)
        if self.expert_log is not None:
            self.expert_log.note_tokens(batch.sequences, cached_B, output.expert_ids)
        return self.decoder.logits(output.hidden_ND)

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
