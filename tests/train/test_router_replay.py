"""Replayed experts: the own ones change no bit, others are where the tokens go, and the router goes on learning."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.loss import next_token_loss
from tafkir.recipe.model import ModelConfig

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
NUM_TOKENS = 37


@pytest.fixture
def decoder() -> Decoder:
    decoder = build_decoder(CONFIG, seed=0)
    for router in decoder.routers:
        assert router.expert_bias is not None
        router.expert_bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    return decoder


def forward(decoder: Decoder, replayed: Sequence[Tensor] | None = None) -> DecoderOutput:
    ids = torch.randint(0, CONFIG.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(20), torch.arange(17)])
    out: DecoderOutput = decoder(ids, positions, VarlenCausal([0, 20, NUM_TOKENS]), replayed)
    return out


def backward(decoder: Decoder, out: DecoderOutput) -> dict[str, Tensor]:
    decoder.zero_grad()
    labels = torch.randint(0, CONFIG.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4))
    next_token_loss(out.hidden_ND, decoder.head_weight, labels).backward()
    return {name: param.grad.clone() for name, param in decoder.named_parameters() if param.grad is not None}


def other_experts(out: DecoderOutput) -> list[Tensor]:
    """For every token two experts that the router did not choose."""
    return [(routing.expert_ids_NA.sum(1, keepdim=True) + torch.tensor([[3, 5]])) % 8 for routing in out.routings]


def test_replaying_the_own_experts_changes_no_bit(decoder: Decoder) -> None:
    first = forward(decoder)
    grads = backward(decoder, first)
    again = forward(decoder, first.expert_ids)
    assert torch.equal(first.hidden_ND, again.hidden_ND)
    for ours, theirs in zip(first.routings, again.routings, strict=True):
        assert torch.equal(ours.weights_NA, theirs.weights_NA)
    replayed = backward(decoder, again)
    assert grads.keys() == replayed.keys()
    assert all(torch.equal(grad, replayed[name]) for name, grad in grads.items())


def test_other_experts_are_visited_at_the_routers_present_weights(decoder: Decoder) -> None:
    wanted = other_experts(forward(decoder))
    out = forward(decoder, wanted)
    for ids_NA, routing, load_E in zip(wanted, out.routings, out.expert_load, strict=True):
        assert torch.equal(routing.expert_ids_NA, ids_NA)
        assert torch.equal(load_E, torch.bincount(ids_NA.flatten(), minlength=8))
        # by hand: normalised unbiased scores of these experts, times the scaling factor
        for token in range(NUM_TOKENS):
            logits = routing.logits_NE[token].double()
            scores = torch.stack([1 / (1 + torch.exp(-logits[e])) for e in ids_NA[token]])
            expected = 2.5 * scores / scores.sum()
            torch.testing.assert_close(routing.weights_NA[token].double(), expected, rtol=1e-5, atol=0)
    grads = backward(decoder, out)
    for layer, ids_NA in zip((1, 2), wanted, strict=True):
        router = grads[f"layers.{layer}.mlp.router.weight"]
        experts = grads[f"layers.{layer}.mlp.experts.down_proj"]
        visited = torch.bincount(ids_NA.flatten(), minlength=8) > 0
        assert torch.equal(router.abs().sum(1) > 0, visited)
        assert torch.equal(experts.flatten(1).abs().sum(1) > 0, visited)


def test_the_router_of_replayed_experts_learns_by_finite_differences(decoder: Decoder) -> None:
    """The gradient of a replay is that of a forward whose choice is held: the loss has no jumps along it."""
    wanted = other_experts(forward(decoder))
    decoder.double()
    out = forward(decoder, wanted)
    labels = torch.arange(NUM_TOKENS)
    weight = decoder.routers[0].weight
    (grad,) = torch.autograd.grad(next_token_loss(out.hidden_ND, decoder.head_weight, labels), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            weight += sign * 1e-3 * direction
            losses.append(float(next_token_loss(forward(decoder, wanted).hidden_ND, decoder.head_weight, labels)))
            weight -= sign * 1e-3 * direction
    # The router computes in float32 whatever the weights are.
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float((grad * direction).sum()), rel=2e-2)


def test_tokens_without_a_record_choose_for_themselves(decoder: Decoder) -> None:
    own = forward(decoder)
    recorded = [ids_NA.clone() for ids_NA in own.expert_ids]
    for ids_NA in recorded:
        ids_NA[::3] = -1
    assert torch.equal(forward(decoder, recorded).hidden_ND, own.hidden_ND)
    mixed = other_experts(own)
    for ids_NA in mixed:
        ids_NA[::3] = -1
    first = forward(decoder, mixed).expert_ids[0]
    assert torch.equal(first[::3], own.expert_ids[0][::3])
    assert torch.equal(first[1::3], mixed[0][1::3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids[:1], "of 1 layers"),
        (lambda ids: [ids[0], ids[1][:-1]], r"MoE layer 1.*\[36, 2\].*expected int64 \[37, 2\]"),
        (lambda ids: [ids[0].int(), ids[1]], "MoE layer 0.*int32"),
        (lambda ids: [ids[0] + 8, ids[1]], "MoE layer 0.*out of range.*0 to 7"),
        (lambda ids: [ids[0], torch.stack([ids[1][:, 0], ids[1][:, 1] * 0 - 1], 1)], "MoE layer 1.*whole row"),
    ],
)
def test_experts_that_do_not_fit_are_refused(decoder: Decoder, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrainingError, match=message):
        forward(decoder, damage(forward(decoder).expert_ids))
