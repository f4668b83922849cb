"""The cache of grouped-query attention: keys and values, of prompts and of sequences.

Shapes: N tokens, H query heads, G key-value heads, K head_dim, P prompts, B sequences, S cached length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tafkir.engine.store import Cache, Store
from tafkir.engine.views import DecodeView, Grouping, PrefillView
from tafkir.recipe.model import ModelConfig

__all__ = ["KVCache", "KVDecodeView", "KVPrefillView"]


class KVCache(Cache):
    """Keys and values of every kv head; arguments as for `Cache`."""

    def __init__(self, config: ModelConfig, like: Tensor, max_bytes: int | None = None) -> None:
        heads, dim, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        # A prompt is written once and read often, so its keys lie the way that the matmul reads best.
        self.prompt_keys = Store((heads, dim, 0), 3, layers, like)
        self.prompt_values = Store((heads, 0, dim), 2, layers, like)
        self.keys = Store((heads, 0, dim), 2, layers, like)
        self.values = Store((heads, 0, dim), 2, layers, like)
        prompts, own = (self.prompt_keys, self.prompt_values), (self.keys, self.values)
        super().__init__(config, like, max_bytes, num_heads=heads, prompts=prompts, own=own)

    def prefill_view(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> KVPrefillView:
        return KVPrefillView(self, rows, lengths, device)

    def decode_view(self, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> KVDecodeView:
        return KVDecodeView(self, grouping, cached_B, longest, width)


class KVPrefillView(PrefillView):
    """Prompts whose keys and values land in their rows."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        super().__init__(rows, lengths, device)
        self._cache = cache

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        keys_PGKS = self._cache.prompt_keys.tensors[layer_idx]
        values_PGSK = self._cache.prompt_values.tensors[layer_idx]
        keys_PGKS.permute(0, 3, 1, 2)[self.rows_N, self.positions_N] = k_NGK
        values_PGSK.permute(0, 2, 1, 3)[self.rows_N, self.positions_N] = v_NGK
        return super().attend(layer_idx, q_NHK, k_NGK, v_NGK)


class KVDecodeView(DecodeView):
    """New tokens whose keys and values land in their sequences' rows; arguments as for `DecodeView`."""

    def __init__(self, cache: KVCache, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> None:
        super().__init__(cache.keys.tensors[0], grouping, cached_B, longest, width)
        self._cache = cache

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        prompt_rows, longest_prompt, dim = self._prompt_rows, self._longest_prompt, q_NHK.shape[-1]
        prompt_keys = self._cache.prompt_keys.tensors[layer_idx].flatten(0, 1)[:prompt_rows, :, :longest_prompt]
        prompt_values = self._cache.prompt_values.tensors[layer_idx].flatten(0, 1)[:prompt_rows, :longest_prompt]
        keys = self._append(self._cache.keys.tensors[layer_idx], k_NGK)
        values = self._append(self._cache.values.tensors[layer_idx], v_NGK)
        return self._attend(q_NHK, (prompt_keys, prompt_values), (keys, values), dim**-0.5)
