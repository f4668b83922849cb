"""Arithmetic that takes every row of a batch alone, so that a row's numbers do not depend on the others.

A BLAS picks its kernel, and with it the order of a sum, by the number of rows. Inside `batch_invariant` products of
rows and weights are sums in one fixed order (`tafkir_row_linear`), or one call a row where that kernel is not built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tafkir.ops import native

__all__ = ["batch_invariant", "row_linear"]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` a row at a time; sums in float32 whatever the dtype.

    Args:
        x: [..., inner].
        weight: [outer, inner].
        bias: [outer].
    """
    rows = x.reshape(-1, x.shape[-1])
    if native.takes(rows, weight, dtypes=_NATIVE_DTYPES):
        out = rows.new_empty(len(rows), len(weight), dtype=torch.float32)
        is_bfloat16, sizes = int(weight.dtype == torch.bfloat16), (*rows.shape, len(weight))
        native.call("tafkir_row_linear", rows.float().contiguous(), weight.contiguous(), is_bfloat16, *sizes, out)
        out = out.to(x.dtype)
    else:
        # Clones, because the last bit may depend on where in memory a row begins, too.
        out = torch.cat([F.linear(row.clone(), weight) for row in rows.split(1)]) if len(rows) else rows @ weight.t()
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _mm(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    found = row_linear(x, y.t())
    return found if out is None else out.copy_(found)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return row_linear(x, y.t()) if y.dim() == 2 else torch.matmul(x, y)


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([torch.bmm(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    """One call for each place along the output's first dim."""
    inputs, output = equation.split("->")
    dims = [letters.find(output[0]) for letters in inputs.split(",")]
    parts: Sequence[Sequence[Tensor]] = [
        [operand] if dim < 0 else operand.split(1, dim) for dim, operand in zip(dims, operands, strict=True)
    ]
    count = max(map(len, parts))
    return torch.cat([torch.einsum(equation, *(p[i if len(p) > 1 else 0] for p in parts)) for i in range(count)])


# Of an elementwise function torch computes whole vectors and what is left over in two ways, of which the last bit may
# differ, and threads cut the numbers anywhere: rows of whole vectors, few enough for one thread, are all alike.
_VECTOR, _PIECE = 64, 1 << 14


def _elementwise(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def alone(x: Tensor, **options: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1)
        padded = F.pad(rows, (0, -rows.shape[1] % _VECTOR))
        pieces = padded.split(max(1, _PIECE // max(1, padded.shape[1])))
        return torch.cat([func(piece, **options) for piece in pieces])[:, : rows.shape[1]].reshape(x.shape)

    return alone


def _exp_(x: Tensor) -> Tensor:
    return x.copy_(_elementwise(torch.exp)(x))


_INSTEAD: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: row_linear,
    torch.mm: _mm,
    torch.bmm: _bmm,
    torch.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.einsum: _einsum,
    F.silu: _elementwise(F.silu),
    torch.Tensor.exp_: _exp_,
    **{
        function: _elementwise(getattr(torch, name))
        for name in ("sigmoid", "exp", "log", "cos", "sin", "tanh")
        for function in (getattr(torch, name), getattr(torch.Tensor, name))
    },
}


class _RowByRow(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        instead: Callable[..., Any] = _INSTEAD.get(func, func)
        return instead(*args, **(kwargs or {}))


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it, on this thread, rows are computed alone; fused kernels that share them are not used."""
    with native.rows_alone(), _RowByRow():
        yield
