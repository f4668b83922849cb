"""Router training in the step: losses that are off change no bit, those that are on add their gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.data.packing import Document, pack_documents
from tafkir.errors import RecipeError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops.router_losses import router_z_loss_reference, sequence_balance_loss_reference
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.schema import LanguageTable
from tafkir.train.language import language_loss, language_step
from tafkir.train.loop import Trainer, router_metrics

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    initializer_range=0.15,
)


def documents(step: int) -> list[Document]:
    draw = torch.Generator().manual_seed(step)
    lengths = [9, 5, 12, 3, 7]
    return [(torch.randint(1, 48, (n,), generator=draw).tolist(), None) for n in lengths]


def table(**values: Any) -> LanguageTable:
    return LanguageTable(steps=4, warmup_steps=0, **values)


def gradients(config: LanguageTable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The step's gradients, and its metrics; the weights stay."""
    trainer = Trainer(build_decoder(CONFIG, seed=0), config)
    found: dict[str, Tensor] = {}

    def update(loads: list[Tensor], *, where: str) -> float:
        found.update({n: p.grad.clone() for n, p in trainer.decoder.named_parameters() if p.grad is not None})
        return 0.0

    trainer.update = update  # type: ignore[method-assign]  # look at the gradients instead of using them
    output = language_step(trainer, documents, label="test")(0)
    return found, dict(output.metrics)


def plain_gradients() -> dict[str, Tensor]:
    """The step as it is without any router loss."""
    decoder = build_decoder(CONFIG, seed=0)
    batch = pack_documents(documents(0))
    loss, _ = language_loss(decoder, batch)
    (loss / batch.num_targets).backward()
    return {name: param.grad for name, param in decoder.named_parameters() if param.grad is not None}


def test_losses_that_are_off_change_no_bit_and_log_nothing() -> None:
    expected = plain_gradients()
    got, metrics = gradients(table())
    assert got.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in got.items())
    assert not {"router/balance_loss", "router/z_loss"} & metrics.keys()


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_losses_that_are_on_add_their_gradient_whatever_the_micro_batches(micro_batches: int) -> None:
    balance_coef, z_coef = 0.5, 0.03
    decoder = build_decoder(CONFIG, seed=0)
    batch = pack_documents(documents(0))
    loss, out = language_loss(decoder, batch)
    total = loss / batch.num_targets
    balances, zs = [], []
    for routing in out.routings:
        balances.append(sequence_balance_loss_reference(routing.scores_NE, 2, batch.cu_seqlens) / 5)
        zs.append(router_z_loss_reference(routing.logits_NE) / 36)
        total = total + balance_coef * balances[-1] + z_coef * zs[-1]
    total.backward()
    config = table(sequence_balance_coef=balance_coef, router_z_coef=z_coef, micro_batches=micro_batches)
    got, metrics = gradients(config)
    assert batch.input_ids_N.numel() == 36
    for name, param in decoder.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(got[name], param.grad, rtol=1e-4, atol=1e-6)
    name = "layers.1.mlp.router.weight"
    assert (got[name] - plain_gradients()[name]).abs().max() > 1e-3
    assert metrics["router/balance_loss"] == pytest.approx(sum(b.item() for b in balances) / 2, rel=1e-5)
    assert metrics["router/z_loss"] == pytest.approx(sum(z.item() for z in zs) / 2, rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(loss.item() / batch.num_targets, rel=1e-5)


def test_the_balance_loss_alone_evens_the_load() -> None:
    violations = []
    for coef in (0.0, 1.0):
        config = table(sequence_balance_coef=coef, expert_bias_update_rate=0.0, learning_rate=0.02)
        trainer = Trainer(build_decoder(CONFIG, seed=0), config)
        step = language_step(trainer, documents, label="test")
        trainer.set_step(0)
        metrics = [dict(step(number % 3).metrics) for number in range(20)]
        violations.append(sum(float(row["router/max_violation"]) for row in metrics[-5:]) / 5)  # type: ignore[arg-type]
    assert violations[1] < 0.75 * violations[0]


def biases(decoder: Decoder) -> list[Tensor]:
    return [router.expert_bias.clone() for router in decoder.routers if router.expert_bias is not None]


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_a_rate_of_nothing_freezes_the_bias_for_reinforcement_learning(rate: float) -> None:
    trainer = Trainer(build_decoder(CONFIG, seed=0), table(expert_bias_update_rate=rate))
    for bias_E in (router.expert_bias for router in trainer.decoder.routers):
        assert bias_E is not None
        bias_E.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    before = biases(trainer.decoder)
    weight = trainer.decoder.routers[0].weight.detach().clone()
    language_step(trainer, documents, label="test")(0)
    assert [torch.equal(a, b) for a, b in zip(before, biases(trainer.decoder), strict=True)] == [rate == 0] * 2
    assert not torch.equal(weight, trainer.decoder.routers[0].weight)


def test_load_statistics_by_hand() -> None:
    metrics = router_metrics([torch.tensor([6, 2, 0, 0]), torch.tensor([2, 2, 2, 2])])
    # largest over mean, minus one: 6 / 2 - 1 and 0; entropy of (3/4, 1/4) over log 4
    assert metrics["router/max_violation/0"] == pytest.approx(2.0)
    assert metrics["router/max_violation/1"] == pytest.approx(0.0)
    assert metrics["router/max_violation"] == pytest.approx(1.0)
    assert metrics["router/load_max"] == pytest.approx(3.0)
    assert metrics["router/load_entropy/0"] == pytest.approx(0.4056390622295664)
    assert metrics["router/load_entropy/1"] == pytest.approx(1.0)
    assert metrics["router/load/0"] == [0.75, 0.25, 0.0, 0.0]
    assert router_metrics([]) == {}


def test_a_model_without_routers_has_no_router_losses() -> None:
    dense = CONFIG.model_copy(update={"first_k_dense_replace": 3})
    trainer = Trainer(build_decoder(dense, seed=0), table(router_z_coef=1e-4))
    with pytest.raises(RecipeError, match=r"router_z_coef.*no routers.*experts"):
        language_step(trainer, documents, label="test")(0)


def test_weights_of_the_losses_are_checked_where_they_are_written() -> None:
    with pytest.raises(RecipeError, match="router_z_coef"):
        load_recipe(["smoke"], ["pretrain.router_z_coef=-1"])
    with pytest.raises(RecipeError, match="sequence_balance_coef"):
        load_recipe(["smoke"], ["rlvr.sequence_balance_coef=1e-4"])
