"""Tokens through a packed decoder in one kernel call, or two a layer with whatever attention there is between them.

Shapes: N tokens, D hidden, H query heads, G key-value heads, K head_dim, J = half the rotated dims, A active experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tafkir.models.attention import Attention, AttentionState
from tafkir.models.decoder import Decoder, DecoderLayer, DecoderOutput
from tafkir.models.experts import MoE
from tafkir.models.layers import SwiGLU
from tafkir.models.packed_layers import PackedExperts, PackedLinear
from tafkir.models.residual import PlainResidual
from tafkir.models.router import Routing
from tafkir.ops import native
from tafkir.ops.packed import FEW_ROWS, MatrixStruct, PackedMatrix, goes_in_bfloat16, structs_of
from tafkir.ops.rope import rope_table

__all__ = ["FewTokens", "Pages"]

_SIZES = (
    "hidden", "heads", "kv_heads", "head_dim", "half", "width", "experts", "active", "groups", "open_groups", "sigmoid",
    "normalise", "qkv_parts", "wide_parts", "expert_parts",
)  # fmt: skip
_POINTERS = (
    "attention_norm", "mlp_norm", "q_norm", "k_norm", "qkv_bias", "out_bias", "router_bias",
    "qkv", "out", "wide", "down", "router", "experts_in", "experts_out",
)  # fmt: skip
# Longer contexts have their cosines computed at each step.
_KEPT_POSITIONS = 1 << 14


class _LayerStruct(ctypes.Structure):
    """`Layer` of native/decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("eps", "scaling")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@dataclass(frozen=True, slots=True)
class Pages:
    """A paged cache in float32 and who reads what of it, as `tafkir_paged_attention` has them.

    An attention state whose `pages` is one of these attends to nothing else.

    Attributes:
        keys, values: addresses of each layer's blocks.
        tables_RT: int64, the blocks of each row.
        rows_N, positions_N: int64, of each token.
    """

    keys: ctypes.Array[ctypes.c_void_p]
    values: ctypes.Array[ctypes.c_void_p]
    tables_RT: Tensor
    rows_N: Tensor
    positions_N: Tensor


class FewTokens:
    """Runs the layers of a packed decoder.

    Where `native.rows_alone` holds, a token's numbers do not depend on the others in the batch.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._config = decoder, decoder.config
        self._kept: list[object] = []
        self._norm = decoder.norm.weight.detach().float().contiguous()
        self._formats: set[str] = set()
        self._layers = self.structs_of_layers(list(decoder.layers))
        self._num_sparse = sum(layer.experts > 0 for layer in self._layers)
        config = decoder.config
        self._rope: tuple[Tensor, Tensor] | None = None
        if config.max_position_embeddings <= _KEPT_POSITIONS:
            self._rope = self._rope_table(torch.arange(config.max_position_embeddings))

    @staticmethod
    def takes(decoder: Decoder, layers: Sequence[nn.Module] | None = None) -> bool:
        """Whether the kernels are in use and know all that the decoder, or these layers of it, are made of."""
        return (
            native.kernels_in_use() == "native"
            and decoder.norm.weight.device.type == "cpu"
            and type(decoder.residual) is PlainResidual
            and all(_is_plain(layer) for layer in (decoder.layers if layers is None else layers))
        )

    def structs_of_layers(self, layers: Sequence[nn.Module]) -> ctypes.Array[_LayerStruct]:
        """The kernels' view of layers; valid while this object lives."""
        return (_LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))

    def takes_rows(self, num_tokens: int) -> bool:
        """Whether so many tokens should go this way; a BLAS is faster for many, but for the processor's matrix unit."""
        if num_tokens <= FEW_ROWS or native.rows_are_alone():
            return num_tokens > 0
        if not self._num_sparse and goes_in_bfloat16(num_tokens, self._formats):
            return False
        return "float32" not in self._formats and native.has_tiles()

    def __call__(self, ids_N: Tensor, positions_N: Tensor, attention: AttentionState) -> DecoderOutput:
        """As `Decoder.forward`; the routings' weights, scores and logits are empty, and so is the load."""
        config, num_tokens = self._config, len(ids_N)
        x_ND = self._decoder.embed_tokens(ids_N)
        cos_NJ, sin_NJ = self._rope_at(positions_N)
        dim, kv_heads = config.head_dim, config.num_key_value_heads
        pages: Pages | None = getattr(attention, "pages", None)
        if pages is not None:
            return self._run_whole(x_ND, cos_NJ, sin_NJ, pages)
        q_NHK = torch.empty(num_tokens, config.num_attention_heads, dim)
        k_NGK, v_NGK = torch.empty(num_tokens, kv_heads, dim), torch.empty(num_tokens, kv_heads, dim)
        routings, nothing = [], torch.empty(0)
        for i, layer in enumerate(self._layers):
            address = ctypes.addressof(layer)
            native.call("tafkir_decode_qkv", address, x_ND, num_tokens, cos_NJ, sin_NJ, q_NHK, k_NGK, v_NGK)
            attended_NHK = attention.attend(i, q_NHK, k_NGK, v_NGK)
            expert_ids_NA = None
            if layer.experts:
                expert_ids_NA = torch.empty(num_tokens, layer.active, dtype=torch.int64)
                routings.append(Routing(expert_ids_NA, nothing, nothing, nothing))
            native.call("tafkir_decode_mlp", address, attended_NHK.contiguous(), num_tokens, x_ND, expert_ids_NA)
        return DecoderOutput(self._normed(x_ND), x_ND, routings, [])

    def _run_whole(self, x_ND: Tensor, cos_NJ: Tensor, sin_NJ: Tensor, pages: Pages) -> DecoderOutput:
        """All layers in one call."""
        num_tokens, ids_LNA, nothing = len(x_ND), None, torch.empty(0)
        if self._num_sparse:
            shape = (self._num_sparse, num_tokens, self._config.num_experts_per_tok)
            ids_LNA = torch.empty(shape, dtype=torch.int64)
        native.call(
            "tafkir_decode_layers", ctypes.addressof(self._layers), len(self._layers), x_ND, num_tokens, cos_NJ, sin_NJ,
            ctypes.addressof(pages.keys), ctypes.addressof(pages.values), pages.tables_RT, pages.rows_N,
            pages.positions_N, pages.tables_RT.shape[1], ids_LNA,
        )  # fmt: skip
        routings = [Routing(ids_NA, nothing, nothing, nothing) for ids_NA in (() if ids_LNA is None else ids_LNA)]
        return DecoderOutput(self._normed(x_ND), x_ND, routings, [])

    def _normed(self, x_ND: Tensor) -> Tensor:
        """The last norm, as `ops.norm` has it, past autograd."""
        out_ND, rstd_N = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND))
        native.call("tafkir_rms_norm", x_ND, self._norm, self._config.rms_norm_eps, *x_ND.shape, out_ND, rstd_N)
        return out_ND

    def _rope_table(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(positions_N, self._config.rotary_size, self._config.rope_theta, self._config.rope_scaling)

    def _rope_at(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        if self._rope is None:
            return self._rope_table(positions_N)
        return self._rope[0].index_select(0, positions_N), self._rope[1].index_select(0, positions_N)

    def _layer(self, layer: nn.Module) -> _LayerStruct:
        assert isinstance(layer, DecoderLayer) and isinstance(layer.attention, Attention)
        config, attention, mlp = self._config, layer.attention, layer.mlp
        struct = _LayerStruct(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            half=config.rotary_size // 2,
            eps=config.rms_norm_eps,
            attention_norm=self._address(layer.input_layernorm.weight),
            mlp_norm=self._address(layer.post_attention_layernorm.weight),
            q_norm=self._address(attention.q_norm.weight if attention.q_norm is not None else None),
            k_norm=self._address(attention.k_norm.weight if attention.k_norm is not None else None),
            qkv_bias=self._address(attention.qkv_proj.bias),
            out_bias=self._address(attention.o_proj.bias),
        )
        struct.qkv, struct.qkv_parts = self._matrices(_parts(attention.qkv_proj))
        struct.out, _ = self._matrices(_parts(attention.o_proj))
        dense = mlp if isinstance(mlp, SwiGLU) else mlp.shared_experts
        if dense is not None:
            struct.wide, struct.wide_parts = self._matrices(_parts(dense.gate_up_proj))
            struct.down, _ = self._matrices(_parts(dense.down_proj))
        if isinstance(mlp, MoE):
            self._fill_experts(struct, mlp)
        return struct

    def _fill_experts(self, struct: _LayerStruct, mlp: MoE) -> None:
        config, experts = self._config, mlp.get_submodule("experts")
        assert isinstance(experts, PackedExperts)
        struct.width, struct.experts = config.moe_intermediate_size, config.num_experts
        struct.active, struct.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        struct.groups, struct.open_groups = config.n_group, config.topk_group
        struct.sigmoid, struct.normalise = config.score_function == "sigmoid", config.norm_topk_prob
        formats = set(self._formats)
        struct.router, _ = self._matrices([PackedMatrix("float32", mlp.router.weight.detach().float())])
        self._formats = formats  # a router is small
        struct.router_bias = self._address(mlp.router.expert_bias)
        struct.expert_parts = len(experts.gate_up[0])
        struct.experts_in, _ = self._matrices([part for parts in experts.gate_up for part in parts])
        struct.experts_out, _ = self._matrices([part for parts in experts.down for part in parts])

    def _address(self, tensor: Tensor | None) -> int | None:
        """Of float32 numbers that stay where they are as long as this object lives."""
        if tensor is None:
            return None
        plain = tensor.detach().float().contiguous()
        self._kept.append(plain)
        return plain.data_ptr()

    def _matrices(self, parts: Sequence[PackedMatrix]) -> tuple[int, int]:
        structs: ctypes.Array[MatrixStruct] = structs_of(parts)
        self._formats |= {part.format for part in parts}
        self._kept += [structs, list(parts)]
        return ctypes.addressof(structs), len(parts)


def _parts(linear: nn.Module) -> tuple[PackedMatrix, ...]:
    assert isinstance(linear, PackedLinear)
    return linear.parts


def _is_plain(layer: nn.Module) -> bool:
    """Grouped-query attention and a packed feed-forward block under plain residuals, without hooks."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.attention, layer.mlp
    if type(attention) is not Attention or not isinstance(mlp, MoE | SwiGLU):
        return False
    dense = mlp if isinstance(mlp, SwiGLU) else mlp.shared_experts
    linears: list[nn.Module] = [attention.o_proj, attention.qkv_proj]
    linears += [dense.down_proj, dense.gate_up_proj] if dense is not None else []
    return (
        all(isinstance(linear, PackedLinear) for linear in linears)
        and all(len(_parts(linear)) == 1 for linear in linears[::2])
        and (isinstance(mlp, SwiGLU) or isinstance(mlp.get_submodule("experts"), PackedExperts))
        and all(type(x) is PlainResidual for x in (layer.attention_residual, layer.mlp_residual))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    )
