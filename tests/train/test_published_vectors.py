"""Losses, advantages and masks on the inputs that other frameworks' tests publish, recomputed by hand to 1e-6.

Inputs are those of the named test; where a framework sums and we average, the count is divided out. The vectors of
NeMo-RL's surrogates and KL estimators stand in `test_surrogates.py`, of its ratio weights in `test_acceptance.py`, of
verl's and NeMo-RL's IcePop in `test_losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.recipe.rl import PolicyLossTable, Reduction
from tafkir.train.advantages import advantages
from tafkir.train.dpo import PairLogprobs, dpo_loss
from tafkir.train.losses import PolicyLoss, kl_penalty, policy_loss, reduce_tokens
from tafkir.train.mismatch import mismatch_metrics

OFF: dict[str, Any] = {"acceptance": {"kind": "none"}}
TOKENS: dict[str, Any] = OFF | {"reduction": "token_mean"}
Rows = Sequence[Sequence[float]]


def loss_of(
    keys: dict[str, Any], logprobs: Rows, old: Rows, advantages: Rows, sampling: Rows | None = None
) -> tuple[PolicyLoss, Tensor]:
    """The loss of completions, one row each without padding; and its gradient in the log-probabilities."""
    lengths = torch.tensor([len(row) for row in logprobs])
    leaf = _flat(logprobs).requires_grad_()
    out = policy_loss(
        leaf,
        _flat(old),
        _flat(sampling if sampling is not None else old),
        _flat(advantages),
        torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        lengths,
        config=PolicyLossTable.model_validate(keys),
    )
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def _flat(rows: Rows) -> Tensor:
    return torch.tensor([x for row in rows for x in row])


def reduced(rows: Rows, reduction: Reduction, *, max_tokens: int = 1, whole: Rows | None = None) -> float:
    """The reduction of per-token values, with the denominators of the `whole` step."""
    lengths = torch.tensor([len(row) for row in rows])
    whole = rows if whole is None else whole
    values = reduce_tokens(
        _flat(rows),
        torch.repeat_interleave(torch.arange(len(rows)), lengths),
        lengths,
        reduction=reduction,
        num_sequences=len(whole),
        num_tokens=sum(map(len, whole)),
        max_tokens=max_tokens,
    )
    return float(values)


def close(got: float, want: float) -> None:
    assert got == pytest.approx(want, abs=1e-6)


# --- SkyRL: tests/train/algorithms/test_losses.py and tests/backends/skyrl_train/utils/test_ppo_utils.py --------------

SKY = {"logprobs": [[-1.69315, -1.0, -0.69741]], "old": [[-1.0, -1.0, -3.0]], "advantages": [[1.0, -1.0, -4.0]]}


def test_skyrl_dual_clip_and_cispo() -> None:
    """Ratios 0.5, 1 and 10: dual clip sums to 12.5, CISPO to -2.9930."""
    dual, _ = loss_of(TOKENS | {"dual_clip": 3.0}, **SKY)
    close(dual.loss.item(), (-math.exp(-0.69315) + 1.0 + 12.0) / 3)
    assert 3 * dual.loss.item() == pytest.approx(12.5, abs=1e-4)
    cispo, _ = loss_of(TOKENS | {"surrogate": "cispo"}, **SKY)
    close(cispo.loss.item(), (0.8 * 1.69315 - 1.0 - 4 * 1.2 * 0.69741) / 3)
    assert 3 * cispo.loss.item() == pytest.approx(-2.9930, abs=1e-4)


def test_skyrl_gspo_and_ppo_of_three_lengths() -> None:
    """`test_gspo_importance_sampling_levels`: completions of 5, 2 and 4 tokens; mean log-ratios 0.14, 1.3, 0.625."""
    log_ratios = [[1.2, -1.5, 0.7, 1.1, -0.8], [1.8, 0.8], [0.5, 1.3, -0.7, 1.4]]
    weights = [[1.5, 2.0, 1.0, 0.8, 0.5], [3.0, 1.5], [0.5, 0.8, 1.2, 2.5]]
    logprobs = [[-1.0 + x for x in row] for row in log_ratios]
    old = [[-1.0] * len(row) for row in log_ratios]
    gspo, _ = loss_of(TOKENS | {"surrogate": "gspo"}, logprobs, old, weights)
    close(gspo.loss.item(), -(math.exp(0.14) * 5.8 + 1.2 * 4.5 + 1.2 * 5.0) / 11)
    assert gspo.clipped_T.tolist() == [False] * 5 + [True] * 6
    ppo, _ = loss_of(TOKENS, logprobs, old, weights)
    flat = zip(chain(*log_ratios), chain(*weights), strict=True)
    terms = [min(math.exp(x), 1.2) * a for x, a in flat]
    close(ppo.loss.item(), -sum(terms) / 11)


@pytest.mark.parametrize(
    ("new", "old", "signs", "kept"),
    [
        ([-0.3, -2.0, -0.9], [-1.0, -1.0, -1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 1.0]),
        ([-2.0, -0.3], [-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]),
    ],
)
def test_skyrl_dppo_by_total_variation(
    new: list[float], old: list[float], signs: list[float], kept: list[float]
) -> None:
    """`test_dppo_policy_loss`, delta 0.2: minus the ratio times the advantage where the token stays."""
    keys = {"acceptance": {"kind": "dppo_tv", "delta": 0.2}, "reduction": "token_mean"}
    got, _ = loss_of(keys, [new], [new], [signs], [old])
    want = -sum(math.exp(a - b) * sign * keep for a, b, sign, keep in zip(new, old, signs, kept, strict=True))
    close(got.loss.item(), want / len(new))
    assert got.masked_T.tolist() == [keep == 0 for keep in kept]


def test_skyrl_kl_estimators() -> None:
    logprobs, reference = torch.tensor([0.2, 0.3], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
    for estimator, want in (("k1", 0.1), ("k2", 0.005), ("k3", math.exp(-0.1) - 0.9)):
        got = kl_penalty(logprobs, reference, estimator)  # type: ignore[arg-type]  # literals
        torch.testing.assert_close(got, torch.full_like(got, want), atol=1e-9, rtol=0)


def test_skyrl_advantages() -> None:
    """Two groups: rewards 6 and 3, 9 and 12."""
    rewards = torch.tensor([[6.0, 3.0], [9.0, 12.0]])
    assert advantages("rloo", rewards).tolist() == [[3.0, -3.0], [-3.0, 3.0]]
    assert advantages("dr_grpo", rewards).tolist() == [[1.5, -1.5], [-1.5, 1.5]]
    torch.testing.assert_close(
        advantages("grpo", rewards), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * (1.5 / (math.sqrt(4.5) + 1e-6))
    )


def test_skyrl_reductions_of_a_mini_batch() -> None:
    """`TestApplyLossReductionToAdvantagesMinibatch`: 3.6 over tokens, 2.25 over completions, 0.7 at a limit of ten."""
    close(reduced([[1.0, 2.0], [4.0, 5.0, 6.0]], "token_mean"), 3.6)
    close(reduced([[1.0, 2.0], [3.0]], "sequence_mean"), 2.25)
    close(reduced([[2.0, 3.0], [9.0]], "constant", max_tokens=10), 0.7)


# --- OpenRLHF: tests/test_loss_aggregation.py -------------------------------------------------------------------------


def test_openrlhf_aggregation_adds_up_over_ranks() -> None:
    """Theirs average over data-parallel ranks what each multiplied by their number; ours add up to the same."""
    tokens: Rows = [[1.0, 2.0], [3.0, 4.0, 5.0], [7.0]]
    parts = [reduced(part, "token_mean", whole=tokens) for part in (tokens[:2], tokens[2:])]
    close(sum(parts), 22 / 6)
    completions: Rows = [[1.0, 3.0], [2.0, 4.0], [8.0]]
    parts = [reduced(part, "sequence_mean", whole=completions) for part in (completions[:2], completions[2:])]
    close(sum(parts), 13 / 3)


def test_openrlhf_uneven_micro_batches_have_the_mean_of_all_tokens() -> None:
    """Two and five tokens: 28 / 7, which is not the mean of the two means."""
    whole: Rows = [[1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0]]
    close(reduced(whole[:1], "token_mean", whole=whole) + reduced(whole[1:], "token_mean", whole=whole), 4.0)
    assert (reduced(whole[:1], "token_mean") + reduced(whole[1:], "token_mean")) / 2 == pytest.approx(3.25)


def test_openrlhf_policy_loss_of_the_full_batch() -> None:
    """`test_policy_loss_token_mean_aggregation_matches_full_batch`; masked tokens are left out of the rows."""
    shifts: Rows = [[0.03, -0.04], [0.02, 0.05, -0.03], [0.04, -0.02]]
    logprobs: Rows = [[-0.20, -0.40], [-0.70, -0.30, -0.20], [-0.60, -0.50]]
    signs: Rows = [[1.0, -0.5], [0.3, -1.2, 0.5], [1.5, -0.7]]
    old = [[a - b for a, b in zip(row, own, strict=True)] for row, own in zip(logprobs, shifts, strict=True)]
    got, gradient = loss_of(TOKENS, logprobs, old, signs)
    terms = [a * math.exp(x) for row, own in zip(shifts, signs, strict=True) for x, a in zip(row, own, strict=True)]
    close(got.loss.item(), -sum(terms) / 7)
    torch.testing.assert_close(gradient, torch.tensor(terms) / -7, atol=1e-6, rtol=0)


# --- AReaL: tests/test_rejection_sampling.py, test_cispo_loss.py and test_functional.py -------------------------------


@pytest.mark.parametrize(
    ("region", "log_k", "weights"),
    [
        ({"kind": "icepop", "alpha": 0.0, "beta": 2.0}, [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]),
        ({"kind": "icepop", "alpha": 0.5, "beta": 2.0}, [0.0, -1.0, 0.0], [1.0, 0.0, 1.0]),
        ({"kind": "icepop", "alpha": 0.0, "beta": 1.5}, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ({"kind": "icepop", "alpha": 0.0, "beta": 2.0}, [math.log(2.0)], [2.0]),
        ({"kind": "tis", "cap": 2.0}, [0.0, 5.0, 0.0], [1.0, 2.0, 1.0]),
        ({"kind": "tis", "cap": 5.0}, [0.0, 2.0, 0.0], [1.0, 5.0, 1.0]),
        # the geometric means 1 and e; the mean log-ratio of 0.5 stays, at weight k a token
        ({"kind": "geo_rs", "low": 0.0, "high": 2.0}, [1.0], [0.0]),
        ({"kind": "geo_rs", "low": 0.0, "high": 5.0}, [0.0, 0.5, 1.0], [1.0, math.exp(0.5), math.e]),
    ],
)
def test_areal_rejection_sampling(region: dict[str, Any], log_k: list[float], weights: list[float]) -> None:
    """Bounds are inside, a clamp drops nothing, a mask leaves the denominator alone."""
    zeros = [0.0] * len(log_k)
    keys = {"acceptance": region, "reduction": "token_mean"}
    got, _ = loss_of(keys, [log_k], [log_k], [[1.0] * len(log_k)], [zeros])
    torch.testing.assert_close(got.weight_T, torch.tensor(weights), atol=1e-6, rtol=1e-6)
    assert got.masked_T.tolist() == [weight == 0 for weight in weights]
    close(got.loss.item(), -sum(weights) / len(weights))


def test_areal_log_probabilities_of_minus_infinity_make_no_nan() -> None:
    """`test_nan_from_inf_logprobs`. AReaL keeps such a token at a ratio of one; here it is dropped and counted."""
    infinite = [0.0, -math.inf]
    got, gradient = loss_of({"acceptance": {"kind": "icepop", "beta": 5.0}}, [[0.0, -1.0]], [infinite], [[1.0, 1.0]])
    assert got.masked_T.tolist() == [False, True] and got.nonfinite == 1
    close(got.loss.item(), -0.5)
    assert gradient.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (1.0, 4.0)])
@pytest.mark.parametrize("decoupled", [False, True])
def test_areal_cispo_in_both_bands(low: float, high: float, decoupled: bool) -> None:
    """Value, clipped tokens and a gradient of -sg(clip(r)) A / N; decoupled, times exp(behaviour log-ratio)."""
    log_ratio, logprobs = [-2.0, -0.5, 0.0, 0.3, 1.5], [-1.0, -2.0, -0.3, -1.2, -0.7]
    signs, behaviour = [1.0, -2.0, 0.5, 3.0, -1.0], [0.2, -0.4, 0.0, 0.1, -0.3]
    old = [a - b for a, b in zip(logprobs, log_ratio, strict=True)]
    sampling = [a - b for a, b in zip(old, behaviour, strict=True)]
    region = {"kind": "tis", "cap": 100.0} if decoupled else {"kind": "none"}
    keys = {"surrogate": "cispo", "clip_eps_low": low, "clip_eps_high": high, "acceptance": region}
    got, gradient = loss_of(keys | {"reduction": "token_mean"}, [logprobs], [old], [signs], [sampling])
    clipped = [min(max(math.exp(x), 1 - low), 1 + high) for x in log_ratio]
    weights = [math.exp(x) if decoupled else 1.0 for x in behaviour]
    slope = [-c * a * w / 5 for c, a, w in zip(clipped, signs, weights, strict=True)]
    close(got.loss.item(), sum(s * x for s, x in zip(slope, logprobs, strict=True)))
    torch.testing.assert_close(gradient, torch.tensor(slope), atol=1e-6, rtol=0)
    assert got.clipped_T.tolist() == [c != math.exp(x) for c, x in zip(clipped, log_ratio, strict=True)]


def test_areal_sequence_level_ratios() -> None:
    """Packed completions of four tokens, log-ratios 0.5 and 1: geometric means 1.6487 and 2.7183, both above 1.2."""
    keys = TOKENS | {"surrogate": "gspo"}
    logprobs, old = [[-0.5] * 4, [-1.0] * 4], [[-1.0] * 4, [-2.0] * 4]
    clipped, _ = loss_of(keys, logprobs, old, [[1.0] * 4] * 2)
    close(clipped.loss.item(), -1.2)
    wide, _ = loss_of(keys | {"clip_eps_high": 10.0}, logprobs, old, [[1.0] * 4] * 2)
    close(wide.loss.item(), -(math.exp(0.5) + math.e) / 2)
    # Ratio one, advantages 1, 2, 3, 4 and four times 0.5: -12 / 8.
    level, _ = loss_of(keys, old, old, [[1.0, 2.0, 3.0, 4.0], [0.5] * 4])
    close(level.loss.item(), -1.5)


# --- verl: tests/trainer/ppo/test_loss_aggregation_on_cpu.py, test_rollout_corr.py, test_core_algos_on_cpu.py ---------


def test_verl_constant_reduction_adds_up_over_ranks() -> None:
    """`seq-mean-token-sum-norm`: 30 / (3 * 4), at a scale of ten 1; its gradient; an empty row that counts."""
    rows: Rows = [[1.0, 2.0], [5.0, 6.0, 7.0], [9.0]]
    close(reduced(rows, "constant", max_tokens=4), 2.5)
    close(reduced(rows, "constant", max_tokens=10), 1.0)
    keys = OFF | {"reduction": "constant", "surrogate": "reinforce", "max_completion_tokens": 8}
    _, gradient = loss_of(keys, rows, rows, [[-1.0] * len(row) for row in rows])
    torch.testing.assert_close(gradient, torch.full((6,), 1 / 24))
    four: Rows = [[1.0, 2.0], [4.0], [7.0, 8.0, 9.0], [10.0, 12.0]]
    parts = [reduced(part, "constant", max_tokens=6, whole=four) for part in (four[:2], four[2:])]
    close(sum(parts), 53 / 24)
    close(reduced([[1.0, 2.0], [], [7.0]], "constant", max_tokens=3), 10 / 9)


def test_verl_mask_mode_drops_by_the_band() -> None:
    """Ratios 0.368 and 1.649 at [0.5, 2]: the first completion goes, the second stays at weight k."""
    old, sampling = [[-2.0] * 5] * 2, [[-1.0] * 5, [-2.5] * 5]
    keys = {"acceptance": {"kind": "icepop", "alpha": 0.5, "beta": 2.0}}
    got, _ = loss_of(keys, old, old, [[1.0] * 5] * 2, sampling)
    want = torch.tensor([0.0] * 5 + [math.exp(0.5)] * 5)
    torch.testing.assert_close(got.weight_T, want, atol=1e-6, rtol=0)
    assert got.masked_T.double().mean().item() == 0.5
    close(got.loss.item(), -math.exp(0.5) / 2)


def test_verl_grpo_of_rewards_that_hardly_differ() -> None:
    """`test_grpo_vectorized_matches_original_for_low_variance_rewards`: +-0.6195 with a deviation of 7.1e-6."""
    rewards = torch.tensor([[1.0, 1.00001], [2.0, 2.00001]], dtype=torch.float64)
    half = 0.5e-5 / (1e-5 / math.sqrt(2) + 1e-6)
    want = torch.tensor([[-half, half]] * 2, dtype=torch.float64)
    torch.testing.assert_close(advantages("grpo", rewards), want, atol=1e-6, rtol=0)
    assert half == pytest.approx(0.6195, abs=5e-5)


# --- NeMo-RL: tests/unit/algorithms/test_loss_functions.py ------------------------------------------------------------


def test_nemo_rl_importance_weights_in_full() -> None:
    """Weights 0.6065, 1.6487 and 0.8187 on losses -0.5, 1 and -2.4: -0.2065."""
    logprobs = [[-1 + math.log(x) for x in (0.5, 1.0, 1.5)]]
    keys = {"acceptance": {"kind": "tis", "cap": 1e6}}
    got, _ = loss_of(keys, logprobs, [[-1.0] * 3], [[1.0, -1.0, 2.0]], [[-0.5, -1.5, -0.8]])
    close(got.loss.item(), (-0.5 * math.exp(-0.5) + math.exp(0.5) - 2.4 * math.exp(-0.2)) / 3)
    assert got.loss.item() == pytest.approx(-0.2065, abs=5e-5)


def test_nemo_rl_sequence_mask_and_its_minus_infinity() -> None:
    """`seq-mask-tis`: -2/3 e^0.0005; with a sampled log-probability of -inf the loss stays finite."""
    keys = {"acceptance": {"kind": "geo_rs", "low": 0.999, "high": 1.002}}
    old, signs = [[-1.0] * 3], [[1.0, -1.0, 2.0]]
    got, _ = loss_of(keys, old, old, signs, [[-1.0005] * 3])
    close(got.loss.item(), -2 / 3 * math.exp(0.0005))
    broken, _ = loss_of(keys, old, old, signs, [[-1.0005, -math.inf, -1.0005]])
    assert broken.loss.item() == 0.0 and broken.nonfinite == 1


def test_nemo_rl_tis_and_its_share_out_of_the_band() -> None:
    """Ratios 1, 3, 0.5 at a cap of 2: one third. Ratios 0.1, 1, 3, all advantages one: -(0.1 + 1 + 2) / 3."""
    log_k = torch.tensor([1.0, 3.0, 0.5]).log()
    none = torch.zeros(3, dtype=torch.bool)
    found = mismatch_metrics(log_k, torch.zeros(3), none, torch.zeros(3, dtype=torch.int64), 1, low=0.0, high=2.0)
    close(found["mismatch/out_of_band"], 1 / 3)
    ratios = [[math.log(x) for x in (0.1, 1.0, 3.0)]]
    got, _ = loss_of({"acceptance": {"kind": "tis", "cap": 2.0}}, ratios, ratios, [[1.0] * 3], [[0.0] * 3])
    close(got.loss.item(), -3.1 / 3)


def test_nemo_rl_dpo_of_equal_sides() -> None:
    """Uniform over 16 tokens, both sides alike: log 2."""
    side = torch.tensor([2 * math.log(1 / 16)])
    length = torch.tensor([2])
    pairs = PairLogprobs(side, side, torch.zeros(1), torch.zeros(1), length, length)
    close(dpo_loss(pairs, beta=0.1).item(), math.log(2))
