"""The Triton kernels of serving against torch, on the CPU through Triton's interpreter: NVFP4, experts, attention."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.ops.moe import moe_experts_reference
from tafkir.ops.nvfp4 import E2M1_VALUES, quantize_nvfp4
from tafkir.ops.nvfp4_rows import Nvfp4Rows, nvfp4_rows, rows_values, stacked_rows
from tafkir.ops.packed import PackedMatrix, packed_values_reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed here"
)

# Of a bfloat16 result (the interpreter cuts it off where a device rounds), and of float32 sums in another order.
ROUNDED = {torch.bfloat16: 2.0**-7, torch.float32: 2e-6}


@pytest.fixture(scope="module")
def kernel() -> Iterator[Callable[[str, str], Any]]:
    """A function of one of the kernels' modules, imported with the interpreter on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda module, name: getattr(importlib.import_module(f"tafkir.ops.triton.{module}"), name)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """`expected` is float64; errors count against the largest number of a row, of which sums are made."""
    bound = ROUNDED[found.dtype] * expected.abs() + 4e-6 * expected.abs().amax()
    assert found.isfinite().all()
    assert ((found.double() - expected).abs() <= bound).all()


def coded(seed: int, rows: int, columns: int, *, inverse: bool = False) -> PackedMatrix:
    codes, scale, total = quantize_nvfp4(normal(seed, rows, columns) * (1 + seed))
    if inverse:
        return PackedMatrix("nvfp4_inverse", codes, scale, 1 / float(total))
    return PackedMatrix("nvfp4", codes, scale, float(total))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, (40,), 48), (5, (33, 17, 1), 272), (17, (70,), 1040), (70, (130,), 32)],
)
def test_products_with_codes(kernel: Any, tokens: int, rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    """Edges in every direction, sums that several programs share, matrices under scales of their own."""
    parts = [coded(i, n, columns, inverse=i == 1) for i, n in enumerate(rows)]
    x = normal(9, tokens, columns).to(dtype)
    found = kernel("packed_linear", "nvfp4_linear")(x, nvfp4_rows(parts))
    assert found.dtype == dtype
    assert_rounded(found, x.double() @ torch.cat([packed_values_reference(part) for part in parts]).double().T)


def test_every_byte_under_every_scale(kernel: Any) -> None:
    """All pairs of codes and all finite E4M3 scales: the product with the unit matrix gives their values to the bit."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).unsqueeze(1).repeat(1, 32)
    weight = Nvfp4Rows(codes, scales, torch.ones(127))
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    pairs = torch.stack([signed[codes.long() % 16], signed[codes.long() // 16]], dim=-1).flatten(1)
    expected = pairs * scales[:, :1].view(torch.float8_e4m3fn).float()
    assert torch.equal(kernel("packed_linear", "nvfp4_linear")(torch.eye(512), weight), expected.T)
    assert torch.equal(rows_values(weight), expected)


def test_pairs_are_cut_into_tiles_of_one_expert(kernel: Any) -> None:
    for tokens, experts, active, size in ((1, 4, 2, 16), (7, 5, 3, 2), (50, 3, 1, 16), (33, 64, 8, 4)):
        ids = normal(tokens, tokens, experts).topk(active).indices
        tiles = kernel("experts", "tile_pairs")(ids, experts, size)
        seen = []
        for expert, first, last in zip(*(tensor.tolist() for tensor in tiles[1:]), strict=True):
            pairs = tiles.order_P[first:last]
            assert len(pairs) <= size
            assert (ids.flatten()[pairs] == expert).all()
            seen += pairs.tolist()
        assert sorted(seen) == list(range(tokens * active))


def expert_weights(experts: int, hidden: int, width: int, is_coded: bool) -> tuple[Any, Any, Tensor, Tensor]:
    """Gate_up and down as a kernel takes them, and what they are worth."""
    if not is_coded:
        gate_up, down = normal(1, experts, 2 * width, hidden), normal(2, experts, hidden, width)
        return gate_up, down, gate_up, down
    gate_up_rows = [nvfp4_rows([coded(i, width, hidden), coded(i + 1, width, hidden)]) for i in range(experts)]
    down_rows = [nvfp4_rows([coded(i, hidden, width, inverse=True)]) for i in range(experts)]
    stacks = stacked_rows(gate_up_rows), stacked_rows(down_rows)
    return *stacks, rows_values(stacks[0]), rows_values(stacks[1])


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts(kernel: Any, tokens: int, is_coded: bool) -> None:
    """One token, few, and more than a tile an expert; one expert gets none."""
    hidden, width, experts, active = 48, 80, 5, 2
    gate_up, down, *values = expert_weights(experts, hidden, width, is_coded)
    scores = normal(3, tokens, experts)
    scores[:, 2] = -9
    share, ids = scores.softmax(-1).topk(active)
    x = normal(4, tokens, hidden)
    found = kernel("experts", "moe_experts")(x, gate_up, down, ids, share)
    expected = moe_experts_reference(*(tensor.double() for tensor in (x, *values)), ids, share.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    if not is_coded:
        half = [tensor.bfloat16() for tensor in (x, *values)]
        found = kernel("experts", "moe_experts")(*half, ids, share)
        expected = moe_experts_reference(*(tensor.double() for tensor in half), ids, share.double())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2.0**-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), [(6, 2, 24, torch.float32), (4, 4, 16, torch.bfloat16)])
def test_attention_over_blocks(kernel: Any, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Rows of one token, of whole blocks, of several splits; beyond a row's last token is nothing but NaN."""
    size, positions = 16, torch.tensor([0, 15, 64, 555])
    tables = torch.randperm(4 * 36, generator=torch.Generator().manual_seed(0)).view(4, 36)
    pools = [torch.full((4 * 36 * size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
    q = normal(1, 4, heads, dim).to(dtype)
    expected = []
    for row, last in enumerate(positions.tolist()):
        places = torch.arange(last + 1)
        slots = tables[row, places // size] * size + places % size
        for i, pool in enumerate(pools):
            pool[slots] = normal(10 * row + i, last + 1, kv_heads, dim).to(dtype)
        k, v = (pool[slots].transpose(0, 1).double() for pool in pools)
        q_H1K = q[row].unsqueeze(1).double()
        expected.append(F.scaled_dot_product_attention(q_H1K, k, v, enable_gqa=True).squeeze(1))
    found = kernel("paged_attention", "paged_attention")(q, *pools, tables, positions, size)
    assert_rounded(found, torch.stack(expected))
