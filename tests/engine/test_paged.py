"""The paged engine against the plain forward and against rows: chunks, known beginnings, preemption, any company."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint import save_checkpoint
from tafkir.checkpoint.packed import load_packed
from tafkir.engine.engine import Engine
from tafkir.engine.paged_engine import PagedEngine
from tafkir.errors import CapacityError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops import native
from tafkir.recipe.model import ModelConfig
from tafkir.records import Completion, Request, SamplingParams

EOS = 3
# What a step may hold, so small that prompts come in several chunks.
CHUNKED = {"chunk_tokens": 24, "max_prefill_tokens": 40}


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    return {done.request_id: done for done in engine.complete(requests)}


def sampled(prompts: Sequence[tuple[int, ...]], group: int = 2, vocab: int = 61, **params: Any) -> list[Request]:
    return [
        Request(f"{i}.{j}", tuple(t % vocab for t in prompt), SamplingParams(seed=100 * i + j, **params))
        for i, prompt in enumerate(prompts)
        for j in range(group)
    ]


def worst_error(decoder: Decoder, requests: Sequence[Request], done: dict[str, Completion]) -> float:
    """Of all log-probabilities, against one forward over the whole sequence."""
    worst = 0.0
    for request in requests:
        ids = torch.tensor([*request.prompt_ids, *done[request.id].token_ids])
        with torch.no_grad():
            hidden = decoder(ids, torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
            logprob_NV = decoder.logits(hidden).log_softmax(-1)
        start = len(request.prompt_ids)
        trained = logprob_NV[start - 1 : -1].gather(1, ids[start:, None]).squeeze(1)
        worst = max(worst, float((torch.tensor(done[request.id].logprobs) - trained).abs().max()))
    return worst


def assert_all_returned(engine: PagedEngine) -> None:
    blocks = engine._cache.blocks
    assert (engine.num_running, engine.num_waiting, blocks.num_used) == (0, 0, 0)
    assert sorted([*blocks._empty, *blocks._idle]) == list(range(blocks.num_blocks))
    assert not any(blocks._references)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("max_batch", [1, 8, 32])
def test_log_probabilities_are_those_of_one_forward(
    shared_decoder: Decoder, prompts: list[tuple[int, ...]], max_batch: int
) -> None:
    """Prefill in chunks beside decoding, beginnings that are found, and too few blocks for all: the same numbers."""
    some = prompts[2::3] if max_batch == 1 else prompts
    requests = sampled([*some, some[-1] + some[0], some[-1][:35] + some[1]], max_tokens=30)
    tight = 14 * 16 * shared_decoder.config.kv_bytes_per_token(4)
    engine = PagedEngine(shared_decoder, eos_ids=(EOS,), max_batch=max_batch, max_cache_bytes=tight, **CHUNKED)
    done = run(engine, requests)
    assert worst_error(shared_decoder, requests, done) < 1e-5
    assert engine.prefix_hits > 100
    assert (engine.num_preemptions > 0) == (max_batch > 1)
    assert_all_returned(engine)
    rows = run(Engine(shared_decoder, eos_ids=(EOS,), record_experts=True), requests)
    assert {i: c.token_ids for i, c in done.items()} == {i: c.token_ids for i, c in rows.items()}
    assert {i: c.finish_reason for i, c in done.items()} == {i: c.finish_reason for i, c in rows.items()}


def test_experts_are_returned_for_what_was_found_and_for_what_was_computed_again(
    shared_decoder: Decoder, prompts: list[tuple[int, ...]]
) -> None:
    requests = sampled(prompts[6:], max_tokens=30)
    tight = 12 * 16 * shared_decoder.config.kv_bytes_per_token(4)
    options = {"eos_ids": (EOS,), "record_experts": True, "max_batch": 8}
    engine = PagedEngine(shared_decoder, max_cache_bytes=tight, **CHUNKED, **options)
    done, rows = run(engine, requests), run(Engine(shared_decoder, **options), requests)
    assert engine.num_preemptions
    assert engine.prefix_hits
    for request in requests:
        assert torch.equal(done[request.id].expert_ids, rows[request.id].expert_ids)


@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
def test_latents_and_codes(latent_decoder: Decoder, kv_cache: Any) -> None:
    """Latents give the plain forward's numbers; codes stray from them no further than those of a cache of rows do."""
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(4, 61, (n,), generator=generator).tolist()) for n in (5, 40, 40, 70)]
    prompts[2] = prompts[1][:33] + prompts[2][33:]
    requests = sampled(prompts, max_tokens=12)
    engine = PagedEngine(latent_decoder, eos_ids=(), kv_cache=kv_cache, **CHUNKED)
    error = worst_error(latent_decoder, requests, run(engine, requests))
    assert engine.prefix_hits
    assert_all_returned(engine)
    rows = Engine(latent_decoder, eos_ids=(), kv_cache=kv_cache)
    assert error < max(1e-5, 2 * worst_error(latent_decoder, requests, run(rows, requests)))


@pytest.mark.parametrize("kv_cache", ["auto", "fp8", "nvfp4"])
def test_keys_and_values_in_codes(shared_decoder: Decoder, prompts: list[tuple[int, ...]], kv_cache: Any) -> None:
    decoder = build_wide() if kv_cache == "nvfp4" else shared_decoder
    requests = sampled(prompts[8:], max_tokens=12)
    engine = PagedEngine(decoder, eos_ids=(), kv_cache=kv_cache, **CHUNKED)
    error = worst_error(decoder, requests, run(engine, requests))
    rows = run(Engine(decoder, eos_ids=(), kv_cache=kv_cache), requests)
    assert error < max(1e-5, 2 * worst_error(decoder, requests, rows))
    assert_all_returned(engine)


def build_wide() -> Decoder:
    """Heads of one NVFP4 block."""
    return build_decoder(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16), 1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["plain", "latent", "packed"])
def test_the_batch_invariant_mode_gives_the_same_bits_in_any_company(
    shared_decoder: Decoder, latent_decoder: Decoder, prompts: list[tuple[int, ...]], kind: str, tmp_path: Path
) -> None:
    """Alone, in a full batch, in chunks, after a hit, after a preemption, without a cache of beginnings."""
    latent = kind == "latent"
    decoder, few = (latent_decoder, prompts[9:]) if latent else (shared_decoder, prompts[3::2])
    if kind == "packed":
        if native.kernels_in_use() != "native":
            pytest.skip("stored weights without the kernels are decoded whole, and are any others")
        save_checkpoint(tmp_path / "m", decoder, dtype=torch.bfloat16)
        decoder = load_packed(tmp_path / "m").decoder
    requests = sampled([*few, few[-1] + few[0]], max_tokens=10 if latent else 24)
    options: dict[str, Any] = {"eos_ids": (EOS,), "batch_invariant": True, "record_experts": True}
    tight = 10 * 16 * decoder.config.kv_bytes_per_token(4)
    mixed = PagedEngine(decoder, max_batch=32, max_cache_bytes=tight, **CHUNKED, **options)
    together = run(mixed, requests)
    assert latent or mixed.num_preemptions
    assert mixed.prefix_hits
    alone = PagedEngine(decoder, prefix_caching=False, **options)
    for request in requests[::3]:
        (done,) = alone.complete([request])
        assert done.token_ids == together[request.id].token_ids
        assert done.logprobs == together[request.id].logprobs
        assert torch.equal(done.expert_ids, together[request.id].expert_ids)
    assert worst_error(decoder, requests, together) < 1e-5


def test_a_lower_priority_number_goes_first(shared_decoder: Decoder) -> None:
    """Among equals the first come; who is sent back for want of room is the last in that order."""
    engine = PagedEngine(shared_decoder, eos_ids=(), max_batch=1)
    order = [5, 0, 5, -1, 0]
    requests = [
        Request(str(i), (5 + i,), SamplingParams(max_tokens=2, seed=i), priority=p) for i, p in enumerate(order)
    ]
    assert [done.request_id for done in engine.complete(requests)] == ["3", "1", "4", "0", "2"]
    tight = 8 * 16 * shared_decoder.config.kv_bytes_per_token(4)
    engine = PagedEngine(shared_decoder, eos_ids=(), max_batch=4, max_cache_bytes=tight)
    long = SamplingParams(max_tokens=90, seed=1)
    requests = [Request(str(i), (5 + i,) * 20, long, priority=-i) for i in range(3)]
    assert [done.request_id for done in engine.complete(requests)] == ["2", "1", "0"]
    assert engine.num_preemptions


def test_new_weights_make_the_cache_forget(shared_decoder: Decoder, prompts: list[tuple[int, ...]]) -> None:
    engine = PagedEngine(copy.deepcopy(shared_decoder), eos_ids=())
    request = [Request("a", prompts[-1], SamplingParams(max_tokens=5, seed=1))]
    before = run(engine, request)
    assert run(engine, request)["a"].token_ids == before["a"].token_ids
    assert engine.prefix_hits == 48
    other = {name: 1.1 * tensor for name, tensor in shared_decoder.state_dict().items()}
    engine.load_weights(other.items(), version=1)
    after = run(engine, request)
    assert engine.prefix_hits == 48
    assert worst_error(engine.decoder, request, after) < 1e-5


def test_a_request_that_can_never_fit_is_refused(shared_decoder: Decoder) -> None:
    tight = 4 * 16 * shared_decoder.config.kv_bytes_per_token(4)
    engine = PagedEngine(shared_decoder, eos_ids=(), max_cache_bytes=tight)
    with pytest.raises(CapacityError, match="key-value cache"):
        engine.complete([Request("a", (5,) * 40, SamplingParams(max_tokens=30))])
    assert len(run(engine, [Request("a", (5,) * 40, SamplingParams(max_tokens=20))])["a"].token_ids) == 20


def test_every_block_comes_back(shared_decoder: Decoder, prompts: list[tuple[int, ...]]) -> None:
    """Requests of all sizes come, go on, and are cancelled at any moment, over a cache that is too small for them."""
    assert sum(stress(shared_decoder, prompts, seed) for seed in range(3)) > 3


def stress(shared_decoder: Decoder, prompts: list[tuple[int, ...]], seed: int) -> int:
    """How often room was taken back."""
    draw = random.Random(seed)
    tight = draw.randint(8, 12) * 16 * shared_decoder.config.kv_bytes_per_token(4)
    engine = PagedEngine(shared_decoder, eos_ids=(EOS,), max_batch=6, max_cache_bytes=tight, **CHUNKED)
    living: set[str] = set()
    for number in range(60):
        prompt = draw.choice(prompts) + draw.choice(prompts)[: draw.randint(0, 8)]
        params = SamplingParams(max_tokens=draw.randint(1, 50), seed=number)
        engine.add_request(Request(str(number), prompt, params, priority=draw.randint(0, 2)))
        living.add(str(number))
        for _ in range(draw.randint(0, 3)):
            living -= {event.request_id for event in engine.step() if event.finish_reason}
            used = {block for seq in engine._by_id.values() for block in seq.blocks}
            assert engine._cache.blocks.num_used == len(used)
        if living and draw.random() < 0.15:
            name = draw.choice(sorted(living))
            assert engine.cancel(name) is not None
            living.discard(name)
    while engine.has_work and draw.random() < 0.995:
        engine.step()
    engine.cancel_all()
    assert_all_returned(engine)
    return engine.num_preemptions
