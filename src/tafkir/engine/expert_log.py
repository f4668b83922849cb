"""Remembers which experts every token went to, so that training can send it there again.

Shapes: N tokens, B running sequences, L MoE layers, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from tafkir.engine.sequence import Prompt, Sequence
from tafkir.engine.store import bucket

__all__ = ["ExpertLog"]

# Ended rows are still computed; what their tokens do is written here and never read.
_TRASH = 0


class ExpertLog:
    """Experts of the tokens that were fed, by sequence; a sequence keeps its slot while the batch moves its row."""

    def __init__(self) -> None:
        self._slots: dict[Sequence, int] = {}
        self._free: list[int] = []
        self._ids = torch.zeros(0)

    def note_prompts(self, prompts: SequenceOf[Prompt], layers: SequenceOf[Tensor]) -> None:
        """After a prefill: the experts [N, A] of every layer, for the prompts one after the other."""
        ids_NLA = torch.stack(list(layers), dim=1).to(torch.int16)
        for prompt, part in zip(prompts, ids_NLA.split([len(prompt.ids) for prompt in prompts]), strict=True):
            prompt.expert_ids = part.clone()

    def note_tokens(self, rows: SequenceOf[Sequence | None], place_B: Tensor, layers: SequenceOf[Tensor]) -> None:
        """After a decode step: the experts [B, A] of every layer.

        Args:
            rows: the batch's sequences, None where one has ended.
            place_B: how many of its own tokens each row had fed before this one.
        """
        ids_BLA = torch.stack(list(layers), dim=1).to(torch.int16)
        slots = [_TRASH if seq is None else self._slot(seq) for seq in rows]
        self._reserve(max(slots) + 1, int(place_B.max()) + 1, ids_BLA)
        self._ids[torch.tensor(slots, device=place_B.device), place_B] = ids_BLA

    def take(self, seq: Sequence, num_tokens: int) -> Tensor | None:
        """What the tokens of an ended sequence went to; None where nothing was routed.

        Returns:
            int16 [P + n - 1, L, A] on the CPU, for its context of P tokens and all but the last of its n own ones.
        """
        slot = self._slots.pop(seq, None)
        if slot is not None:
            self._free.append(slot)
        if seq.prompt is None or seq.prompt.expert_ids is None:
            return None
        parts = [seq.prompt.expert_ids]
        if slot is not None:
            parts.append(self._ids[slot, : num_tokens - 1])
        return torch.cat(parts).cpu()

    def _slot(self, seq: Sequence) -> int:
        if seq not in self._slots:
            self._slots[seq] = self._free.pop() if self._free else len(self._slots) + 1
        return self._slots[seq]

    def _reserve(self, num_slots: int, length: int, like_BLA: Tensor) -> None:
        have = self._ids.shape if self._ids.dim() == 4 else (0, 0)
        if num_slots <= have[0] and length <= have[1]:
            return
        rows, length = max(have[0], 1 << (num_slots - 1).bit_length()), max(have[1], bucket(length))
        grown = like_BLA.new_zeros(rows, length, *like_BLA.shape[1:])
        if self._ids.dim() == 4:
            grown[: have[0], : have[1]] = self._ids
        self._ids = grown
