"""A paged cache: what attention keeps lies in blocks of 16 tokens that sequences hold by reference.

Grouped-query attention in the weights' dtype runs in a compiled kernel that follows each row's table of blocks.
Latents, codes, and processors without the kernel gather what a row holds before they attend.

Shapes: N tokens, H query heads, G key-value heads, K head_dim, C latent_dim, R rows, T blocks of a row, B rows that
decode, W tokens of each, S cached length, L MoE layers, A active experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.engine.block_manager import BlockManager
from tafkir.engine.cache_formats import CacheCodec, CacheFormat
from tafkir.models.attention import VarlenCausal
from tafkir.models.few_tokens import Pages
from tafkir.ops import native
from tafkir.ops.device import device_kernels
from tafkir.recipe.model import ModelConfig

__all__ = ["BLOCK_SIZE", "Chunk", "LatentPagedView", "PagedCache", "PagedRows", "PagedView"]

BLOCK_SIZE = 16
"""Tokens of a block; the kernel is written for it."""

_DEFAULT_BYTES = 256 << 20

_Scales = Sequence[tuple[float, float]] | None

PagedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""As `ops.triton.paged_attention.paged_attention`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one prompt in a forward pass: as many as `count` from `start` on, over these blocks."""

    blocks: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Which blocks the decoding rows read, [B, T], and the tokens of each one's prompt, [B]."""

    tables_BT: Tensor
    prompt_lengths_B: Tensor


_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class _Pool:
    """Entries of every layer, [slots, G, width] for each part of their format; a slot is a token's place."""

    def __init__(
        self, heads: int, dim: int, layers: int, slots: int, like: Tensor, codecs: Sequence[CacheCodec]
    ) -> None:
        self._codecs, self._like = codecs, like
        widths, dtype = (codecs[0].widths, torch.uint8) if codecs else ((dim,), like.dtype)
        # Not zeroed: what nobody has written is never read, and takes no memory until then.
        self._parts = [[like.new_empty(slots, heads, width, dtype=dtype) for width in widths] for _ in range(layers)]

    def write(self, layer_idx: int, slot_N: Tensor, entries_NGK: Tensor) -> None:
        parts = self._codecs[layer_idx].encode(entries_NGK) if self._codecs else (entries_NGK,)
        for tensor, part in zip(self._parts[layer_idx], parts, strict=True):
            tensor.index_copy_(0, slot_N, part)

    def whole(self, layer_idx: int) -> Tensor:
        """All slots of a layer without codes, [slots, G, K]."""
        return self._parts[layer_idx][0]

    def read(self, layer_idx: int, slots: Tensor) -> Tensor:
        """What these slots hold, [..., G, K]."""
        parts = tuple(tensor[slots] for tensor in self._parts[layer_idx])
        return self._codecs[layer_idx].decode(parts, self._like.dtype) if self._codecs else parts[0]


class PagedCache:
    """The blocks and their tables; who gets which is `blocks`' and the engine's business.

    Args:
        config: the decoder's shape.
        like: a weight, whose dtype and device the cache takes.
        max_bytes: of all blocks together; None takes 256 MiB, or one whole context where that is more.
        max_rows: most rows that decode at once.
        max_context: most tokens of a row.
        format: number format; auto takes `like`'s dtype.
        scales: of keys and of values in every layer, for codes; None takes the format's own.
        caching: remember full blocks for later requests.
        record_experts: keep which experts each token went to.
        invariant: one token at a time, so that nothing depends on the rest of the batch.

    Attributes:
        spare: a block that nobody is ever given, for rows that are there to fill a step up; without the compiled
            kernel alone.
        kernel: attends for rows with one new token each; None gathers what they hold, and asks torch.
    """

    def __init__(
        self,
        config: ModelConfig,
        like: Tensor,
        max_bytes: int | None,
        *,
        max_rows: int,
        max_context: int,
        format: CacheFormat = "auto",
        scales: _Scales = None,
        caching: bool = True,
        record_experts: bool = False,
        invariant: bool = False,
    ) -> None:
        self.latent, self.invariant, self.device = config.attention_type == "mla", invariant, like.device
        self.coded = format != "auto"
        self.rank = config.mla.kv_lora_rank if self.latent else 0
        heads, dim = (1, config.mla.latent_dim) if self.latent else (config.num_key_value_heads, config.head_dim)
        layers = config.num_hidden_layers
        pairs: Sequence[tuple[float | None, float | None]] = scales or [(None, None)] * layers
        kinds = 1 if self.latent else 2
        codecs = [
            [CacheCodec(format, dim, pair[i]) for pair in pairs] if format != "auto" else [] for i in range(kinds)
        ]
        width = sum(codecs[0][0].widths) if format != "auto" else dim * like.element_size()
        self.block_bytes = BLOCK_SIZE * layers * kinds * heads * width
        widest = -(-max_context // BLOCK_SIZE) + 2
        room = max_bytes // self.block_bytes if max_bytes else max(_DEFAULT_BYTES // self.block_bytes, widest)
        # More than all rows can fill is never used.
        num_blocks = max(1, min(room, max_rows * widest))
        self.max_bytes = num_blocks * self.block_bytes
        self.blocks, self.spare = BlockManager(num_blocks, BLOCK_SIZE, caching=caching), num_blocks
        self.tables = torch.zeros(max_rows, widest, dtype=torch.int64, device=self.device)
        self.row_numbers = torch.arange(max_rows, device=self.device)
        self.native = not self.latent and format == "auto" and native.takes(like, dtypes=_NATIVE_DTYPES)
        if self.native:
            size = (num_blocks, heads, dim, BLOCK_SIZE)
            self.keys = [like.new_empty(size) for _ in range(layers)]
            self.values = [like.new_empty(num_blocks, heads, BLOCK_SIZE, dim) for _ in range(layers)]
            self.addresses = _addresses(self.keys), _addresses(self.values)
        else:
            slots = (num_blocks + 1) * BLOCK_SIZE
            self.pools = [_Pool(heads, dim, layers, slots, like, codec) for codec in codecs]
        self.kernel: PagedAttention | None = None
        if not self.latent and format == "auto" and device_kernels(self.device) == "triton":
            from tafkir.ops.triton.paged_attention import paged_attention

            self.kernel = paged_attention
        self.experts: Tensor | None = None
        if record_experts:
            shape = (
                num_blocks * BLOCK_SIZE,
                sum(s.ffn == "moe" for s in config.layer_specs),
                config.num_experts_per_tok,
            )
            self.experts = torch.empty(shape, dtype=torch.int16, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks that somebody holds."""
        return self.blocks.num_used * self.block_bytes

    def num_blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK_SIZE)

    def set_row(self, row: int, blocks: Sequence[int]) -> None:
        """Point a row at its blocks."""
        self.tables[row, : len(blocks)] = torch.tensor(blocks, device=self.device)

    def move(self, src: Tensor, dst: Tensor, length: int) -> None:
        """Rows `dst` read from now on what the rows `src` read."""
        self.tables[dst] = self.tables[src]

    def slots(self, tables_RT: Tensor, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """The slot of each token."""
        return tables_RT[rows_N, positions_N // BLOCK_SIZE] * BLOCK_SIZE + positions_N % BLOCK_SIZE

    def slots_of(self, blocks: Sequence[int], length: int) -> Tensor:
        """The slots of a sequence's first tokens."""
        places = torch.arange(BLOCK_SIZE, device=self.device)
        return (torch.tensor(blocks, device=self.device).unsqueeze(1) * BLOCK_SIZE + places).flatten()[:length]

    def decode_view(self, rows: PagedRows, cached_B: Tensor, longest: int, width: int = 1) -> PagedView:
        """Attention for the newest tokens of each row; `cached_B` of its own tokens are in the cache before it."""
        return self.view(rows, rows.prompt_lengths_B + cached_B, width, ())

    def view(self, rows: PagedRows, first_B: Tensor, width: int, chunks: Sequence[Chunk]) -> PagedView:
        """Attention for a flat batch: `width` tokens of each row from position `first_B` on, then the chunks."""
        kind = LatentPagedView if self.latent else PagedView
        return kind(self, rows.tables_BT, first_B, width, chunks)


def _addresses(layers: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))


class PagedView:
    """A flat batch of tokens that attend to what their rows hold; implements `AttentionState`.

    Args:
        cache: where new entries land, too.
        tables_BT: blocks of the decoding rows.
        first_B: position of each one's first new token.
        width: new tokens of each.
        chunks: of prompts, after the rows.

    Attributes:
        positions_N: of all tokens.
        reads_all: attend over as many tokens as the tables have room for, masked, and not over as many as there are,
            which the device would have to be asked for.
    """

    reads_all = False

    def __init__(
        self, cache: PagedCache, tables_BT: Tensor, first_B: Tensor, width: int, chunks: Sequence[Chunk]
    ) -> None:
        self.cache, self._chunks, self._width, self._batch = cache, chunks, width, len(first_B)
        device = cache.device
        self._decoding = self._batch * width
        self._fresh: VarlenCausal | None = None
        if not chunks and width == 1:
            # The most common step, and one in which every small operation is felt.
            self._tables, self.positions_N = tables_BT.contiguous(), first_B
            self._rows_N = cache.row_numbers[: self._batch]
            return
        longest = max((len(chunk.blocks) for chunk in chunks), default=0)
        tables = tables_BT.new_zeros(self._batch + len(chunks), max(tables_BT.shape[1] if self._batch else 0, longest))
        if not chunks:
            tables = tables_BT.contiguous()
        elif self._batch:
            tables[: self._batch, : tables_BT.shape[1]] = tables_BT
        positions = [(first_B.unsqueeze(1) + torch.arange(width, device=device)).flatten()]
        rows = [torch.arange(self._batch, device=device).repeat_interleave(width)]
        for row, chunk in enumerate(chunks, start=self._batch):
            tables[row, : len(chunk.blocks)] = torch.tensor(chunk.blocks, device=device)
            positions.append(torch.arange(chunk.start, chunk.start + chunk.count, device=device))
            rows.append(torch.full((chunk.count,), row, device=device))
        self._tables, self.positions_N, self._rows_N = tables, torch.cat(positions), torch.cat(rows)
        if chunks and not cache.invariant and not cache.latent and all(not chunk.start for chunk in chunks):
            bounds = [0]
            for chunk in chunks:
                bounds.append(bounds[-1] + chunk.count)
            self._fresh = VarlenCausal(bounds, device=device)

    @cached_property
    def slot_N(self) -> Tensor:  # noqa: N802
        """Where the tokens land."""
        return self.cache.slots(self._tables, self._rows_N, self.positions_N)

    @property
    def pages(self) -> Pages | None:
        """What the kernel reads, where it is all that these tokens need."""
        cache = self.cache
        if not cache.native or cache.keys[0].dtype != torch.float32 or (self._chunks and not cache.invariant):
            return None
        keys, values = cache.addresses
        return Pages(keys, values, self._tables, self._rows_N, self.positions_N)

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        cache, dim = self.cache, q_NHK.shape[-1]
        many = self._decoding if not cache.invariant else len(q_NHK)
        if not cache.native:
            for pool, entries in zip(cache.pools, (k_NGK, v_NGK), strict=True):
                pool.write(layer_idx, self.slot_N, entries)
        elif many < len(q_NHK):
            block_N, place_N = (part[many:] for part in (self.slot_N // BLOCK_SIZE, self.slot_N % BLOCK_SIZE))
            cache.keys[layer_idx].permute(0, 3, 1, 2)[block_N, place_N] = k_NGK[many:]
            cache.values[layer_idx].transpose(1, 2)[block_N, place_N] = v_NGK[many:]
        parts = []
        if cache.native and many:
            parts.append(self._call(layer_idx, q_NHK[:many], k_NGK[:many], v_NGK[:many]))
        elif not cache.native and (self._decoding or cache.invariant):
            parts += self._gathered(layer_idx, q_NHK[:many], dim**-0.5)
        if many < len(q_NHK):
            if self._fresh is not None:
                new = (q_NHK[many:], k_NGK[many:], v_NGK[many:])
                if native.is_bfloat16_enough():
                    new = (new[0].bfloat16(), new[1].bfloat16(), new[2].bfloat16())
                parts.append(self._fresh.attend(layer_idx, *new).to(q_NHK.dtype))
            else:
                parts += self._chunked(layer_idx, q_NHK, dim**-0.5)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _call(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """The kernel, for the first tokens of the batch: it keeps their entries, too."""
        (tokens, heads, dim), kv_heads = q_NHK.shape, k_NGK.shape[1]
        out_NHK = q_NHK.new_empty(q_NHK.shape, dtype=torch.float32)
        tables, is_bfloat16 = self._tables, k_NGK.dtype == torch.bfloat16
        native.call(
            "tafkir_paged_attention",
            *(q_NHK.float().contiguous(), k_NGK.contiguous(), v_NGK.contiguous()),
            *(self.cache.keys[layer_idx], self.cache.values[layer_idx], tables, self._rows_N, self.positions_N),
            *(int(is_bfloat16), tokens, heads, kv_heads, dim, tables.shape[1], dim**-0.5, out_NHK),
        )
        return out_NHK.to(q_NHK.dtype)

    def _read(self, layer_idx: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these slots, [..., G, K]."""
        cache = self.cache
        if not cache.native:
            keys, values = (pool.read(layer_idx, slots) for pool in cache.pools)
            return keys, values
        block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        return (
            cache.keys[layer_idx].permute(0, 3, 1, 2)[block, place],
            cache.values[layer_idx].transpose(1, 2)[block, place],
        )

    def _gathered(self, layer_idx: int, q_NHK: Tensor, scale: float) -> list[Tensor]:
        """Without the kernel: all decoding rows at once, or every token alone where that must make no difference."""
        if self.cache.kernel is not None and self._width == 1 and not self.cache.invariant:
            keys, values = (pool.whole(layer_idx) for pool in self.cache.pools)
            tables_BT, positions_B = self._tables[: self._batch], self.positions_N[: self._batch]
            return [self.cache.kernel(q_NHK, keys, values, tables_BT, positions_B, BLOCK_SIZE)]
        if not self.cache.invariant:
            return [self._over_rows(layer_idx, q_NHK, slice(0, self._batch), self.positions_N[: len(q_NHK)], scale)]
        rows, places = self._rows_N.tolist(), self.positions_N.split(1)
        return [
            self._over_rows(layer_idx, q_1HK, slice(row, row + 1), place, scale)
            for q_1HK, row, place in zip(q_NHK.split(1), rows, places, strict=True)
        ]

    def _chunked(self, layer_idx: int, q_NHK: Tensor, scale: float) -> list[Tensor]:
        """One prompt after the other, each over what its row holds by now."""
        parts, start = [], self._decoding
        for row, chunk in enumerate(self._chunks, start=self._batch):
            own = slice(start, start + chunk.count)
            place = self.positions_N[own]
            parts.append(self._over_rows(layer_idx, q_NHK[own], slice(row, row + 1), place, scale))
            start += chunk.count
        return parts

    def _over_rows(self, layer_idx: int, q_NHK: Tensor, rows: slice, position_N: Tensor, scale: float) -> Tensor:
        """Equally many queries of each of these rows, over all that the row holds."""
        tables_BT = self._tables[rows]
        place_BW = position_N.view(len(tables_BT), -1)
        reach = tables_BT.shape[1] * BLOCK_SIZE if self.reads_all else int(place_BW.max()) + 1
        places_S = torch.arange(reach, device=position_N.device)
        # Beyond a row's last token stands that token again: nobody has written there, and weights of zero need numbers.
        place_BS = torch.minimum(places_S, place_BW[:, -1:])
        row_B1 = torch.arange(len(tables_BT), device=position_N.device).unsqueeze(1)
        keys, values = self._read(layer_idx, self.cache.slots(tables_BT, row_B1, place_BS))
        out_BHWV = F.scaled_dot_product_attention(
            q_NHK.view(*place_BW.shape, *q_NHK.shape[1:]).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=(places_S <= place_BW.unsqueeze(2)).unsqueeze(1),
            scale=scale,
            enable_gqa=True,
        )
        return out_BHWV.transpose(1, 2).flatten(0, 1)


class LatentPagedView(PagedView):
    """The same over latents; implements `LatentAttentionState`. Prompts attend absorbed, too."""

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        raise TypeError("this cache keeps latents, no keys and values")

    def attend_latent(self, layer_idx: int, q_NHC: Tensor, latent_NC: Tensor, scale: float) -> Tensor:
        (pool,) = self.cache.pools
        pool.write(layer_idx, self.slot_N, latent_NC.unsqueeze(1))
        if self.cache.invariant:
            return torch.cat(self._gathered(layer_idx, q_NHC, scale))
        parts = self._gathered(layer_idx, q_NHC[: self._decoding], scale) if self._batch else []
        return torch.cat(parts + self._chunked(layer_idx, q_NHC, scale))

    def _read(self, layer_idx: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        (pool,) = self.cache.pools
        latents = pool.read(layer_idx, slots)
        return latents, latents[..., : self.cache.rank]
