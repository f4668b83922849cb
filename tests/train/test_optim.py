"""Muon against the singular value decomposition and torch's own, and the resumable state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.schema import OptimConfig
from tafkir.train.optim import Muon, build_optimizers, orthogonalize
from tafkir.train.state import latest_state, load_state, save_state
from tests.train.conftest import CONFIG


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


def frozen_muon_step(param: torch.Tensor, average: torch.Tensor, grad: torch.Tensor, lr: float, decay: float) -> None:
    """The update that the shipped base was trained with, operation by operation, in place."""
    average.lerp_(grad, 1 - 0.95)
    x = grad.lerp(average, 0.95).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    update = (x.mT if tall else x).to(grad.dtype)
    param.mul_(1 - lr * decay)
    param.add_(update, alpha=-lr * (0.2 * math.sqrt(max(param.shape[-2:]))))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 12, 5)])
def test_muon_keeps_the_bits_of_trained_checkpoints(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=draw))
    expected, average = param.detach().clone(), torch.zeros(shape)
    optimizer = Muon([param], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        grad = torch.randn(shape, generator=draw)
        param.grad = grad.clone()
        optimizer.step()
        frozen_muon_step(expected, average, grad, 0.02, 0.1)
        assert torch.equal(param, expected)


def test_muon_takes_the_matrices_of_every_kind_of_layer() -> None:
    """AdamW keeps tables, router rows, norms, and the residual maps' biases and gates."""
    config = ModelConfig.model_validate(
        CONFIG.model_dump()
        | {
            "attention_type": "mla",
            "num_key_value_heads": 2,
            "use_qk_norm": False,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
            "residual": {"kind": "mhc"},
            "mtp": {"depth": 1},
        }
    )
    decoder = build_decoder(config, seed=0)
    adamw, muon = build_optimizers(decoder, OptimConfig(optimizer="muon"))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {
        name.rpartition(".")[2] if "residual" in name else name: id(p) in taken
        for name, p in decoder.named_parameters()
    }
    assert {part: names[part] for part in ("phi", "bias", "alpha")} == {"phi": True, "bias": False, "alpha": False}
    assert names["mtp.layers.0.eh_proj.weight"]
    assert all(mine for name, mine in names.items() if "_proj" in name)
    assert not any(mine for name, mine in names.items() if "norm" in name or "router" in name or "embed" in name)
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {decays[id(p)] for name, p in decoder.named_parameters() if name.endswith((".bias", ".alpha"))} == {0.0}


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
