"""The decoder's own promises: documents do not see each other, equal seeds give equal bits, the router balances."""

from __future__ import annotations

import pytest
import torch

from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder, stretch_context
from tafkir.models.decoder import Decoder, update_expert_bias
from tafkir.models.router import balanced_bias, route
from tafkir.ops.loss import next_token_loss
from tafkir.recipe.model import ModelConfig, YarnConfig

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    initializer_range=0.15,
)


@pytest.fixture
def decoder() -> Decoder:
    return build_decoder(CONFIG, seed=0)


def documents(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=generator) for length in lengths]


def forward(decoder: Decoder, docs: list[torch.Tensor]) -> torch.Tensor:
    bounds = [0]
    for doc in docs:
        bounds.append(bounds[-1] + len(doc))
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])
    hidden: torch.Tensor = decoder(torch.cat(docs), positions, VarlenCausal(bounds)).hidden_ND
    return hidden


def test_each_document_alone_equals_the_batch(decoder: Decoder) -> None:
    docs = documents([5, 31, 1, 12, 31, 2])
    together = forward(decoder, docs).split([len(doc) for doc in docs])
    for doc, hidden_TD in zip(docs, together, strict=True):
        torch.testing.assert_close(forward(decoder, [doc]), hidden_TD, rtol=0, atol=1e-5)


def test_later_tokens_and_other_documents_change_nothing(decoder: Decoder) -> None:
    docs = documents([9, 14])
    before = forward(decoder, docs)
    docs[0][6:] = (docs[0][6:] + 1) % CONFIG.vocab_size
    after = forward(decoder, docs)
    torch.testing.assert_close(after[:6], before[:6], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[9:], before[9:], rtol=0, atol=1e-6)
    assert not torch.allclose(after[6:9], before[6:9], atol=1e-3)


def test_the_same_step_gives_the_same_bits() -> None:
    docs = documents([20, 33, 7])
    grads = []
    for _ in range(2):
        decoder = build_decoder(CONFIG, seed=4)
        hidden_ND = forward(decoder, docs)
        next_token_loss(hidden_ND, decoder.head_weight, torch.cat(docs).roll(-1)).backward()
        grads.append([parameter.grad for parameter in decoder.parameters()])
    for first, second in zip(*grads, strict=True):
        assert first is not None and second is not None
        assert torch.equal(first, second)


def test_fresh_weights_follow_the_seed_and_the_config() -> None:
    first, again, other = (build_decoder(CONFIG, seed) for seed in (7, 7, 8))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    std = torch.cat([p.detach().flatten() for n, p in first.named_parameters() if "norm" not in n]).std()
    assert abs(float(std) - CONFIG.initializer_range) < 0.003
    assert all(bool((p == 1).all()) for n, p in first.named_parameters() if "norm" in n)
    assert all(bool((r.expert_bias == 0).all()) for r in first.routers)


def test_expert_load_counts_the_choices(decoder: Decoder) -> None:
    (doc,) = documents([23])
    out = decoder(doc, torch.arange(23), VarlenCausal([0, 23]))
    assert len(out.expert_ids) == len(out.expert_load) == 2
    for ids_NA, load_E in zip(out.expert_ids, out.expert_load, strict=True):
        assert ids_NA.shape == (23, 2)
        assert load_E.tolist() == [int((ids_NA == expert).sum()) for expert in range(8)]
        assert all(len(set(row)) == 2 for row in ids_NA.tolist())


def naive_route(scores: list[float], bias: list[float], config: ModelConfig) -> dict[int, float]:
    """The router of one token as the paper's words have it, in plain Python."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.num_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    best_first = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    eligible = [expert for group in best_first[: config.topk_group] for expert in group]
    chosen = sorted(eligible, key=lambda expert: -biased[expert])[: config.num_experts_per_tok]
    total = sum(scores[expert] for expert in chosen) + 1e-20 if config.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@pytest.mark.parametrize(
    ("n_group", "topk_group", "active", "norm"), [(4, 2, 2, True), (4, 1, 3, True), (1, 1, 5, False), (16, 4, 4, True)]
)
def test_route_equals_the_words_of_the_paper(n_group: int, topk_group: int, active: int, norm: bool) -> None:
    config = ModelConfig(
        num_experts=16, n_group=n_group, topk_group=topk_group, num_experts_per_tok=active, norm_topk_prob=norm
    )
    generator = torch.Generator().manual_seed(n_group)
    scores_NE = torch.rand(50, 16, generator=generator)
    # Strongly negative biases too: a closed group must stay closed even when every open score is below zero.
    bias_E = torch.rand(16, generator=generator) * 4 - 3
    ids_NA, weights_NA = route(scores_NE, bias_E, config)
    for i in range(50):
        expected = naive_route(scores_NE[i].tolist(), bias_E.tolist(), config)
        got = dict(zip(ids_NA[i].tolist(), weights_NA[i].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert all(abs(got[expert] - expected[expert]) < 1e-5 for expert in got)


def test_expert_bias_moves_towards_balance_with_zero_mean() -> None:
    load_E = torch.tensor([10, 0, 4, 2])
    bias_E = balanced_bias(torch.zeros(4), load_E, 0.001)
    # mean load 4: signs -1, +1, 0, +1 with mean 0.25
    expected = torch.tensor([-1.25, 0.75, -0.25, 0.75]) * 0.001
    torch.testing.assert_close(bias_E, expected)


def test_update_expert_bias_spreads_the_load(decoder: Decoder) -> None:
    docs = documents([200], seed=3)
    positions = torch.arange(200)
    peaks = []
    for _ in range(40):
        with torch.no_grad():
            loads = decoder(docs[0], positions, VarlenCausal([0, 200])).expert_load
        peaks.append(max(float(load.max()) for load in loads))
        update_expert_bias(decoder, loads, 0.02)
    assert min(peaks[-10:]) < 0.8 * peaks[0]
    assert decoder.routers[0].expert_bias.dtype == torch.float32
    assert abs(float(decoder.routers[0].expert_bias.sum())) < 1e-4


def test_expert_bias_is_no_parameter_and_gets_no_gradient(decoder: Decoder) -> None:
    assert not [name for name, _ in decoder.named_parameters() if "expert_bias" in name]
    assert len([name for name, _ in decoder.named_buffers() if "expert_bias" in name]) == 2


def test_bfloat16_runs_and_stays_near() -> None:
    decoder = build_decoder(CONFIG, seed=0)
    docs = documents([9, 14])
    with torch.no_grad():
        expected = forward(decoder, docs)
        got = forward(decoder.to(torch.bfloat16), docs)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).norm() / expected.norm()) < 0.1
    assert decoder.logits(got).dtype == torch.float32


def test_stretching_shares_the_weights(decoder: Decoder) -> None:
    """What the stretched context is worth: tests/benchmarks/test_needle.py."""
    stretched = stretch_context(decoder, YarnConfig(factor=2, original_max_position_embeddings=512), 1024)
    assert stretched.config.max_position_embeddings == 1024
    for ours, theirs in zip(decoder.parameters(), stretched.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert decoder.config == CONFIG
