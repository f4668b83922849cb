"""Caches in codes: attention over them against attention over what the codes are worth, and their size in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tafkir.cli.completer import completer_builder
from tafkir.engine.cache_formats import CacheCodec, CacheFormat
from tafkir.engine.coded_cache import CodedKVCache, CodedLatentCache, build_cache
from tafkir.engine.engine import Engine
from tafkir.engine.views import Grouping
from tafkir.errors import CapacityError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops.nvfp4 import fake_quantize_nvfp4, fake_quantize_nvfp4_reference
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.resolve import resolve_recipe
from tafkir.records import Request, SamplingParams

CONFIG = ModelConfig(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=32)
LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=64, hidden_size=64, num_hidden_layers=3, attention_type="mla",
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, rope_interleave=True, use_qk_norm=False, intermediate_size=64,
    moe_intermediate_size=32, num_experts=8, max_position_embeddings=128, partial_rotary_factor=1.0,
)  # fmt: skip
FORMATS: tuple[CacheFormat, ...] = ("fp8", "nvfp4")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worth(x: Tensor, format: CacheFormat, scale: float | None = None, slow: bool = False) -> Tensor:
    """What the cache should hold."""
    if format == "fp8":
        scale = scale or 1.0
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    reference = fake_quantize_nvfp4_reference if slow else fake_quantize_nvfp4
    return reference(x, amax=448.0 if scale is None else scale * 2688)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_codes_are_those_of_the_formats(format: CacheFormat, scale: float | None) -> None:
    values = torch.cat([random(1, 2, 32), random(1, 2, 32, seed=1) * 1e4, torch.zeros(1, 2, 32)])
    codec = CacheCodec(format, 32, scale)  # type: ignore[arg-type]
    parts = codec.encode(values)
    assert [part.shape[-1] for part in parts] == list(codec.widths) and all(p.dtype == torch.uint8 for p in parts)
    torch.testing.assert_close(
        codec.decode(parts, torch.float32), worth(values, format, scale, slow=True), atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("format", FORMATS)
def test_new_tokens_attend_to_what_the_codes_are_worth(format: CacheFormat) -> None:
    """Two prompts, three sequences, steps past the first bucket, rows moved on the way."""
    lengths, prompt_of, heads, dim = [5, 9], [1, 0, 1], 2, 32
    cache = CodedKVCache(CONFIG, torch.empty(0), None, format)
    cache.reserve_prompts(2, max(lengths))
    cache.reserve(4, 1)
    q, k, v = (random(sum(lengths), n, dim, seed=n) for n in (6, 2, 4))
    v = v[:, :2]
    view = cache.prefill_view([0, 1], lengths, torch.device("cpu"))
    for layer in range(2):
        view.attend(layer, q, k, v)
    grouping = Grouping.build(torch.tensor(prompt_of), torch.tensor(lengths), heads, torch.float32)
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(34):
        cache.reserve(4, step + 1)
        q, new_k, new_v = (random(3, n, dim, seed=100 * step + i) for i, n in enumerate((6, 2, 2)))
        own.append((new_k, new_v))
        got = cache.decode_view(grouping, torch.full((3,), step), step + 1).attend(1, q, new_k, new_v)
        if step not in (0, 33):
            continue
        for row, prompt in enumerate(prompt_of):
            where = slice(0, 5) if prompt == 0 else slice(5, 14)
            keys = worth(torch.cat([k[where], torch.stack([pair[0][row] for pair in own])]), format)
            values = worth(torch.cat([v[where], torch.stack([pair[1][row] for pair in own])]), format)
            for head in range(6):
                weights = (keys[:, head // 3] @ q[row, head] * dim**-0.5).softmax(0)
                torch.testing.assert_close(got[row, head], weights @ values[:, head // 3], atol=1e-5, rtol=1e-5)
    before = cache.keys.read(1, 1, 34).clone()
    cache.move(torch.tensor([0]), torch.tensor([3]), 34)
    assert torch.equal(cache.keys.read(1, 4, 34)[3 * heads :], before)


@pytest.mark.parametrize("format", FORMATS)
def test_latents_in_codes(format: CacheFormat) -> None:
    cache = CodedLatentCache(LATENT, torch.empty(0), None, format)
    cache.reserve_prompts(1, 6)
    cache.reserve(1, 1)
    prompt, new, query = random(6, 48), random(1, 48, seed=1), random(1, 4, 48, seed=2)
    cache.prefill_view([0], [6], torch.device("cpu")).keep_latents(0, prompt)
    grouping = Grouping.build(torch.tensor([0]), torch.tensor([6]), 1, torch.float32)
    got = cache.decode_view(grouping, torch.tensor([0]), 1).attend_latent(0, query, new, 0.3)
    seen = worth(torch.cat([prompt, new]), format)
    expected = (query[0] @ seen.T * 0.3).softmax(-1) @ seen[:, :32]
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, LATENT], ids=["keys and values", "latents"])
def test_bytes_are_really_fewer(config: ModelConfig) -> None:
    sizes = {}
    for format in ("auto", *FORMATS):
        cache = build_cache(config, torch.empty(0), None, format)
        expected = cache.bytes_for(2, 40, 3, 33)
        cache.reserve_prompts(2, 40)
        cache.reserve(3, 33)
        stores = (*cache._prompts, *cache._own)
        held = sum(tensor.numel() * tensor.element_size() for store in stores for tensor in store.tensors)
        assert held == cache.num_bytes == expected
        sizes[format] = held
        cache.clear()
        assert cache.num_bytes == 0
    assert sizes["auto"] == 4 * sizes["fp8"] and sizes["fp8"] * 9 == sizes["nvfp4"] * 16


def greedy(decoder: Decoder, kv_cache: CacheFormat, scales: list[tuple[float, float]] | None = None) -> list[float]:
    engine = Engine(decoder, eos_ids=(), kv_cache=kv_cache, kv_scales=scales)
    requests = [
        Request(str(i), tuple(range(4 + i, 20 + 2 * i)), SamplingParams(temperature=0.0, max_tokens=20, seed=i))
        for i in (0, 1, 1, 2)
    ]
    requests = [Request(f"{i}", r.prompt_ids, r.params) for i, r in enumerate(requests)]
    done = {completion.request_id: completion for completion in engine.complete(requests)}
    # Equal prompts at equal settings give equal answers, whoever else runs.
    assert done["1"].token_ids == done["2"].token_ids
    return [logprob for i in range(4) for logprob in done[str(i)].logprobs]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_engine_generates_with_either(family: str) -> None:
    config = (
        LATENT
        if family == "deepseek_v3"
        else ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3, num_experts=8, max_position_embeddings=128)
    )
    decoder = build_decoder(config, 0)
    exact = greedy(decoder, "auto")
    first = torch.tensor(exact[::20])
    for format, worst in (("fp8", 0.05), ("nvfp4", 0.2)):
        found = greedy(decoder, format)  # type: ignore[arg-type]
        # The first token of an answer comes from the prompt's own pass, which reads no codes.
        assert found[::20] == pytest.approx(first.tolist(), abs=1e-6)
        # The second is the first to read codes; later ones may follow other tokens.
        assert 0 < max(abs(a - b) for a, b in zip(exact[1::20], found[1::20], strict=True)) < worst
    layers = config.num_hidden_layers
    assert greedy(decoder, "fp8", [(1.0, 1.0)] * layers) == greedy(decoder, "fp8")
    assert greedy(decoder, "fp8", [(1 / 3, 1 / 3)] * layers) != greedy(decoder, "fp8")


def test_heads_that_do_not_split_are_refused() -> None:
    with pytest.raises(CapacityError, match="entries of 8 numbers do not split into blocks of 16"):
        build_cache(ModelConfig(head_dim=8), torch.empty(0), None, "nvfp4")


def test_eval_asks_for_it() -> None:
    loaded = load_recipe(["eval"], ['base="base-tiny"', 'eval.kv_cache="nvfp4"'])
    recipe = resolve_recipe(loaded).recipe
    assert completer_builder(recipe, "sft").kv_cache == "auto"
    engine = completer_builder(recipe, "eval")(find_checkpoint("base-tiny"))
    assert isinstance(engine._cache, CodedKVCache) and engine._cache.alone(32, 32) == 64 * 288
