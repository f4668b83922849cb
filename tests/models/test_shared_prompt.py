"""The shared-prompt layout against every prompt + completion as a document of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tafkir.models import shared_prompt
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.shared_prompt import SharedPromptCausal
from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
    n_group=2,
    topk_group=1,
    initializer_range=0.2,
)


def _documents(seed: int, prompts: list[int], completions: list[list[int]]) -> list[tuple[Tensor, list[Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, CONFIG.vocab_size, (p,), generator=draw),
            [torch.randint(0, CONFIG.vocab_size, (c,), generator=draw) for c in lengths],
        )
        for p, lengths in zip(prompts, completions, strict=True)
    ]


def _alone(decoder: Decoder, documents: list[tuple[Tensor, list[Tensor]]]) -> list[Tensor]:
    """Hidden states of each completion's tokens, every document in a forward of its own."""
    hidden = []
    for prompt, completions in documents:
        for completion in completions:
            ids = torch.cat([prompt, completion])
            out = decoder(ids, torch.arange(len(ids)), VarlenCausal([0, len(ids)]))
            hidden.append(out.hidden_ND[len(prompt) :])
    return hidden


def _shared(decoder: Decoder, documents: list[tuple[Tensor, list[Tensor]]]) -> list[Tensor]:
    ids, positions, sizes = [], [], []
    for prompt, completions in documents:
        ids += [prompt, *completions]
        positions += [torch.arange(len(prompt))]
        positions += [torch.arange(len(prompt), len(prompt) + len(c)) for c in completions]
        sizes += [len(prompt), *map(len, completions)]
    state = SharedPromptCausal([len(p) for p, _ in documents], [[len(c) for c in cs] for _, cs in documents])
    out = decoder(torch.cat(ids), torch.cat(positions), state)
    parts = iter(out.hidden_ND.split(sizes))
    hidden = []
    for _, completions in documents:
        next(parts)
        hidden += [next(parts) for _ in completions]
    return hidden


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [([5], [[3]]), ([7, 2, 11], [[4, 1, 9], [2, 2, 2], [1, 6, 3]]), ([4, 3], [[0, 5], [0, 0]]), ([4, 3], [[0], [0]])],
)
@pytest.mark.parametrize("kernel", ["one block", "many blocks", "fused"])
def test_values_and_gradients_equal_separate_documents(
    prompts: list[int], completions: list[list[int]], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prompt, "MAX_SHORT_LENGTH", 0 if kernel == "fused" else 512)
    monkeypatch.setattr(shared_prompt, "MAX_BLOCK_SCORES", 1 if kernel == "many blocks" else 1 << 18)
    monkeypatch.setattr(shared_prompt, "MAX_BLOCK_WASTE", 100.0)
    documents = _documents(1, prompts, completions)
    decoder = build_decoder(CONFIG, seed=3)
    grads = []
    for run in (_alone, _shared):
        decoder.zero_grad()
        hidden = torch.cat(run(decoder, documents))
        hidden.square().sum().backward()
        grads.append((hidden.detach(), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=2e-5, rtol=1e-5)
    for got, want in zip(grads[1][1], grads[0][1], strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_a_completion_does_not_see_its_siblings() -> None:
    prompt, (first, second) = _documents(2, [6], [[5, 5]])[0]
    decoder = build_decoder(CONFIG, seed=3)
    before = _shared(decoder, [(prompt, [first, second])])[0]
    changed = _shared(decoder, [(prompt, [first, (second + 1) % CONFIG.vocab_size])])[0]
    # Not to the bit: the experts' matrix products have other shapes when other tokens come along.
    torch.testing.assert_close(changed, before, atol=1e-5, rtol=0)
