"""The decoder against transformers' Glm4MoeForCausalLM on tiny random configs: logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import next_token_loss
from tafkir.recipe.model import ModelConfig

pytestmark = pytest.mark.usefixtures("kernels")

TINY: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups open": {"topk_group": 4},
    # Unnormalised: a single normalised weight is one, and its gradient nothing but rounding.
    "a single expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "two dense layers first": {"first_k_dense_replace": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "no QK-norm": {"use_qk_norm": False},
    "two shared experts": {"num_shared_experts": 2},
    "every head its own keys": {"num_key_value_heads": 4},
    "whole head rotated": {"partial_rotary_factor": 1.0, "rope_theta": 6e5},
    "rotary_dim wins": {"partial_rotary_factor": 1.0, "rotary_dim": 4},
}


def build(seed: int, **changes: Any) -> Decoder:
    """A decoder with random norms and expert biases as well, so that nothing hides behind ones and zeros."""
    decoder = build_decoder(ModelConfig(**(TINY | changes)), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for router in decoder.routers:
            router.expert_bias.uniform_(-0.3, 0.3, generator=generator)
    return decoder


def token_batch(num_documents: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (num_documents, length), generator=torch.Generator().manual_seed(seed))


def run(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    """Hidden states of equally long documents, flat."""
    docs, length = ids_BT.shape
    state = VarlenCausal(range(0, docs * length + 1, length))
    hidden: torch.Tensor = decoder(ids_BT.flatten(), torch.arange(length).repeat(docs), state).hidden_ND
    return hidden


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_and_gradients_equal_the_oracle(variant: str, oracle: Any) -> None:
    decoder = build(1, **VARIANTS[variant])
    theirs = oracle.build(decoder)
    ids_BT = token_batch(2, 19)
    labels_N = token_batch(2, 19, seed=6).flatten()

    hidden_ND = run(decoder, ids_BT)
    logits_NV = decoder.logits(hidden_ND)
    oracle_NV = theirs(ids_BT).logits.flatten(0, 1)
    assert oracle_NV.abs().max() > 0.5
    torch.testing.assert_close(logits_NV, oracle_NV, rtol=0, atol=1e-5)

    next_token_loss(hidden_ND, decoder.head_weight, labels_N).backward()
    F.cross_entropy(oracle_NV, labels_N, reduction="sum").backward()
    ours = oracle.gradients(decoder)
    checked = 0
    for name, parameter in theirs.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
        checked += 1
    assert checked == len(ours)


def test_right_padded_oracle_equals_our_flat_documents(oracle: Any) -> None:
    decoder = build(2)
    lengths = [3, 17, 1, 9]
    documents = [token_batch(1, length, seed=length)[0] for length in lengths]
    cu_seqlens = [0, 3, 20, 21, 30]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden_ND = decoder(torch.cat(documents), positions, VarlenCausal(cu_seqlens)).hidden_ND
    logits_NV = decoder.logits(hidden_ND)

    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    oracle_BTV = oracle.build(decoder)(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(logits_NV, oracle_BTV[mask.bool()], rtol=0, atol=1e-5)


def test_no_shared_expert_is_the_routed_part_alone() -> None:
    """transformers always has a shared expert; silencing one must equal leaving it out."""
    with_shared, without = build(3), build(3, num_shared_experts=0)
    state = with_shared.state_dict()
    for name, tensor in state.items():
        if "shared_experts.down_proj" in name:
            tensor.zero_()
    without.load_state_dict({name: tensor for name, tensor in state.items() if "shared_experts" not in name})
    ids_BT = token_batch(2, 11)
    torch.testing.assert_close(run(without, ids_BT), run(with_shared, ids_BT), rtol=0, atol=1e-6)
