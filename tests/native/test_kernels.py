"""The compiled kernels' own promises: equal inputs give equal bits, and nothing odd comes from odd numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tafkir.ops import attention, hyper_connections, loss, moe, native, norm, post_norm, qkv, rope, routing, split_heads

N, D, WIDTH, EXPERTS, ACTIVE, HEADS, KV_HEADS, HEAD_DIM = 700, 64, 48, 16, 4, 4, 2, 32


@pytest.fixture(autouse=True)
def native_kernels(native_library: object) -> Iterator[None]:
    threads, before = torch.get_num_threads(), native.kernels_in_use()
    native.select_kernels("native")
    yield
    native.select_kernels(before)
    torch.set_num_threads(threads)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_different(seed: int) -> Tensor:
    return torch.rand(N, EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(ACTIVE).indices


BOUNDS = (0, 3, 130, 131, 500, N)
LAYOUT = attention.VarlenLayout.build(BOUNDS)
COS, SIN = rope.rope_table(torch.arange(N), 16, 1e4)
OPS: dict[str, tuple[Callable[..., object], list[Tensor]]] = {
    "rms_norm": (lambda x, w: norm.rms_norm(x, w, 1e-6), [normal(1, N, D), normal(2, D)]),
    "split_norm_rope": (
        lambda x, q, k: qkv.split_norm_rope(x, HEADS, q, k, 1e-6, COS, SIN),
        [normal(3, N, HEADS + 2 * KV_HEADS, HEAD_DIM), normal(4, HEAD_DIM), normal(5, HEAD_DIM)],
    ),
    "attention": (
        lambda q, k, v: attention.varlen_attention(q, k, v, LAYOUT),
        [normal(6, N, HEADS, HEAD_DIM), normal(7, N, KV_HEADS, HEAD_DIM), normal(8, N, KV_HEADS, HEAD_DIM)],
    ),
    "write_streams": (
        hyper_connections.write_streams,
        [normal(15, N, 4, D), normal(16, N, D), normal(17, N, 4), normal(18, N, 4, 4)],
    ),
    "swiglu": (moe.swiglu, [normal(9, N, 2 * WIDTH)]),
    "swiglu_post_norm": (
        lambda x, a, b: post_norm.swiglu_post_norm(x, a, b, 1e-5),
        [normal(15, N, D), normal(16, 2 * WIDTH, D), normal(17, D, WIDTH)],
    ),
    "swiglu_post_norm_of_columns": (
        lambda x, a, b: post_norm.swiglu_post_norm(x, a, b, 1e-5, 0),
        [normal(18, D, N), normal(19, 2 * WIDTH, D), normal(20, D, WIDTH)],
    ),
    "split_heads": (
        lambda x: split_heads.split_heads(x, HEADS, rope.rope_table(torch.arange(N // 7), HEAD_DIM, 1e4)),
        [normal(21, 7, N // 7, 3 * HEADS * HEAD_DIM)],
    ),
    "moe_experts": (
        lambda x, a, b, w: moe.moe_experts(x, a, b, all_different(10), w),
        [normal(11, N, D), normal(12, EXPERTS, 2 * WIDTH, D), normal(13, EXPERTS, D, WIDTH), normal(14, N, ACTIVE)],
    ),
}


MULTIPLY = {"attention", "moe_experts", "swiglu_post_norm", "swiglu_post_norm_of_columns"}
"""Ops with a matrix product inside."""


def bits(name: str, threads: int) -> list[Tensor]:
    """The op's outputs, and the gradients of its inputs."""
    torch.set_num_threads(threads)
    function, inputs = OPS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, [normal(20 + i, *x.shape) for i, x in enumerate(outs)])
    return [*outs, *grads]


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_equal_bits_again(name: str) -> None:
    for threads in (1, 2, 3):
        expected = bits(name, threads)
        assert any(bool(x.any()) for x in expected)
        for _ in range(3):
            assert all(map(torch.equal, bits(name, threads), expected)), threads


@pytest.mark.parametrize("name", sorted(OPS.keys() - MULTIPLY))
def test_without_a_matrix_product_the_number_of_threads_does_not_matter(name: str) -> None:
    expected = bits(name, 1)
    for threads in (2, 3):
        assert all(map(torch.equal, bits(name, threads), expected)), threads


def test_the_choice_of_experts_does_not_depend_on_threads() -> None:
    scores, bias = normal(30, N, EXPERTS).sigmoid(), normal(31, EXPERTS)
    chosen = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        chosen.append(routing.choose_experts(scores, bias, 4, 2, ACTIVE))
    assert torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_odd_scores_never_choose_an_expert_twice(odd: float, groups: tuple[int, int]) -> None:
    scores = normal(32, 6, EXPERTS)
    scores[1] = odd
    scores[2, 3] = odd
    scores[3, :-2] = odd
    chosen = routing.choose_experts(scores, None, *groups, ACTIVE)
    assert torch.equal(chosen, routing.choose_experts_reference(scores, None, *groups, ACTIVE))
    assert all(len(set(row)) == ACTIVE for row in chosen.tolist())


def test_equal_scores_choose_the_lower_index() -> None:
    chosen = routing.choose_experts(torch.zeros(2, EXPERTS), None, 1, 1, ACTIVE)
    assert chosen.tolist() == [list(range(ACTIVE))] * 2


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"swiglu_post_norm_of_columns", "split_heads"}))
def test_nan_stays_nan(name: str) -> None:
    function, inputs = OPS[name]
    spoilt = inputs[0].clone()
    spoilt.view(N, -1)[5, 0] = float("nan")
    out = function(spoilt, *inputs[1:])
    outs = out if isinstance(out, tuple) else (out,)
    assert any(bool(x[5].isnan().any()) for x in outs)
    assert not any(bool(x[:3].isnan().any()) for x in outs)


def test_the_loss_of_nan_is_nan() -> None:
    hidden, head = normal(33, 5, D), normal(34, 40, D)
    for place in (0, 17):
        spoilt = head.clone()
        spoilt[place] = float("nan")
        assert loss.next_token_loss(hidden, spoilt, torch.arange(5)).isnan()


def test_a_target_or_an_expert_that_is_not_there_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        loss.next_token_loss(normal(33, 2, D), normal(34, 40, D), torch.tensor([1, 40]))
    inputs = OPS["moe_experts"][1]
    for wrong in (-1, EXPERTS):
        ids = all_different(10)
        ids[7, 1] = wrong
        with pytest.raises(IndexError):
            moe.moe_experts(*inputs[:3], ids, inputs[3])


def test_only_plain_float32_on_the_processor_is_taken() -> None:
    class Shard(Tensor):
        pass

    assert native.takes(torch.ones(2))
    assert not native.takes(torch.ones(2), torch.ones(2).bfloat16())
    assert not native.takes(torch.ones(2, device="meta"))
    assert not native.takes(torch.ones(0))
    assert not native.takes(torch.ones(2).as_subclass(Shard))


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (37, 70), (64, 192)])
def test_streams_that_are_written_and_read_at_once_have_the_bits_of_both_in_turn(tokens: int, hidden: int) -> None:
    """With any number of threads forward; backward for each number, since it sums over tokens."""
    inputs = [
        *(normal(40, tokens, 4, hidden), normal(41, tokens, hidden), normal(42, tokens, 4), normal(43, tokens, 4, 4)),
        *(normal(44, 24, 4 * hidden) * 0.1, normal(45, 4), torch.tensor(0.5)),
    ]

    def at_once(*x: Tensor) -> hyper_connections.Reading:
        return hyper_connections.write_and_read(hyper_connections.Write(*x[:4]), *x[4:], 1e-6, 0.0)

    def in_turn(*x: Tensor) -> hyper_connections.Reading:
        return hyper_connections.project_and_read(hyper_connections.write_streams(*x[:4]), *x[4:], 1e-6, 0.0)

    forward = [x.clone() for x in in_turn(*inputs)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = []
        for function in (at_once, in_turn):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = list(function(*leaves))
            assert all(map(torch.equal, out, forward))
            above = [normal(50 + i, *x.shape) for i, x in enumerate(out[:3])]
            found.append(torch.autograd.grad(out[:3], leaves, above))
        assert all(map(torch.equal, *found))
