"""The policy loss and its gradient against TRL's `GRPOTrainer._compute_loss` on the same tensors, padded there."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tafkir.recipe.rl import PolicyLossTable
from tafkir.train.losses import policy_loss

LENGTHS = [3, 7, 1, 5]
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    return pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer


def draw_tokens(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)
    old = -2 * torch.rand(size, generator=draw)
    return {
        "old": old,
        "logprobs": old + 0.3 * torch.randn(size, generator=draw),
        "sampling": old + 0.7 * torch.randn(size, generator=draw),
        "ref": old + 0.2 * torch.randn(size, generator=draw),
        "advantages": torch.randn(len(LENGTHS), generator=draw),
    }


def pad(values: Tensor) -> Tensor:
    return pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def trl_loss(cls: Any, tokens: dict[str, Tensor], weights: Tensor | None, **settings: Any) -> tuple[float, Tensor]:
    """TRL's loss of the padded batch in one micro-batch, and its gradient in the flat log-probabilities."""
    leaf = tokens["logprobs"].clone().requires_grad_()
    trainer = cls.__new__(cls)
    mask = pad(torch.ones(sum(LENGTHS)))
    defaults: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "args": SimpleNamespace(
            use_bias_correction_kl=False, delta=settings.pop("delta", None), steps_per_generation=1
        ),
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": weights is not None,
        "vllm_importance_sampling_correction": weights is not None,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
        ),
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (pad(leaf), torch.zeros_like(mask), None),
    }
    for name, value in (defaults | settings).items():
        object.__setattr__(trainer, name, value)
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": tokens["advantages"],
        "old_per_token_logps": pad(tokens["old"]),
        "ref_per_token_logps": pad(tokens["ref"]),
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    loss = cls._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def our_loss(tokens: dict[str, Tensor], keys: dict[str, Any]) -> tuple[float, Tensor]:
    leaf = tokens["logprobs"].clone().requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    out = policy_loss(
        leaf,
        tokens["old"],
        tokens["sampling"],
        tokens["advantages"][sequence],
        sequence,
        torch.tensor(LENGTHS),
        config=PolicyLossTable.model_validate({"max_completion_tokens": MAX_TOKENS, **keys}),
        ref_logprobs_T=tokens["ref"],
    )
    out.loss.backward()
    assert leaf.grad is not None
    return out.loss.item(), leaf.grad


NONE: dict[str, Any] = {"acceptance": {"kind": "none"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "grpo with k3": ({"kl": {"coef": 0.1}}, {"loss_type": "grpo", "beta": 0.1}),
    "dapo": ({"reduction": "token_mean", "clip_eps_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"reduction": "constant"}, {"loss_type": "dr_grpo"}),
    "cispo": (
        {"surrogate": "cispo", "reduction": "token_mean", "clip_eps_low": 1.0, "clip_eps_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "gspo": (
        {"surrogate": "gspo", "clip_eps_low": 0.03, "clip_eps_high": 0.04},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_without_a_correction(trainer_class: Any, case: str, seed: int) -> None:
    ours, theirs = CASES[case]
    tokens = draw_tokens(seed)
    loss, gradient = our_loss(tokens, NONE | ours)
    want, want_gradient = trl_loss(trainer_class, tokens, None, **theirs)
    assert loss == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(gradient, want_gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("region", "mode", "low", "high"),
    [
        ({"kind": "icepop"}, "token_mask", 0.5, 5.0),
        ({"kind": "tis", "cap": 1.5}, "token_truncate", None, 1.5),
        ({"kind": "seq_tis", "cap": 1.5}, "sequence_truncate", None, 1.5),
        ({"kind": "mis", "cap": 3.0}, "sequence_mask", None, 3.0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corrections(
    trainer_class: Any, region: dict[str, Any], mode: str, low: float | None, high: float, seed: int
) -> None:
    """TRL multiplies by what `vllm_importance_sampling_mode` makes of the ratios; its modes are written out here."""
    tokens = draw_tokens(seed)
    difference = pad(tokens["old"] - tokens["sampling"])
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        weights = ratio.clamp(min=low, max=high)
    else:
        weights = ratio.masked_fill((ratio < (low or 0.0)) | (ratio > high), 0.0)
    loss, gradient = our_loss(tokens, {"acceptance": region})
    want, want_gradient = trl_loss(trainer_class, tokens, weights)
    assert loss == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(gradient, want_gradient, atol=1e-6, rtol=0)
