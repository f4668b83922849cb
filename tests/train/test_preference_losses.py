"""Preference losses against TRL's own code on the same tensors, closed forms, and what a batch may not change."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.data.preference import EncodedPair, PairStream, PreferencePair
from tafkir.models.build import build_decoder
from tafkir.models.reward import reward_model_from
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rlhf import DpoConfig
from tafkir.records import Message
from tafkir.train.dpo import (
    KtoReference,
    PairLogprobs,
    answer_logprobs,
    dpo_loss,
    dpo_step,
    ipo_loss,
    kto_loss,
    measure_dpo,
    orpo_loss,
    preference_loss,
    reference_logprobs,
    robust_dpo_loss,
    simpo_loss,
)
from tafkir.train.loop import Trainer
from tafkir.train.pairs import build_pair_batch
from tafkir.train.reward_model import bradley_terry_loss, score_answers, score_pairs

LENGTHS = [(3, 5), (4, 1), (2, 2), (6, 3)]


def logprobs(seed: int) -> tuple[PairLogprobs, Tensor, Tensor]:
    """Random per-token log-probabilities: our sums, and TRL's padded rows (chosen first) with their mask."""
    draw = torch.Generator().manual_seed(seed)
    width = 1 + max(max(pair) for pair in LENGTHS)
    rows = [length for side in (0, 1) for length in (pair[side] for pair in LENGTHS)]
    mask = torch.tensor([[0] + [1] * length + [0] * (width - 1 - length) for length in rows])
    tokens = -3 * torch.rand(len(rows), width - 1, generator=draw, dtype=torch.float64) * mask[:, 1:]
    reference = -8 * torch.rand(len(rows), generator=draw, dtype=torch.float64)
    sums, half = tokens.sum(1), len(LENGTHS)
    counts = torch.tensor(rows)
    pairs = PairLogprobs(sums[:half], sums[half:], reference[:half], reference[half:], counts[:half], counts[half:])
    return pairs, tokens, mask


def trl_dpo(tokens: Tensor, mask: Tensor, pairs: PairLogprobs, kind: str, beta: float, smoothing: float) -> float:
    """`DPOTrainer._compute_loss` on a model that gives these log-probabilities."""
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer")
    gather = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    fake: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=gather,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(tokens)
    out = SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": pairs.ref_chosen_P,
        "ref_rejected_logps": pairs.ref_rejected_P,
    }
    return float(trainer_module.DPOTrainer._compute_loss(fake, lambda **_: out, inputs, False))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_robust_and_ipo_are_trls(seed: int) -> None:
    pairs, tokens, mask = logprobs(seed)
    got = {
        "sigmoid": dpo_loss(pairs, beta=0.3),
        "robust": robust_dpo_loss(pairs, beta=0.3, label_smoothing=0.2),
        "ipo": ipo_loss(pairs, beta=0.3),
    }
    for kind, losses_P in got.items():
        assert float(losses_P.mean()) == pytest.approx(trl_dpo(tokens, mask, pairs, kind, 0.3, 0.2), abs=1e-6), kind


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simpo_conservative_and_orpo_are_trls(seed: int) -> None:
    pairs, _, _ = logprobs(seed)
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    device = SimpleNamespace(device="cpu")
    means = pairs.chosen_P / pairs.chosen_lengths_P, pairs.rejected_P / pairs.rejected_lengths_P
    fake = SimpleNamespace(
        alpha=0.0, accelerator=device, beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo"
    )
    want = cpo.CPOTrainer.cpo_loss(fake, *means)[0]
    torch.testing.assert_close(simpo_loss(pairs, beta=2.0, gamma=0.7), want, atol=1e-6, rtol=0)
    # CPO's smoothed sigmoid of the log-ratios is conservative DPO.
    fake.loss_type, fake.label_smoothing = "sigmoid", 0.15
    ratios = pairs.chosen_P - pairs.ref_chosen_P, pairs.rejected_P - pairs.ref_rejected_P
    want = cpo.CPOTrainer.cpo_loss(fake, *ratios)[0]
    torch.testing.assert_close(dpo_loss(pairs, beta=2.0, label_smoothing=0.15), want, atol=1e-6, rtol=0)
    odds = orpo.ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.2, accelerator=device), *means)[0]
    torch.testing.assert_close(orpo_loss(pairs, beta=0.2), (-means[0] - odds).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_kto_is_trls_whatever_the_sign_of_the_divergence(shift: float) -> None:
    """`KTOTrainer._compute_loss` on the same answers, with the mismatched ones' log-probabilities given."""
    trainer_module = pytest.importorskip("trl.trainer.kto_trainer")
    pairs, tokens, mask = logprobs(4)
    own = tokens.clone().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    reference = torch.cat([pairs.ref_chosen_P, pairs.ref_rejected_P])
    mismatched = -8 * torch.rand(8, generator=draw, dtype=torch.float64)
    fake: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: mismatched + shift,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(tokens)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor([True] * 4 + [False] * 4),
        "ref_logps": reference,
        "ref_KL_logps": mismatched,
    }
    out = SimpleNamespace(log_probs=own, entropy=zeros, mean_logits=zeros)
    want = trainer_module.KTOTrainer._compute_loss(fake, lambda **_: out, inputs, False)
    want.backward()
    sums = tokens.sum(1).requires_grad_()
    ours = PairLogprobs(
        sums[:4],
        sums[4:],
        pairs.ref_chosen_P,
        pairs.ref_rejected_P,
        pairs.chosen_lengths_P,
        pairs.rejected_lengths_P,
    )
    divergence = torch.tensor(shift, dtype=torch.float64).clamp(min=0)
    got = kto_loss(ours, beta=0.3, divergence=divergence).mean()
    got.backward()
    assert got.item() == pytest.approx(want.item(), abs=1e-9)
    torch.testing.assert_close(sums.grad, own.grad[:, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_kto_starts_at_a_half_and_its_divergence_is_the_whole_steps(micro_batches: int) -> None:
    pairs = encoded(3, 5)

    def train(pieces: int) -> tuple[list[dict[str, Any]], float, dict[str, Tensor]]:
        config = DpoConfig(
            loss="kto", beta=1.0, batch_pairs=5, warmup_steps=0, learning_rate=3e-2, micro_batches=pieces
        )
        decoder = build_decoder(SHAPE, 4)
        reference, kto = reference_logprobs(decoder, pairs), KtoReference(decoder, pairs)
        trainer = Trainer(decoder, config)
        step = dpo_step(trainer, PairStream(pairs, batch_pairs=5, seed=0), reference, config, kto)
        rows = []
        for number in range(3):
            trainer.set_step(number)
            rows.append(dict(step(number).metrics))
        loss = float(measure_dpo(decoder, pairs, reference, config, kto)[0].mean())
        return rows, loss, decoder.state_dict()

    (whole, loss, weights), (cut, cut_loss, cut_weights) = train(1), train(micro_batches)
    assert whole[0]["train/loss"] == pytest.approx(0.5, abs=1e-6) and whole[0]["dpo/divergence"] == pytest.approx(0.0)
    assert loss < whole[0]["train/loss"] - 0.01
    for a, b in zip(whole, cut, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-5)
        assert b["dpo/divergence"] == pytest.approx(a["dpo/divergence"], abs=1e-4)
    assert cut_loss == pytest.approx(loss, abs=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(cut_weights[name], value, atol=2e-4, rtol=0, msg=name)


def test_dpo_is_log_two_at_the_reference_and_falls_with_the_margin() -> None:
    pairs, _, _ = logprobs(0)
    same = PairLogprobs(
        pairs.chosen_P,
        pairs.rejected_P,
        pairs.chosen_P,
        pairs.rejected_P,
        pairs.chosen_lengths_P,
        pairs.rejected_lengths_P,
    )
    assert dpo_loss(same, beta=0.1).tolist() == pytest.approx([math.log(2)] * 4)
    order = pairs.margins().argsort()
    assert (dpo_loss(pairs, beta=0.1)[order].diff() < 0).all()


def test_bradley_terry_is_trls_with_centering() -> None:
    """TRL's RewardTrainer: mean of -logsigmoid(r_w - r_l) plus the coefficient times mean (r_w + r_l)^2."""
    trainer_module = pytest.importorskip("trl.trainer.reward_trainer")
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 1, generator=draw, dtype=torch.float64)
    fake: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.03),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 2)}
    want = trainer_module.RewardTrainer.compute_loss(fake, lambda **_: SimpleNamespace(logits=rewards), inputs)
    got = bradley_terry_loss(rewards[:4, 0], rewards[4:, 0], 0.03) / 4
    assert float(got) == pytest.approx(float(want), abs=1e-9)


SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)


def encoded(seed: int, count: int) -> list[EncodedPair]:
    draw = torch.Generator().manual_seed(seed)

    def tokens() -> tuple[int, ...]:
        length = int(torch.randint(1, 9, (1,), generator=draw))
        return tuple(torch.randint(0, 64, (length,), generator=draw).tolist())

    pair = PreferencePair("p", "s", "train", (Message("user", "q"),), "c", "r")
    return [EncodedPair(pair, tokens(), tokens(), tokens()) for _ in range(count)]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo"])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(loss: Any) -> None:
    pairs, config = encoded(1, 5), DpoConfig(loss=loss)
    reference = reference_logprobs(build_decoder(SHAPE, 3), pairs)

    def gradients(parts: list[list[int]]) -> list[Tensor]:
        decoder = build_decoder(SHAPE, 4)
        for part in parts:
            batch = build_pair_batch([pairs[i] for i in part])
            sums, lengths = answer_logprobs(decoder, batch)[0].view(-1, 2), batch.lengths_S.view(-1, 2)
            ref = reference[part]
            own = PairLogprobs(sums[:, 0], sums[:, 1], ref[:, 0], ref[:, 1], lengths[:, 0], lengths[:, 1])
            (preference_loss(own, config).sum() / 5).backward()
        return [p.grad for p in decoder.parameters() if p.grad is not None]

    whole, cut = gradients([[0, 1, 2, 3, 4]]), gradients([[0, 1], [2], [3, 4]])
    assert max(float(g.abs().max()) for g in whole) > 1e-4
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_an_answers_reward_does_not_depend_on_its_neighbours() -> None:
    pairs = encoded(2, 4)
    model = reward_model_from(build_decoder(SHAPE, 0), 1)
    together = score_pairs(model, pairs)
    for pair, row in zip(pairs, together, strict=True):
        alone = [
            score_answers(model, [(pair.prompt_ids, [side])])[0][0] for side in (pair.chosen_ids, pair.rejected_ids)
        ]
        assert [row.chosen_reward, row.rejected_reward] == pytest.approx(alone, abs=1e-6)
        assert (row.chosen_tokens, row.rejected_tokens) == (len(pair.chosen_ids), len(pair.rejected_ids))
