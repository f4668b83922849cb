"""A loaded decoder as a device serves it: matrices in NVFP4 where they are stored so, bfloat16 otherwise.

Shapes: N tokens, D hidden, A active experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tafkir.errors import BackendUnavailable
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.models.layers import Embedding, Linear
from tafkir.models.packed import PackedDecoder
from tafkir.models.packed_layers import PackedEmbedding, PackedExperts, PackedLinear
from tafkir.models.router import Router
from tafkir.ops.device import device_kernels
from tafkir.ops.moe import moe_experts
from tafkir.ops.nvfp4_rows import Nvfp4Rows, nvfp4_rows, stacked_rows
from tafkir.ops.nvfp4_scaled import ScaledWeight, require_scaled_products, scaled_linear, scaled_weight
from tafkir.ops.packed import PackedMatrix, packed_values

__all__ = ["Nvfp4Experts", "Nvfp4Linear", "has_static_steps", "move_to_device"]


class _Coded(nn.Module):
    """Holds NVFP4 matrices as buffers, so that they move with the module."""

    def _keep(self, name: str, weight: Nvfp4Rows | ScaledWeight) -> None:
        for part, tensor in weight._asdict().items():
            self.register_buffer(f"{name}_{part}", tensor)

    def _kept(self, name: str) -> Nvfp4Rows:
        return Nvfp4Rows(*(self.get_buffer(f"{name}_{part}") for part in Nvfp4Rows._fields))


class Nvfp4Linear(_Coded):
    """x W^T with W in NVFP4: decoded on the way, or, `scaled`, multiplied in four bits with rounded activations."""

    def __init__(self, weight: Nvfp4Rows, bias: Tensor | None = None, *, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        self.bias: Tensor | None
        self._keep("weight", scaled_weight(weight) if scaled else weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        from tafkir.ops.triton.packed_linear import nvfp4_linear

        x_NK, weight = x.reshape(-1, x.shape[-1]), self._kept("weight")
        out = scaled_linear(x_NK, ScaledWeight(*weight)) if self.scaled else nvfp4_linear(x_NK, weight)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class Nvfp4Experts(_Coded):
    """`Experts` with stacked matrices in NVFP4."""

    def __init__(self, gate_up: Nvfp4Rows, down: Nvfp4Rows) -> None:
        super().__init__()
        self._keep("gate_up", gate_up)
        self._keep("down", down)

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        from tafkir.ops.triton import experts

        return experts.moe_experts(x_ND, self._kept("gate_up"), self._kept("down"), expert_ids_NA, weights_NA)


@torch.no_grad()
def move_to_device(
    decoder: Decoder,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Literal["triton", "torch"] | None = None,
    scaled_products: bool = False,
) -> Decoder:
    """A decoder of the same weights that is ready to serve on a device; the one given should not be used any more.

    With Triton's kernels, matrices in NVFP4 keep their codes, and experts are one grouped product. All others, and the
    output head, become `dtype`; so do activations. Routers keep their own dtype.

    Args:
        decoder: a `Decoder` or a `PackedDecoder`, on the CPU.
        kernels: None takes `device_kernels(device)`.
        scaled_products: multiply NVFP4 by NVFP4 where shapes allow it: activations are rounded as well.

    Raises:
        BackendUnavailable: the device lacks what is asked for, no matrix is stored for it, or the decoder has an INT8
            copy of its head.
    """
    if scaled_products:
        require_scaled_products(device)
    if isinstance(decoder, PackedDecoder) and decoder.own_head is not None:
        raise BackendUnavailable(
            "an INT8 copy of the output head is for the processor's kernels", where=str(device), fix="--weights stored"
        )
    use = kernels or device_kernels(device)
    mover = _Mover(device, dtype, use == "triton", scaled_products)
    with torch.device("meta"):
        moved = Decoder(decoder.config)
    for path, module in decoder.named_modules():
        new = mover.replaced(module, is_head=path == "lm_head")
        if new is not None:
            moved.set_submodule(path, new)
    for path, module in decoder.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding | PackedExperts):
            continue
        own, place = (None if isinstance(module, Router) else dtype), moved.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            place._parameters[name] = nn.Parameter(parameter.to(device, own), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            place._buffers[name] = buffer.to(device)
    if use == "triton":
        from tafkir.ops.triton import experts

        for module in moved.modules():
            if isinstance(module, Experts):
                module.kernel = experts.moe_experts
    if scaled_products and not any(isinstance(module, Nvfp4Linear) and module.scaled for module in moved.modules()):
        raise BackendUnavailable(
            "no matrix of this checkpoint can be multiplied in four bits", where="--four-bit-products",
            expected="matrices in NVFP4 and the triton package", fix="leave it out",
        )  # fmt: skip
    return moved


def has_static_steps(decoder: Decoder) -> bool:
    """Whether what a step launches follows from the number of its tokens alone, so that it can be captured: experts
    are one grouped product, and no matrix is decoded as a whole."""
    return not any(
        isinstance(module, PackedLinear | PackedExperts)
        or (isinstance(module, Experts) and module.kernel is moe_experts)
        for module in decoder.modules()
    )


class _Mover:
    def __init__(self, device: torch.device, dtype: torch.dtype, coded: bool, scaled: bool) -> None:
        self._device, self._dtype, self._coded, self._scaled = device, dtype, coded, scaled

    def replaced(self, module: nn.Module, *, is_head: bool) -> nn.Module | None:
        """What stands on the device in a packed module's place; None for others."""
        if isinstance(module, PackedEmbedding):
            return self._plain(Embedding, (module.table,))
        if isinstance(module, PackedExperts):
            return self._experts(module)
        if not isinstance(module, PackedLinear):
            return None
        bias = None if module.bias is None else module.bias.to(self._device, self._dtype)
        if is_head or not self._keeps_codes(module.parts):
            linear = self._plain(Linear, module.parts)
            linear._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
            return linear
        rows = self._rows(module.parts)
        fits = len(rows.codes) % 16 == 0 and rows.codes.shape[1] % 16 == 0
        return Nvfp4Linear(rows, bias, scaled=self._scaled and fits)

    def _experts(self, module: PackedExperts) -> nn.Module:
        if all(self._keeps_codes(parts) for parts in (*module.gate_up, *module.down)):
            stacks = (stacked_rows([self._rows(parts) for parts in each]) for each in (module.gate_up, module.down))
            return Nvfp4Experts(*stacks)
        experts = Experts.__new__(Experts)
        nn.Module.__init__(experts)
        for name, each in (("gate_up_proj", module.gate_up), ("down_proj", module.down)):
            stack = torch.stack([self._values(parts) for parts in each])
            experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))
        return experts

    def _keeps_codes(self, parts: Sequence[PackedMatrix]) -> bool:
        return self._coded and all(part.format.startswith("nvfp4") for part in parts)

    def _rows(self, parts: Sequence[PackedMatrix]) -> Nvfp4Rows:
        return Nvfp4Rows(*(tensor.to(self._device) for tensor in nvfp4_rows(parts)))

    def _values(self, parts: Sequence[PackedMatrix]) -> Tensor:
        return torch.cat([packed_values(part).to(self._device, self._dtype) for part in parts])

    def _plain(self, kind: type[Linear] | type[Embedding], parts: Sequence[PackedMatrix]) -> Linear | Embedding:
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.weight = nn.Parameter(self._values(parts), requires_grad=False)
        return module
