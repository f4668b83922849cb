"""The MTP layers of a packed decoder as a chain that drafts, in one kernel call a sequence.

Shapes: N tokens, D hidden, J half of the rotated dims.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tafkir.models.decoder import Decoder
from tafkir.models.few_tokens import FewTokens
from tafkir.models.mtp import MtpLayer
from tafkir.models.packed import PackedDecoder
from tafkir.models.packed_layers import PackedEmbedding, PackedLinear
from tafkir.ops import native
from tafkir.ops.packed import structs_of
from tafkir.ops.rope import rope_table
from tafkir.records import SamplingParams

__all__ = ["DraftChain", "DraftTrack"]

_BLOCK = 16


class _LayerStruct(ctypes.Structure):
    """`DraftLayer` of native/decode.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("enorm", "hnorm", "norm", "joined", "block")]


class _ChainStruct(ctypes.Structure):
    """`Drafting` of native/decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("depth", "chained", "post_norm", "hidden_first", "head_parts")),
        *((name, ctypes.c_void_p) for name in ("layers", "head", "embedding")),
    ]


class _TrackStruct(ctypes.Structure):
    """`DraftTrack` of native/decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "carried")),
        *((name, ctypes.c_int64) for name in ("cached", "num_carried")),
    ]


class DraftTrack:
    """What every depth keeps of one sequence."""

    def __init__(self, depth: int, hidden: int, block_numbers: int) -> None:
        self._block_numbers, self._capacity = block_numbers, 0
        self._carried = torch.empty(depth, depth, hidden)
        self._keys = self._values = torch.empty(depth, 0, block_numbers)
        self.structs = (_TrackStruct * depth)()
        for struct, carried in zip(self.structs, self._carried, strict=True):
            struct.carried = carried.data_ptr()

    def reserve(self, more: int) -> None:
        """Have room for so many rows behind those that hold."""
        rows = max(struct.cached for struct in self.structs) + more
        if rows <= self._capacity:
            return
        self._capacity = max(2 * self._capacity, -(-rows // _BLOCK) * _BLOCK)
        old, shape = self._keys.shape[1], (len(self.structs), self._capacity // _BLOCK, self._block_numbers)
        keys, values = torch.zeros(shape), torch.zeros(shape)
        keys[:, :old], values[:, :old] = self._keys, self._values
        self._keys, self._values = keys, values
        for struct, own_keys, own_values in zip(self.structs, keys, values, strict=True):
            struct.keys, struct.values = own_keys.data_ptr(), own_values.data_ptr()

    def forget_states(self) -> None:
        """Steps without drafts lie between: what was to be read again is gone; the rows before it stay."""
        for struct in self.structs:
            struct.num_carried = 0


class DraftChain:
    """Calls `tafkir_draft` with the MTP layers of a decoder.

    A draft changes no text, so its sums may differ from the layers' own in the last bits.
    """

    def __init__(self, decoder: Decoder) -> None:
        assert isinstance(decoder, PackedDecoder) and decoder.mtp is not None
        self._decoder, shape, config, own = decoder, decoder.mtp.shape, decoder.config, _layers(decoder)
        few = FewTokens(decoder)
        blocks = few.structs_of_layers([layer.block for layer in own])
        self._kept: list[object] = [few, blocks]
        layers = (_LayerStruct * shape.depth)()
        for struct, layer, block in zip(layers, own, blocks, strict=True):
            assert isinstance(layer.eh_proj, PackedLinear)
            norms = [norm.weight.detach().float().contiguous() for norm in (layer.enorm, layer.hnorm, layer.norm)]
            joined = structs_of(layer.eh_proj.parts)
            self._kept += [*norms, joined]
            struct.enorm, struct.hnorm, struct.norm = (norm.data_ptr() for norm in norms)
            struct.joined, struct.block = ctypes.addressof(joined), ctypes.addressof(block)
        embedding = decoder.get_submodule("embed_tokens")
        assert isinstance(embedding, PackedEmbedding)
        head, table = structs_of(decoder.head_parts), structs_of([embedding.table])
        self._kept += [layers, head, table]
        flags = (shape.depth, shape.chain_hidden, shape.input_state == "post_norm", own[0].hidden_first)
        addresses = (ctypes.addressof(each) for each in (layers, head, table))
        self._struct = _ChainStruct(*flags, len(decoder.head_parts), *addresses)
        self._sizes = shape.depth, config.hidden_size, config.num_key_value_heads * config.head_dim * _BLOCK
        self._rope = self._rope_table(0)

    @staticmethod
    def takes(decoder: Decoder) -> bool:
        """Whether the kernels are in use and know all that the layers are made of."""
        return (
            isinstance(decoder, PackedDecoder)
            and decoder.mtp is not None
            and FewTokens.takes(decoder, [layer.block for layer in _layers(decoder)])
            and all(isinstance(layer.eh_proj, PackedLinear) for layer in _layers(decoder))
        )

    def track(self) -> DraftTrack:
        """For a new sequence."""
        return DraftTrack(*self._sizes)

    def draft(
        self,
        track: DraftTrack,
        state_ND: Tensor,
        tokens: Sequence[int],
        last_position: int,
        most: int,
        params: SamplingParams,
        draw: tuple[int, int],
    ) -> list[int]:
        """So many tokens after the newest one.

        Args:
            track: the sequence's.
            state_ND: float32, the decoder's states that came since the last draft, or the last of them.
            tokens: the N that follow each of them; the newest is the last.
            last_position: of the last state.
            params: how the model draws.
            draw: the sequence's stream, and which of its numbers the first drafted token takes.
        """
        if last_position + most >= len(self._rope[0]):
            self._rope = self._rope_table(last_position + most)
        track.reserve(len(tokens) + 2 * most)
        found = (ctypes.c_int64 * (len(tokens) + most))(*tokens)
        native.call(
            "tafkir_draft", ctypes.addressof(self._struct), ctypes.addressof(track.structs), state_ND.contiguous(),
            len(tokens), last_position, most, *self._rope, ctypes.addressof(found), params.temperature, params.top_k,
            params.top_p, *draw,
        )  # fmt: skip
        return found[len(tokens) :]

    def _rope_table(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, J] up to this one, and some more."""
        config = self._decoder.config
        positions_N = torch.arange(max(256, 2 * position))
        return rope_table(positions_N, config.rotary_size, config.rope_theta, config.rope_scaling)


def _layers(decoder: Decoder) -> list[MtpLayer]:
    assert decoder.mtp is not None
    return [layer for layer in decoder.mtp.layers if isinstance(layer, MtpLayer)]
