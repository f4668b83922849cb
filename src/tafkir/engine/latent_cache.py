"""The cache of multi-head latent attention: one latent per token and layer, whatever the number of heads.

A token leaves its compressed keys and values with the rotated key behind them (arXiv 2412.19437, section 2.1.1).
Prompts attend expanded, which takes fewer operations where queries are many; new tokens attend absorbed, over latents.

Shapes: N tokens, H query heads, L latent rank, C what is cached of one token, P prompts, B sequences, S cached length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tafkir.engine.store import Cache, Store
from tafkir.engine.views import DecodeView, Grouping, PrefillView
from tafkir.recipe.model import ModelConfig

__all__ = ["LatentCache", "LatentDecodeView", "LatentPrefillView"]


class LatentCache(Cache):
    """Latents, as one kv head that all query heads read; arguments as for `Cache`."""

    def __init__(self, config: ModelConfig, like: Tensor, max_bytes: int | None = None) -> None:
        self.rank = config.mla.kv_lora_rank
        shape = (1, 0, config.mla.latent_dim)
        self.prompt_latents = Store(shape, 2, config.num_hidden_layers, like)
        self.latents = Store(shape, 2, config.num_hidden_layers, like)
        prompts, own = (self.prompt_latents,), (self.latents,)
        super().__init__(config, like, max_bytes, num_heads=1, prompts=prompts, own=own)

    def prefill_view(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> LatentPrefillView:
        return LatentPrefillView(self, rows, lengths, device)

    def decode_view(self, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> LatentDecodeView:
        return LatentDecodeView(self, grouping, cached_B, longest, width)


class LatentPrefillView(PrefillView):
    """Prompts whose latents land in their rows; implements `LatentKeeper`."""

    def __init__(self, cache: LatentCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        super().__init__(rows, lengths, device)
        self._cache = cache

    def keep_latents(self, layer_idx: int, latent_NC: Tensor) -> None:
        self._cache.prompt_latents.tensors[layer_idx][:, 0][self.rows_N, self.positions_N] = latent_NC


class LatentDecodeView(DecodeView):
    """New tokens whose latents land in their sequences' rows; implements `LatentAttentionState`."""

    def __init__(self, cache: LatentCache, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> None:
        super().__init__(cache.latents.tensors[0], grouping, cached_B, longest, width)
        self._cache = cache

    def attend_latent(self, layer_idx: int, q_NHC: Tensor, latent_NC: Tensor, scale: float) -> Tensor:
        prompt = self._cache.prompt_latents.tensors[layer_idx][: self._prompt_rows, 0, : self._longest_prompt]
        own = self._append(self._cache.latents.tensors[layer_idx], latent_NC)
        rank = self._cache.rank
        return self._attend(q_NHC, (prompt.mT, prompt[..., :rank]), (own, own[..., :rank]), scale)
