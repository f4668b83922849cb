"""Muon against the singular value decomposition and torch's own, and the resumable state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.schema import OptimConfig
from tafkir.train.optim import Muon, build_optimizers, orthogonalize
from tafkir.train.state import latest_state, load_state, save_state

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (3, 12, 5)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    got = orthogonalize(matrix)
    in_basis = u.mT @ got @ vh.mT
    values = torch.diagonal(in_basis, dim1=-2, dim2=-1)
    assert values.min() > 0.4
    assert values.max() < 1.3
    off = in_basis - torch.diag_embed(values)
    assert off.abs().max() < 0.05


def test_muon_agrees_with_torch_on_a_plain_matrix() -> None:
    start = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.1, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(2)
    for _ in range(4):
        grad = torch.randn(12, 8, generator=draw)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        peer.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert (ours - start).abs().max() > 0.05


def test_a_stack_is_updated_matrix_by_matrix() -> None:
    start = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(3))
    grad = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4))
    stack = torch.nn.Parameter(start.clone())
    stack.grad = grad.clone()
    Muon([stack], lr=0.1).step()
    for i in range(3):
        single = torch.nn.Parameter(start[i].clone())
        single.grad = grad[i].clone()
        Muon([single], lr=0.1).step()
        torch.testing.assert_close(stack[i], single, atol=2e-3, rtol=0)


def test_every_parameter_has_one_owner_and_norms_do_not_decay() -> None:
    decoder = build_decoder(CONFIG, seed=0)
    for kind in ("adamw", "muon"):
        optimizers = build_optimizers(decoder, OptimConfig(optimizer=kind))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        owned = [id(p) for group in groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in decoder.parameters())
        assert all(group["weight_decay"] == 0 for group in groups if any(p.ndim < 2 for p in group["params"]))
    muon = build_optimizers(decoder, OptimConfig(optimizer="muon"))[1]
    ours = {id(p) for p in muon.param_groups[0]["params"]}
    named = {name for name, p in decoder.named_parameters() if id(p) in ours}
    assert "layers.1.mlp.experts.gate_up_proj" in named
    assert not any("router" in name or "embed" in name or "lm_head" in name for name in named)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    config = OptimConfig(optimizer=kind)  # type: ignore[arg-type]  # a literal from parametrize

    def train(decoder: torch.nn.Module, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            for param in decoder.parameters():
                param.grad = torch.randn(param.shape, generator=draw)
            for optimizer in optimizers:
                optimizer.step()

    whole = build_decoder(CONFIG, seed=0)
    optimizers = build_optimizers(whole, config)
    train(whole, optimizers, 0, 2)
    save_state(tmp_path, whole, optimizers, 2)
    train(whole, optimizers, 2, 4)

    resumed = build_decoder(CONFIG, seed=9)
    fresh = build_optimizers(resumed, config)
    state = latest_state(tmp_path)
    assert state is not None
    assert load_state(state, resumed, fresh) == 2
    train(resumed, fresh, 2, 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_truncated_state_is_named(tmp_path: Path) -> None:
    decoder = build_decoder(CONFIG, seed=0)
    path = save_state(tmp_path, decoder, build_optimizers(decoder, OptimConfig()), 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=path.name):
        load_state(path, decoder, build_optimizers(decoder, OptimConfig()))
