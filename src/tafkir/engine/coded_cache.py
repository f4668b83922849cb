"""Caches that keep codes and scales: 1 byte a number in FP8, 4.5 bits in NVFP4.

A prompt attends to its own keys and values as they are, and leaves codes; every new token attends to what the codes
are worth, its own entry included. One layer at a time is decoded, so the rest never stands in memory wide.

Shapes: N tokens, H query heads, G key-value heads, K head_dim, L latent rank, C what is cached of one token, B
sequences, S cached length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tafkir.engine.cache_formats import CacheCodec, CacheFormat
from tafkir.engine.kv_cache import KVCache
from tafkir.engine.latent_cache import LatentCache
from tafkir.engine.store import Cache, Store
from tafkir.engine.views import DecodeView, Grouping, PrefillView
from tafkir.recipe.model import ModelConfig

__all__ = ["CodedKVCache", "CodedLatentCache", "CodedStore", "build_cache"]


class CodedStore:
    """Entries of every layer as codes: one growing `Store` of bytes for each part of the format.

    Args:
        heads: entries of a token.
        codecs: of the layers.
        like: a tensor whose dtype and device the decoded entries take.
    """

    def __init__(self, heads: int, codecs: Sequence[CacheCodec], like: Tensor) -> None:
        self._codecs, self._like, self._heads = list(codecs), like, heads
        bytes_like = torch.empty(0, dtype=torch.uint8, device=like.device)
        self.parts = tuple(Store((heads, 0, width), 2, len(self._codecs), bytes_like) for width in codecs[0].widths)

    @property
    def shape_like(self) -> Tensor:
        """An empty tensor with the dims of a decoded layer, [0, G, capacity, K]."""
        return self._like.new_empty(0, self._heads, self.parts[0].length, self._codecs[0].dim)

    def write(self, layer_idx: int, rows_N: Tensor, positions_N: Tensor, entries_NGK: Tensor) -> None:
        """Put each token's entries at its row and position."""
        for store, part in zip(self.parts, self._codecs[layer_idx].encode(entries_NGK), strict=True):
            store.tensors[layer_idx].permute(0, 2, 1, 3)[rows_N, positions_N] = part

    def write_flat(self, layer_idx: int, places: Tensor, entries_FK: Tensor) -> None:
        """Put entries at places counted over rows, heads and positions."""
        for store, part in zip(self.parts, self._codecs[layer_idx].encode(entries_FK), strict=True):
            width = part.shape[-1]
            store.tensors[layer_idx].view(-1, width).index_copy_(0, places, part)

    def read(self, layer_idx: int, rows: int, length: int) -> Tensor:
        """What the first rows hold up to this length, [rows G, length, K]."""
        parts = tuple(store.tensors[layer_idx][:rows, :, :length].flatten(0, 1).contiguous() for store in self.parts)
        return self._codecs[layer_idx].decode(parts, self._like.dtype)


def _position_bytes(stores: tuple[Store, ...]) -> int:
    """Bytes of one token in all layers of these stores."""
    return sum(
        len(s.tensors) * s.tensors[0].shape[1] * s.tensors[0].shape[3] * s.tensors[0].element_size() for s in stores
    )


class CodedKVCache(Cache):
    """Keys and values of every kv head, in codes.

    Args:
        config: the decoder's shape.
        like: a tensor whose dtype and device attention computes in.
        max_bytes: never hold more than this; None sets no limit of its own.
        format: fp8 or nvfp4.
        scales: of keys and of values in every layer; None takes the format's own.

    Raises:
        CapacityError: head_dim does not split into the format's blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        like: Tensor,
        max_bytes: int | None,
        format: CacheFormat,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        assert format != "auto"
        heads, dim, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        pairs: Sequence[tuple[float | None, float | None]] = scales or [(None, None)] * layers
        of_keys = [CacheCodec(format, dim, pair[0]) for pair in pairs]
        of_values = [CacheCodec(format, dim, pair[1]) for pair in pairs]
        self.prompt_keys, self.keys = (CodedStore(heads, of_keys, like) for _ in range(2))
        self.prompt_values, self.values = (CodedStore(heads, of_values, like) for _ in range(2))
        prompts, own = self.prompt_keys.parts + self.prompt_values.parts, self.keys.parts + self.values.parts
        super().__init__(config, like, max_bytes, num_heads=heads, prompts=prompts, own=own)
        self._position_bytes = _position_bytes(own)

    def prefill_view(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> _KVPrefillView:
        return _KVPrefillView(self, rows, lengths, device)

    def decode_view(self, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> _KVDecodeView:
        return _KVDecodeView(self, grouping, cached_B, longest, width)


class _KVPrefillView(PrefillView):
    def __init__(self, cache: CodedKVCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        super().__init__(rows, lengths, device)
        self._cache = cache

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        self._cache.prompt_keys.write(layer_idx, self.rows_N, self.positions_N, k_NGK)
        self._cache.prompt_values.write(layer_idx, self.rows_N, self.positions_N, v_NGK)
        return super().attend(layer_idx, q_NHK, k_NGK, v_NGK)


class _CodedDecodeView(DecodeView):
    """New tokens whose entries land in their sequences' rows as codes; arguments as for `DecodeView`."""

    def __init__(self, store: CodedStore, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> None:
        super().__init__(store.shape_like, grouping, cached_B, longest, width)

    def _both(self, layer_idx: int, prompts: CodedStore, own: CodedStore, entries_NGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries; what the prompts' rows hold, [P G, T, K], and the sequences', [B G, S, K]."""
        own.write_flat(layer_idx, self._write_BG, entries_NGK.reshape(-1, entries_NGK.shape[-1]))
        prompt = prompts.read(layer_idx, self._grouping.num_prompts, self._longest_prompt)
        return prompt, own.read(layer_idx, self._batch, self._longest)


class _KVDecodeView(_CodedDecodeView):
    def __init__(self, cache: CodedKVCache, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> None:
        super().__init__(cache.keys, grouping, cached_B, longest, width)
        self._cache = cache

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        cache, dim = self._cache, q_NHK.shape[-1]
        prompt_keys, keys = self._both(layer_idx, cache.prompt_keys, cache.keys, k_NGK)
        prompt_values, values = self._both(layer_idx, cache.prompt_values, cache.values, v_NGK)
        return self._attend(q_NHK, (prompt_keys.mT, prompt_values), (keys, values), dim**-0.5)


class CodedLatentCache(Cache):
    """Latents, rotated keys included, in codes; arguments and errors as for `CodedKVCache`, one scale a layer."""

    def __init__(
        self,
        config: ModelConfig,
        like: Tensor,
        max_bytes: int | None,
        format: CacheFormat,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        assert format != "auto"
        self.rank = config.mla.kv_lora_rank
        own_scales: Sequence[float | None]
        own_scales = [pair[0] for pair in scales] if scales else [None] * config.num_hidden_layers
        codecs = [CacheCodec(format, config.mla.latent_dim, scale) for scale in own_scales]
        self.prompt_latents, self.latents = (CodedStore(1, codecs, like) for _ in range(2))
        prompts, own = self.prompt_latents.parts, self.latents.parts
        super().__init__(config, like, max_bytes, num_heads=1, prompts=prompts, own=own)
        self._position_bytes = _position_bytes(own)

    def prefill_view(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> _LatentPrefillView:
        return _LatentPrefillView(self, rows, lengths, device)

    def decode_view(self, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1) -> _LatentDecodeView:
        return _LatentDecodeView(self, grouping, cached_B, longest, width)


class _LatentPrefillView(PrefillView):
    """Implements `LatentKeeper`."""

    def __init__(
        self, cache: CodedLatentCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(rows, lengths, device)
        self._cache = cache

    def keep_latents(self, layer_idx: int, latent_NC: Tensor) -> None:
        self._cache.prompt_latents.write(layer_idx, self.rows_N, self.positions_N, latent_NC.unsqueeze(1))


class _LatentDecodeView(_CodedDecodeView):
    """Implements `LatentAttentionState`."""

    def __init__(
        self, cache: CodedLatentCache, grouping: Grouping, cached_B: Tensor, longest: int, width: int = 1
    ) -> None:
        super().__init__(cache.latents, grouping, cached_B, longest, width)
        self._cache = cache

    def attend_latent(self, layer_idx: int, q_NHC: Tensor, latent_NC: Tensor, scale: float) -> Tensor:
        cache, rank = self._cache, self._cache.rank
        prompt, own = self._both(layer_idx, cache.prompt_latents, cache.latents, latent_NC.unsqueeze(1))
        return self._attend(q_NHC, (prompt.mT, prompt[..., :rank]), (own, own[..., :rank]), scale)


def build_cache(
    config: ModelConfig,
    like: Tensor,
    max_bytes: int | None,
    format: CacheFormat = "auto",
    scales: Sequence[tuple[float, float]] | None = None,
) -> Cache:
    """The cache of a decoder in this format; arguments and errors as for `CodedKVCache`."""
    latent = config.attention_type == "mla"
    if format == "auto":
        return (LatentCache if latent else KVCache)(config, like, max_bytes)
    return (CodedLatentCache if latent else CodedKVCache)(config, like, max_bytes, format, scales)
