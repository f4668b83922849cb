"""Latent attention in the engine: absorbed over a cache of latents, it computes what the expanded forward computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.engine.engine import Engine
from tafkir.engine.latent_cache import LatentCache
from tafkir.engine.views import Grouping
from tafkir.errors import CapacityError
from tafkir.models.attention import LatentAttentionState, LatentKeeper, VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tafkir.records import Request, SamplingParams
from tests.models.test_mla import SHAPE, VARIANTS
from tests.models.test_mla import build as build_latent

VOCAB, EOS = 61, 3


def build(**changes: Any) -> Decoder:
    """The same decoders with weights small enough that greedy tokens vary."""
    return build_latent(**{"initializer_range": 0.1, "max_position_embeddings": 128, **changes})


def engine_of(decoder: Decoder, **options: Any) -> Engine:
    return Engine(decoder, **{"eos_ids": (EOS,), "max_batch": 16, **options})


def random_prompts(lengths: list[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(4, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def full_logits(decoder: Decoder, ids: tuple[int, ...] | list[int]) -> Tensor:
    """The expanded path over all tokens at once, nothing cached."""
    output = decoder(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)]))
    return decoder.logits(output.hidden_ND)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.inference_mode()
def test_logits_equal_the_expanded_path(variant: str) -> None:
    """Two prompts, three sequences of them; every step's logits against a full forward over prompt and own tokens."""
    decoder = build(**VARIANTS[variant])
    cache = LatentCache(decoder.config, torch.empty(0))
    prompts, prompt_of = random_prompts([9, 5]), [1, 0, 1]
    own = [list(random_prompts([12 + i])[0][-12:]) for i in range(3)]
    cache.reserve_prompts(2, 9)
    view = cache.prefill_view([0, 1], [9, 5], torch.device("cpu"))
    assert isinstance(view, LatentKeeper)
    assert not isinstance(view, LatentAttentionState)
    ids = torch.tensor([*prompts[0], *prompts[1]])
    got = decoder.logits(decoder(ids, view.positions_N, view).hidden_ND)
    # Both are the expanded path; that of the packed prompts is padded to one length.
    expected = torch.cat([full_logits(decoder, prompt) for prompt in prompts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    grouping = Grouping.build(torch.tensor(prompt_of), torch.tensor([9, 5]), 1, torch.float32)
    lengths = torch.tensor([len(prompts[p]) for p in prompt_of])
    for step in range(12):
        cache.reserve(4, step + 1)
        decode = cache.decode_view(grouping, torch.full((3,), step), step + 1)
        assert isinstance(decode, LatentAttentionState)
        new = torch.tensor([tokens[step] for tokens in own])
        got = decoder.logits(decoder(new, lengths + step, decode).hidden_ND)
        for row, prompt in enumerate(prompt_of):
            expected = full_logits(decoder, [*prompts[prompt], *own[row][: step + 1]])[-1]
            torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.inference_mode()
def test_greedy_tokens_equal_the_naive_loop(variant: str) -> None:
    decoder = build(**VARIANTS[variant])
    prompts = random_prompts([1, 7, 31, 40])
    requests = [
        Request(f"{i}-{copy}", prompt, SamplingParams(temperature=0.0, max_tokens=24))
        for i, prompt in enumerate(prompts)
        for copy in range(2)
    ]
    done = {c.request_id: c for c in engine_of(decoder, max_batch=6).complete(requests)}
    distinct = set()
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 24:
            ids.append(int(full_logits(decoder, ids)[-1].argmax()))
            if ids[-1] == EOS:
                break
        for copy in range(2):
            assert done[f"{i}-{copy}"].token_ids == tuple(ids[len(prompt) :])
        distinct |= set(ids[len(prompt) :])
    assert len(distinct) > 4  # a model that repeats one token would prove nothing


def test_sampled_logprobs_equal_scores() -> None:
    """A sampled token's log-probability comes from the absorbed path, its score from the expanded one."""
    decoder = build(**VARIANTS["yarn"])
    engine = engine_of(decoder)
    prompts = random_prompts([3, 20, 33])
    requests = [
        Request(f"{i}-{copy}", prompt, SamplingParams(max_tokens=30, seed=10 * i + copy))
        for i, prompt in enumerate(prompts)
        for copy in range(3)
    ]
    for completion in engine.complete(requests):
        prompt = prompts[int(completion.request_id[0])]
        scores = engine.score([[*prompt, *completion.token_ids]])[0][len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), scores, rtol=0, atol=1e-5)


def test_decoding_never_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens a pass of the expanded path: the prompts', once each, and no pass for a decoded token."""
    decoder = build()
    passes: list[int] = []
    decoder.get_submodule("layers.1.attention.kv_b_proj").register_forward_hook(
        lambda _, args, __: passes.append(len(args[0]))
    )
    requests = [Request(str(i), p, SamplingParams(max_tokens=9, seed=i)) for i, p in enumerate(random_prompts([4, 6]))]
    assert len(list(engine_of(decoder).complete(requests))) == 2
    assert passes == [10]


def held_bytes(cache: LatentCache) -> int:
    return sum(tensor.nbytes for store in (cache.prompt_latents, cache.latents) for tensor in store.tensors)


def test_the_budget_is_what_is_allocated() -> None:
    decoder = build()
    requests = [
        Request(str(i), p, SamplingParams(max_tokens=40, seed=i)) for i, p in enumerate(random_prompts([20] * 8))
    ]
    engine = engine_of(decoder)
    list(engine.complete(requests))
    cache = engine._cache
    assert isinstance(cache, LatentCache)
    assert engine.cache_bytes == held_bytes(cache) > 0
    per_token = decoder.config.kv_bytes_per_token(4)
    assert per_token == 3 * (16 + 8) * 4
    assert engine.cache_bytes % per_token == 0

    alone = (32 + 64) * per_token  # a prompt's bucket and a completion's
    narrow = engine_of(decoder, max_cache_bytes=2 * alone)
    for request in requests:
        narrow.add_request(request)
    most = 0
    while narrow.has_work:
        narrow.step()
        most = max(most, narrow.num_running)
        assert held_bytes(narrow._cache) == narrow.cache_bytes <= 2 * alone  # type: ignore[arg-type]
    assert most == 2
    with pytest.raises(CapacityError, match="bytes of key-value cache"):
        engine_of(decoder, max_cache_bytes=alone - 1).add_request(requests[0])


def test_growing_and_moving_keep_what_is_stored() -> None:
    """Sequences of unlike lengths leave and others take their rows, past the first bucket; tokens stay the same."""
    decoder = build()
    prompts = random_prompts([5, 9, 13, 17, 21, 33])
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=6 + 13 * i, seed=i)) for i, prompt in enumerate(prompts)
    ]
    together = {c.request_id: c.token_ids for c in engine_of(decoder, max_batch=3).complete(requests)}
    for request in requests:
        (alone,) = engine_of(decoder).complete([request])
        assert together[request.id] == alone.token_ids


def test_a_latent_cache_keeps_no_keys_and_values() -> None:
    config = ModelConfig.model_validate(SHAPE)
    cache = LatentCache(config, torch.empty(0))
    cache.reserve_prompts(1, 4)
    cache.reserve(1, 1)
    grouping = Grouping.build(torch.tensor([0]), torch.tensor([4]), 1, torch.float32)
    x_NHK = torch.zeros(1, 4, 20)
    with pytest.raises(TypeError, match="keeps no keys and values"):
        cache.decode_view(grouping, torch.tensor([0]), 1).attend(0, x_NHK, x_NHK, x_NHK)
