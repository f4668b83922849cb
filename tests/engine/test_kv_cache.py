"""The cache's two stores: attention over them against plain attention, growth, moves and its limit in bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tafkir.engine.kv_cache import KVCache, KVDecodeView, KVPrefillView
from tafkir.engine.store import bucket
from tafkir.engine.views import Grouping
from tafkir.ops.attention import VarlenLayout, varlen_attention_reference
from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "size"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024)])
def test_buckets(length: int, size: int) -> None:
    assert bucket(length) == size


@pytest.mark.parametrize(
    "prompt_of",
    [[0, 0, 0, 1, 1, 1], [0, 1, 2], [2, 0, 1, 0], [1, 1, 0, 1, 2, 1], [0]],
    ids=["regular groups", "one each", "out of order", "uneven", "alone"],
)
def test_decoding_equals_attention_over_prompt_and_own_tokens(prompt_of: list[int]) -> None:
    """Step by step, each sequence's newest token sees its prompt, its own tokens, and nothing of its neighbours."""
    lengths = [5, 1, 9][: max(prompt_of) + 1]
    cache = KVCache(CONFIG, torch.empty(0))
    cache.reserve_prompts(4, max(lengths))
    cache.reserve(8, 1)
    total = sum(lengths)
    qkv = [random(total, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2))]
    view = KVPrefillView(cache, list(range(len(lengths))), lengths, torch.device("cpu"))
    layout = VarlenLayout.build([0, *torch.tensor(lengths).cumsum(0).tolist()])
    for layer in range(2):
        got = view.attend(layer, *qkv)
        torch.testing.assert_close(got, varlen_attention_reference(*qkv, layout), atol=1e-5, rtol=1e-5)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    batch = len(prompt_of)
    grouping = Grouping.build(torch.tensor(prompt_of), torch.tensor(lengths), 2, torch.float32)
    assert grouping.regular == (prompt_of in ([0, 0, 0, 1, 1, 1], [0, 1, 2], [0]))
    own_k: list[Tensor] = []
    own_v: list[Tensor] = []
    for step in range(40):  # past the first bucket, so that the cache grows on the way
        cache.reserve(8, step + 1)
        q, k, v = (random(batch, heads, 8, seed=100 * step + i) for i, heads in enumerate((6, 2, 2)))
        own_k.append(k)
        own_v.append(v)
        decode = KVDecodeView(cache, grouping, torch.full((batch,), step), step + 1)
        got = decode.attend(1, q, k, v)
        assert got.shape == (batch, 6, 8)
        for row, prompt in enumerate(prompt_of):
            where = slice(starts[prompt], starts[prompt + 1])
            keys = torch.cat([qkv[1][where], torch.stack([k[row] for k in own_k])])
            values = torch.cat([qkv[2][where], torch.stack([v[row] for v in own_v])])
            for head in range(6):
                weights = (keys[:, head // 3] @ q[row, head] * 8**-0.5).softmax(0)
                torch.testing.assert_close(got[row, head], weights @ values[:, head // 3], atol=1e-5, rtol=1e-5)


def test_rows_of_different_age_see_their_own_tokens_alone() -> None:
    cache = KVCache(CONFIG, torch.empty(0))
    cache.reserve_prompts(1, 1)
    cache.reserve(2, 8)
    for store in (cache.keys, cache.values, cache.prompt_keys, cache.prompt_values):
        for tensor in store.tensors:
            tensor.fill_(1e4)  # what earlier sequences left behind
    cached = torch.tensor([3, 0])
    grouping = Grouping.build(torch.tensor([0, 0]), torch.tensor([1]), 2, torch.float32)
    for tensor in (*cache.prompt_keys.tensors, *cache.prompt_values.tensors):
        tensor.zero_()
    for tensor in (*cache.keys.tensors, *cache.values.tensors):
        tensor[0, :, :3] = 0
    q, k, v = random(2, 6, 8), torch.zeros(2, 2, 8), torch.ones(2, 2, 8)
    got = KVDecodeView(cache, grouping, cached, 4).attend(0, q, k, v)
    # All keys in sight are zero, so the weights are equal: one new value of 1 among 5 and among 2 places.
    torch.testing.assert_close(got[0], torch.full((6, 8), 1 / 5))
    torch.testing.assert_close(got[1], torch.full((6, 8), 1 / 2))


def test_growing_and_moving_keep_what_is_stored() -> None:
    cache = KVCache(CONFIG, torch.empty(0))
    cache.reserve(2, 10)
    cache.reserve_prompts(2, 10)
    for store in (cache.keys, cache.values, cache.prompt_keys, cache.prompt_values):
        for i, tensor in enumerate(store.tensors):
            tensor.copy_(random(*tensor.shape, seed=i))
    keys, prompts = cache.keys.tensors[1].clone(), cache.prompt_keys.tensors[1].clone()
    cache.reserve(4, 40)
    cache.reserve_prompts(4, 40)
    assert torch.equal(cache.keys.tensors[1][:2, :, :32], keys)
    assert torch.equal(cache.prompt_keys.tensors[1][:2, :, :, :32], prompts)
    cache.move(torch.tensor([1]), torch.tensor([3]), 10)
    cache.move_prompts(torch.tensor([0]), torch.tensor([2]), 10)
    assert torch.equal(cache.keys.tensors[1][3, :, :10], keys[1, :, :10])
    assert torch.equal(cache.prompt_keys.tensors[1][2, :, :, :10], prompts[0, :, :, :10])


def test_bytes_are_counted_as_they_are_held() -> None:
    cache = KVCache(CONFIG, torch.empty(0), max_bytes=200_000)
    assert cache.num_bytes == 0
    expected = cache.bytes_for(2, 40, 3, 33)
    cache.reserve_prompts(2, 40)
    cache.reserve(3, 33)
    stores = (cache.keys, cache.values, cache.prompt_keys, cache.prompt_values)
    held = sum(tensor.numel() * tensor.element_size() for store in stores for tensor in store.tensors)
    assert held == cache.num_bytes == expected
    assert cache.fits(2, 40, 3, 33)
    assert not cache.fits(2, 40, 300, 33)
    cache.clear()
    assert cache.num_bytes == 0
