"""A decoder whose matrices stay as a checkpoint stores them; norms, biases and activations are float32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tafkir.models.attention import AttentionState
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.models.experts import Experts
from tafkir.models.few_tokens import FewTokens
from tafkir.models.layers import Embedding, Linear
from tafkir.models.packed_layers import PackedEmbedding, PackedExperts, PackedLinear
from tafkir.ops.packed import MatrixStruct, PackedMatrix, packed_linear, packed_values, structs_of

__all__ = ["PackedDecoder"]


class PackedDecoder(Decoder):
    """Built like a `Decoder`; `place` then puts each tensor where it belongs. Its weights cannot be written to.

    Tokens of a decoder with grouped-query attention and plain residuals go through fused kernels (`models.few_tokens`),
    where those are in use: up to `FEW_ROWS` of them, or any number where the processor has a matrix unit.

    Attributes:
        own_head: makes logits in place of what the checkpoint has, which still makes embeddings.
    """

    few: FewTokens | None = None
    own_head: PackedMatrix | None = None
    _head: tuple[tuple[PackedMatrix, ...], ctypes.Array[MatrixStruct]] | None = None

    def place(self, name: str, tensor: Tensor | list[tuple[PackedMatrix, ...]]) -> None:
        """Args:
        name: a name of the decoder's state dict.
        tensor: the tensor itself, or the parts of a matrix; of stacked experts, those of each.
        """
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        if isinstance(tensor, Tensor):
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            return
        above, _, own = path.rpartition(".")
        new: nn.Module = module
        if isinstance(module, Experts):
            new = PackedExperts()
        elif isinstance(module, Embedding):
            new = PackedEmbedding(*tensor[0])
        elif isinstance(module, Linear):
            new = PackedLinear(tensor[0], module.bias)
        if isinstance(new, PackedExperts):
            setattr(new, leaf.removesuffix("_proj"), tensor)
        setattr(self.get_submodule(above), own, new)

    def forward(
        self,
        input_ids_N: Tensor,
        positions_N: Tensor,
        attention: AttentionState,
        replayed_expert_ids: Sequence[Tensor] | None = None,
    ) -> DecoderOutput:
        """As a decoder's; of few tokens, routings tell the experts alone, and there is no load."""
        if replayed_expert_ids is None and len(input_ids_N):
            if self.few is None and FewTokens.takes(self):
                self.few = FewTokens(self)
            if self.few is not None and self.few.takes_rows(len(input_ids_N)):
                return self.few(input_ids_N, positions_N, attention)
        return super().forward(input_ids_N, positions_N, attention, replayed_expert_ids)

    @property
    def head_parts(self) -> tuple[PackedMatrix, ...]:
        """The matrix that makes logits."""
        if self.own_head is not None:
            return (self.own_head,)
        head = getattr(self, "lm_head", None)
        if isinstance(head, PackedLinear):
            return head.parts
        embedding = self.get_submodule("embed_tokens")
        assert isinstance(embedding, PackedEmbedding)
        return (embedding.table,)

    @property
    def head_weight(self) -> Tensor:
        return torch.cat([packed_values(part) for part in self.head_parts])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        if self._head is None:
            parts = self.head_parts
            self._head = parts, structs_of(parts)
        return packed_linear(hidden_ND, *self._head)
