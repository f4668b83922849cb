"""Surrogates, reductions and KL estimators in the policy loss, against published vectors and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.recipe.rl import KlConfig, KlEstimator, PolicyLossTable, Reduction, SeqTis, Tis
from tafkir.train.losses import PolicyLoss, kl_penalty, policy_loss

# NeMo-RL's pattern: ratios 0.5, 1.0 and 1.5 to the old policy, advantages 1, -1 and 2.
PREV = torch.tensor([-1.0, -1.0, -1.0])
CURR = PREV + torch.tensor([0.5, 1.0, 1.5]).log()
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0])
GENERATED = torch.tensor([-0.5, -1.5, -0.8])
OFF = {"acceptance": {"kind": "none"}}


def loss_of(
    keys: dict[str, Any],
    *,
    curr: Tensor = CURR,
    prev: Tensor = PREV,
    generated: Tensor | None = None,
    advantages: Tensor = ADVANTAGES,
    lengths: list[int] | None = None,
    ref: Tensor | None = None,
) -> PolicyLoss:
    lengths = lengths or [len(curr)]
    return policy_loss(
        curr,
        prev,
        prev if generated is None else generated,
        advantages,
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        torch.tensor(lengths),
        config=PolicyLossTable.model_validate(keys),
        ref_logprobs_T=ref,
    )


def test_ppo_clips_and_clips_higher() -> None:
    out = loss_of(OFF)
    assert out.loss.item() == pytest.approx((-0.5 + 1.0 - 2.4) / 3, abs=1e-6)
    assert out.clipped_T.tolist() == [False, False, True]
    higher = loss_of(OFF | {"clip_eps_high": 0.28})
    assert higher.loss.item() == pytest.approx((-0.5 + 1.0 - 2 * 1.28) / 3, abs=1e-6)


def test_dual_clip_of_the_nemo_rl_vector() -> None:
    """Ratios 0.5, 1 and 10, advantages 1, -1 and -4, c = 3: the last loss falls from 40 to 12."""
    prev = torch.tensor([-1.0, -1.0, -3.0])
    curr = prev + torch.tensor([0.5, 1.0, 10.0]).log()
    advantages = torch.tensor([1.0, -1.0, -4.0])
    out = loss_of(OFF | {"dual_clip": 3.0}, curr=curr, prev=prev, advantages=advantages)
    assert out.loss.item() == pytest.approx((-0.5 + 1.0 + 12.0) / 3, abs=1e-5)
    assert out.clipped_T.tolist() == [False, False, True]
    plain = loss_of(OFF, curr=curr, prev=prev, advantages=advantages)
    assert plain.loss.item() == pytest.approx((-0.5 + 1.0 + 40.0) / 3, abs=1e-5)


def test_cispo_of_the_nemo_rl_vector_keeps_every_gradient() -> None:
    curr = CURR.clone().requires_grad_()
    out = loss_of(OFF | {"surrogate": "cispo"}, curr=curr)
    clipped = [0.8, 1.0, 1.2]
    want = [-a * r * lp for a, r, lp in zip(ADVANTAGES.tolist(), clipped, CURR.tolist(), strict=True)]
    assert out.loss.item() == pytest.approx(sum(want) / 3, abs=1e-6)
    out.loss.backward()
    torch.testing.assert_close(curr.grad, -ADVANTAGES * torch.tensor(clipped) / 3, atol=1e-6, rtol=0)
    assert out.clipped_T.tolist() == [True, False, True]
    # With the weight of the sampling engine, as NeMo-RL's recipe has it.
    weighted = loss_of({"surrogate": "cispo", "acceptance": Tis(cap=1e9).model_dump()}, generated=GENERATED)
    k = (PREV - GENERATED).exp().tolist()
    assert weighted.loss.item() == pytest.approx(sum(a * b for a, b in zip(k, want, strict=True)) / 3, abs=1e-6)


def test_gspo_of_the_nemo_rl_vectors() -> None:
    """s = 0.75^(1/3) = 0.9086: -0.6057; a second completion at s = 2.4697, clipped at 1.2: -0.4912."""
    s = 0.75 ** (1 / 3)
    out = loss_of(OFF | {"surrogate": "gspo"})
    assert out.loss.item() == pytest.approx(-2 * s / 3, abs=1e-6)
    assert out.loss.item() == pytest.approx(-0.6057, abs=5e-5)
    two = loss_of(
        OFF | {"surrogate": "gspo"},
        curr=CURR.repeat(2),
        prev=torch.tensor([-1.0] * 3 + [-2.0] * 3),
        advantages=ADVANTAGES.repeat(2),
        lengths=[3, 3],
    )
    second = s * math.e
    assert two.loss.item() == pytest.approx((-2 * s / 3 + (-1.2 + second - 2.4) / 3) / 2, abs=1e-6)
    assert two.loss.item() == pytest.approx(-0.4912, abs=5e-5)
    # Truncated by the product of k = exp(-0.2): -0.4959 in full, -0.4846 at 0.8.
    for cap, want in ((10.0, -0.4959), (0.8, -0.4846)):
        keys = {"surrogate": "gspo", "acceptance": SeqTis(cap=cap).model_dump()}
        got = loss_of(keys, generated=GENERATED).loss.item()
        assert got == pytest.approx(-2 * s / 3 * min(cap, math.exp(-0.2)), abs=1e-6)
        assert got == pytest.approx(want, abs=5e-5)


def test_gspo_has_the_gradient_of_the_sequence_ratio() -> None:
    draw = torch.Generator().manual_seed(2)
    lengths = [3, 5]
    sequence = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    prev = -torch.rand(8, generator=draw)
    start = prev + 0.1 * torch.randn(8, generator=draw)
    advantages = torch.tensor([1.0, -0.5])[sequence]
    curr = start.clone().requires_grad_()
    loss_of(OFF | {"surrogate": "gspo"}, curr=curr, prev=prev, advantages=advantages, lengths=lengths).loss.backward()
    leaf = start.clone().requires_grad_()
    ratios = [(leaf - prev)[sequence == i].mean().exp() for i in range(2)]
    sides = [(1.0, ratios[0]), (-0.5, ratios[1])]
    (-sum(torch.minimum(a * s, a * s.clamp(0.8, 1.2)) for a, s in sides) / 2).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(curr.grad, leaf.grad, atol=1e-6, rtol=0)


def test_reinforce_of_the_nemo_rl_vector() -> None:
    """Advantages 1, -1 and 2 at log-probabilities -0.5, -1 and -1.5: 2.5 / 3."""
    curr = torch.tensor([-0.5, -1.0, -1.5], requires_grad=True)
    out = loss_of(OFF | {"surrogate": "reinforce"}, curr=curr, prev=torch.zeros(3))
    assert out.loss.item() == pytest.approx(2.5 / 3, abs=1e-6)
    out.loss.backward()
    torch.testing.assert_close(curr.grad, -ADVANTAGES / 3)


def test_tis_of_the_nemo_rl_vector() -> None:
    got = loss_of({"acceptance": Tis(cap=0.8).model_dump()}, generated=GENERATED).loss.item()
    assert got == pytest.approx((-0.5 * math.exp(-0.5) + 0.8 - 0.8 * 2.4) / 3, abs=1e-6)
    assert got == pytest.approx(-0.4744, abs=5e-5)


@pytest.mark.parametrize(
    ("reduction", "want"),
    [("sequence_mean", (1 / 1 + 5 / 3) / 2), ("token_mean", 6 / 4), ("constant", 6 / (2 * 10))],
)
def test_reductions(reduction: Reduction, want: float) -> None:
    """Completions of one and three tokens, with values 1 and 1, 2, 2, and a length limit of ten."""
    zero = torch.zeros(4)
    keys = OFF | {"reduction": reduction, "max_completion_tokens": 10}
    out = loss_of(keys, curr=zero, prev=zero, advantages=-torch.tensor([1.0, 1.0, 2.0, 2.0]), lengths=[1, 3])
    assert out.loss.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "want"),
    [
        ("k1", [-1.0, 14.0, 29.0]),
        ("k2", [0.5, 98.0, 420.5]),
        ("k3", [math.e - 2, math.exp(-14) + 13, math.exp(-29) + 28]),
    ],
)
def test_kl_of_the_nemo_rl_vectors(estimator: KlEstimator, want: list[float]) -> None:
    got = kl_penalty(torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0]), estimator)
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-6)


def test_kl_penalty_of_the_nemo_rl_vector() -> None:
    """Differences of -1, 0 and 1 at a weight of 0.1: 0.0362."""
    curr, ref = torch.tensor([0.0, -1.0, -2.0]), torch.full((3,), -1.0)
    keys = OFF | {"kl": KlConfig(coef=0.1).model_dump()}
    got = loss_of(keys, curr=curr, prev=torch.zeros(3), advantages=torch.zeros(3), ref=ref).loss.item()
    assert got == pytest.approx(0.1 * (math.exp(-1) + math.e - 2) / 3, abs=1e-6)
    assert got == pytest.approx(0.0362, abs=5e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_switch_for_masked_tokens_leaves_them_no_gradient(estimator: KlEstimator) -> None:
    curr = torch.tensor([-1.0, -1.0], requires_grad=True)
    # A reference that is certain of another token would make exp overflow, were it read.
    ref, generated = torch.tensor([200.0, -2.0]), torch.tensor([-9.0, -1.0])
    keys = {"kl": {"coef": 0.5, "estimator": estimator, "masked_tokens": False}}
    out = loss_of(keys, curr=curr, prev=curr.detach(), generated=generated, advantages=torch.zeros(2), ref=ref)
    want = {"k1": 1.0, "k2": 0.5, "k3": math.exp(-1)}[estimator]
    assert out.loss.item() == pytest.approx(0.5 * want / 2, abs=1e-6)
    out.loss.backward()
    assert curr.grad is not None and curr.grad[0] == 0 and curr.grad[1] != 0


def test_dropped_tokens_overflow_nowhere() -> None:
    """The masked token's own ratio would be e^400; neither loss nor gradient may notice."""
    for surrogate in ("ppo", "cispo"):
        curr = torch.tensor([0.0, -1.0], requires_grad=True)
        prev = torch.tensor([-400.0, -1.0])
        generated = torch.tensor([-1.0, -1.0])
        out = loss_of({"surrogate": surrogate}, curr=curr, prev=prev, generated=generated, advantages=torch.ones(2))
        out.loss.backward()
        assert out.masked_T.tolist() == [True, False]
        assert curr.grad is not None and curr.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("surrogate", ["ppo", "cispo", "gspo", "reinforce"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("kind", ["none", "tis", "seq_tis", "mis", "icepop", "kpop", "dppo_tv", "geo_rs"])
def test_every_combination_adds_up_over_micro_batches(surrogate: str, reduction: str, kind: str) -> None:
    """In any order of completions and any split of them, loss and gradient stay within 1e-6."""
    draw = torch.Generator().manual_seed(5)
    lengths = [4, 1, 6, 2, 3]
    size = sum(lengths)
    prev = -2 * torch.rand(size, generator=draw)
    start = prev + 0.2 * torch.randn(size, generator=draw)
    generated = prev + (0.01 if kind == "geo_rs" else 1.0) * torch.randn(size, generator=draw)
    ref = prev + 0.1 * torch.randn(size, generator=draw)
    advantages = torch.repeat_interleave(torch.randn(5, generator=draw), torch.tensor(lengths))
    keys = {"surrogate": surrogate, "reduction": reduction, "acceptance": {"kind": kind}, "kl": {"coef": 0.1}}
    parts = torch.arange(size).split(lengths)

    def whole(order: list[list[int]]) -> tuple[float, Tensor]:
        leaf, total = start.clone().requires_grad_(), 0.0
        for batch in order:
            at = torch.cat([parts[i] for i in batch])
            out = policy_loss(
                leaf[at],
                prev[at],
                generated[at],
                advantages[at],
                torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([lengths[i] for i in batch])),
                torch.tensor([lengths[i] for i in batch]),
                config=PolicyLossTable.model_validate(keys),
                num_sequences=5,
                num_tokens=size,
                ref_logprobs_T=ref[at],
            )
            out.loss.backward()
            total += out.loss.item()
        assert leaf.grad is not None
        return total, leaf.grad

    value, gradient = whole([[0, 1, 2, 3, 4]])
    for order in ([[0], [1], [2], [3], [4]], [[3, 0], [4, 2, 1]]):
        again, other = whole(order)
        assert again == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=0)
