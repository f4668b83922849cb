"""Every fast op against its slow reference: values and gradients, on shapes that hypothesis picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tafkir.ops import attention, loss, moe, norm, qkv, rope, routing

pytestmark = pytest.mark.usefixtures("kernels")

quick = settings(max_examples=20, deadline=None)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same(fast: Callable[..., object], slow: Callable[..., object], inputs: Sequence[Tensor], tol: float = 2e-5) -> None:
    """Values and the gradients of a random projection agree, relative to their size."""
    results = []
    for function in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        total = sum((out * normal(99 + i, *out.shape)).sum() for i, out in enumerate(outs))
        grads = torch.autograd.grad(total, leaves)
        results.append(([out.detach() for out in outs], grads))
    for ours, theirs in zip(*(list(values) + list(grads) for values, grads in results), strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tol)


sizes = st.integers(1, 9)
seeds = st.integers(0, 10_000)


@quick
@given(rows=sizes, width=st.integers(1, 40), seed=seeds, scale=st.sampled_from([1e-4, 1.0, 30.0]))
def test_rms_norm(rows: int, width: int, seed: int, scale: float) -> None:
    x, weight = normal(seed, rows, width, scale=scale), normal(seed + 1, width)
    same(lambda a, w: norm.rms_norm(a, w, 1e-6), lambda a, w: norm.rms_norm_reference(a, w, 1e-6), [x, weight], 1e-4)


def test_rms_norm_equals_torch() -> None:
    x, weight = normal(0, 7, 33), normal(1, 33)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))


@quick
@given(shape=st.tuples(sizes, sizes), width=sizes, seed=seeds)
def test_swiglu(shape: tuple[int, int], width: int, seed: int) -> None:
    same(moe.swiglu, moe.swiglu_reference, [normal(seed, *shape, 2 * width, scale=3.0)])


@quick
@given(
    tokens=sizes, groups=st.integers(1, 3), repeats=st.integers(1, 3), half=st.integers(1, 4), rest=sizes, seed=seeds
)
@pytest.mark.parametrize("with_norm", [True, False])
def test_split_norm_rope(
    with_norm: bool, tokens: int, groups: int, repeats: int, half: int, rest: int, seed: int
) -> None:
    head_dim = 2 * half + rest - 1
    cos, sin = rope.rope_table(torch.arange(tokens) + seed % 50, 2 * half, 100.0)
    inputs = [normal(seed, tokens, groups * repeats + 2 * groups, head_dim)]
    inputs += [normal(seed + i, head_dim) for i in (1, 2)] if with_norm else []

    def call(function: Callable[..., qkv.Heads]) -> Callable[..., qkv.Heads]:
        return lambda x, q=None, k=None: function(x, groups * repeats, q, k, 1e-6, cos, sin)

    same(call(qkv.split_norm_rope), call(qkv.split_norm_rope_reference), inputs, 1e-4)


def test_rope_is_a_rotation_by_the_difference_of_positions() -> None:
    """The product of a rotated query and key depends on their distance alone (arXiv 2104.09864, equation 14)."""
    q, k = normal(0, 1, 1, 8), normal(1, 1, 1, 8)

    def product(m: int, n: int) -> float:
        turned = [
            rope.apply_rope_reference(x, *rope.rope_table(torch.tensor([p]), 8, 1e4)) for x, p in ((q, m), (k, n))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(3, 1) == pytest.approx(product(40, 38), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_rope_passes_the_rest_of_the_head_through() -> None:
    x = normal(0, 5, 2, 12)
    out = rope.apply_rope_reference(x, *rope.rope_table(torch.arange(5), 4, 1e4))
    assert torch.equal(out[..., 4:], x[..., 4:])
    torch.testing.assert_close(out[0], x[0])


@quick
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    head_dim=sizes,
    seed=seeds,
    padded=st.booleans(),
)
def test_varlen_attention(
    lengths: list[int], groups: int, repeats: int, head_dim: int, seed: int, padded: bool
) -> None:
    total = sum(lengths)
    layout = attention.VarlenLayout.build([0, *accumulate(lengths)])
    shapes = ((total, groups * repeats, head_dim), (total, groups, head_dim), (total, groups, head_dim))
    inputs = [normal(seed + i, *shape) for i, shape in enumerate(shapes)]
    fast = attention._padded_attention if padded else attention.varlen_attention
    same(lambda *x: fast(*x, layout), lambda *x: attention.varlen_attention_reference(*x, layout), inputs)


def test_varlen_attention_takes_views_and_long_documents() -> None:
    heads = normal(0, attention.MAX_SHORT_LENGTH + 30, 8, 4)
    layout = attention.VarlenLayout.build([0, 20, len(heads)])
    q, k, v = heads.split((4, 2, 2), dim=1)
    expected = attention.varlen_attention_reference(q, k, v, layout)
    torch.testing.assert_close(attention.varlen_attention(q, k, v, layout), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 3, 3], [0, 5, 2], []])
def test_layout_refuses_bad_boundaries(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention.VarlenLayout.build(bounds)


@quick
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_buckets_hold_every_token_once_and_waste_little(lengths: list[int]) -> None:
    layout = attention.VarlenLayout.build(torch.tensor([0, *accumulate(lengths)]))
    tokens = torch.cat([bucket.tokens for bucket in layout.buckets])
    assert tokens.sort().values.tolist() == list(range(sum(lengths)))
    assert sum(bucket.num_docs for bucket in layout.buckets) == len(lengths)
    for bucket in layout.buckets:
        slots = bucket.num_docs * bucket.max_len
        assert bucket.num_docs == 1 or len(bucket.tokens) >= 0.8 * slots
        assert torch.equal(bucket.rows_BT[bucket.slots], bucket.tokens)


def expert_inputs(tokens: int, experts: int, active: int, hidden: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(active, dim=-1)
    shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
    return [*(normal(seed + i, *shape) for i, shape in enumerate(shapes)), weights, ids]


@quick
@given(tokens=sizes, experts=sizes, data=st.data(), hidden=sizes, width=sizes, seed=seeds)
def test_moe_experts(tokens: int, experts: int, data: st.DataObject, hidden: int, width: int, seed: int) -> None:
    active = data.draw(st.integers(1, experts))
    *inputs, ids = expert_inputs(tokens, experts, active, hidden, width, seed)
    same(
        lambda x, up, down, w: moe.moe_experts(x, up, down, ids, w),
        lambda x, up, down, w: moe.moe_experts_reference(x, up, down, ids, w),
        inputs,
    )


def test_experts_without_a_token_get_a_zero_gradient() -> None:
    x, up, down, weights, _ = expert_inputs(3, 4, 1, 5, 2, seed=0)
    up.requires_grad_()
    moe.moe_experts(x, up, down, torch.tensor([[2], [2], [0]]), weights).sum().backward()
    assert up.grad is not None
    assert [bool((up.grad[e] != 0).any()) for e in range(4)] == [True, False, True, False]


def test_a_token_does_not_depend_on_its_batch() -> None:
    x, up, down, weights, ids = expert_inputs(200, 8, 2, 64, 32, seed=3)
    batch = moe.moe_experts(x, up, down, ids, weights)
    for i in (0, 77, 199):
        alone = moe.moe_experts(x[i : i + 1], up, down, ids[i : i + 1], weights[i : i + 1])
        torch.testing.assert_close(alone[0] / 1e3, batch[i] / 1e3, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_experts_stay_near(dtype: torch.dtype) -> None:
    x, up, down, weights, ids = expert_inputs(20, 4, 2, 16, 8, seed=1)
    expected = moe.moe_experts_reference(x, up, down, ids, weights)
    got = moe.moe_experts(x.to(dtype), up.to(dtype), down.to(dtype), ids, weights)
    assert got.dtype == dtype
    assert float((got.float() - expected).norm() / expected.norm()) < 0.02


@quick
@given(tokens=st.integers(1, 300), vocab=st.integers(2, 50), seed=seeds, temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_linear_logprobs(tokens: int, vocab: int, seed: int, temperature: float) -> None:
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    same(
        lambda h, w: loss.linear_logprobs(h, w, targets, temperature),
        lambda h, w: loss.linear_logprobs_reference(h, w, targets, temperature),
        [normal(seed, tokens, 6), normal(seed + 1, vocab, 6)],
        1e-4,
    )


@quick
@given(tokens=st.integers(1, 300), vocab=st.integers(2, 50), seed=seeds, share=st.floats(0, 1))
def test_next_token_loss(tokens: int, vocab: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < share] = loss.IGNORE_INDEX
    same(
        lambda h, w: loss.next_token_loss(h, w, labels),
        lambda h, w: loss.next_token_loss_reference(h, w, labels),
        [normal(seed, tokens, 6), normal(seed + 1, vocab, 6)],
        1e-4,
    )


def test_no_label_is_a_zero_loss_with_zero_gradients() -> None:
    hidden, head = normal(0, 5, 4).requires_grad_(), normal(1, 9, 4).requires_grad_()
    value = loss.next_token_loss(hidden, head, torch.full((5,), loss.IGNORE_INDEX))
    value.backward()
    assert value.item() == 0
    assert hidden.grad is not None and head.grad is not None
    assert not hidden.grad.any() and not head.grad.any()


def test_the_sum_over_pieces_is_the_whole() -> None:
    """Loss and gradient do not depend on how a batch is cut."""
    hidden, head = normal(0, 300, 16), normal(1, 40, 16)
    labels = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(2))
    results = []
    for cuts in ((300,), (1, 2, 150, 147)):
        leaf = head.clone().requires_grad_()
        total = sum(
            loss.next_token_loss(h, leaf, y) for h, y in zip(hidden.split(cuts), labels.split(cuts), strict=True)
        )
        total = total / 300
        total.backward()
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_token_logprobs_of_huge_logits_are_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    expected = torch.tensor([-2e4, -torch.log(torch.tensor(3.0))])
    torch.testing.assert_close(loss.token_logprobs(logits, torch.tensor([2, 0])), expected)


@quick
@given(tokens=sizes, groups=st.integers(1, 4), size=st.integers(1, 5), data=st.data(), seed=seeds)
def test_choose_experts(tokens: int, groups: int, size: int, data: st.DataObject, seed: int) -> None:
    open_groups = data.draw(st.integers(1, groups))
    active = data.draw(st.integers(1, open_groups * size))
    scores = normal(seed, tokens, groups * size)
    bias = data.draw(st.sampled_from([None, normal(seed + 1, groups * size)]))
    sizes_ = (groups, open_groups, active)
    expected = routing.choose_experts_reference(scores, bias, *sizes_)
    assert torch.equal(routing.choose_experts(scores, bias, *sizes_), expected)
