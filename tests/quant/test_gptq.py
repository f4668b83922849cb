"""GPTQ and local-Hessian scales against slow reimplementations in numpy, brute force, and what theory promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import E2M1_VALUES, Nvfp4, dequantize_nvfp4, nvfp4_step
from tafkir.ops.nvfp4_scales import search_nvfp4
from tafkir.quant.gptq import gptq_nvfp4, output_error
from tafkir.quant.hessian import ABOVE, BELOW, block_moments, search_local_hessian

GRID = np.array(sorted({sign * value for value in E2M1_VALUES for sign in (-1.0, 1.0)}))


def inputs(tokens: int, width: int, seed: int) -> Tensor:
    """Correlated, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    scale = torch.randn(width, generator=generator).exp()
    return (torch.randn(tokens, width, generator=generator) @ mix + torch.randn(width, generator=generator)) * scale


def weights(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1000)) * 0.05


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def nearest(ratio: np.ndarray) -> np.ndarray:
    return GRID[np.abs(np.clip(ratio, -6, 6)[..., None] - GRID).argmin(-1)]


def plain_gptq(weight: Tensor, chosen: Nvfp4, hessian: Tensor, damping: float, order: np.ndarray) -> np.ndarray:
    """Column after column as in Optimal Brain Quantization: the inverse is updated by elimination, not factorised."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    steps = nvfp4_step(chosen.scale, chosen.global_scale).double().numpy().repeat(16, 1)
    inverse = np.linalg.inv(h + damping * h.diagonal().mean() * np.eye(len(h)))
    out = np.zeros_like(w)
    for i in order:
        out[:, i] = nearest(w[:, i] / steps[:, i]) * steps[:, i]
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_quantization_column_by_column(act_order: bool) -> None:
    weight, hessian = weights(24, 160, 0), hessian_of(inputs(600, 160, 0))
    chosen = search_nvfp4(weight, "four_over_six")
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act_order else np.arange(160)
    expected = plain_gptq(weight, chosen, hessian, 0.01, order)
    found = dequantize_nvfp4(*gptq_nvfp4(weight, chosen, hessian, act_order=act_order))
    # A few of 3,840 codes lie so near to the middle that float32 takes the other side.
    assert (np.abs(found.numpy() - expected) < 1e-6).mean() > 0.99
    before, after = (float(output_error(weight, torch.as_tensor(q), hessian).sum()) for q in (expected, found))
    assert after == pytest.approx(before, rel=0.01)
    rounded = float(output_error(weight, dequantize_nvfp4(*chosen), hessian).sum())
    assert after < 0.7 * rounded


@pytest.mark.parametrize(("tokens", "scales"), [(400, "max"), (7, "mse"), (1, "four_over_six")])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_never_worse_than_the_nearest_on_its_own_data(tokens: int, scales: str, act_order: bool) -> None:
    for seed in range(4):
        weight, x = weights(32, 64, seed), inputs(tokens, 64, seed)
        x[:, 5] = 0.0
        chosen = search_nvfp4(weight, scales)  # type: ignore[arg-type]
        found = gptq_nvfp4(weight, chosen, hessian_of(x), act_order=act_order)
        assert torch.equal(found.scale.float(), chosen.scale.float()) and found.global_scale == chosen.global_scale
        outputs = [x @ (weight - dequantize_nvfp4(*made)).T for made in (chosen, found)]
        before, after = (out.square().sum(0) for out in outputs)
        assert (after <= before * (1 + 1e-4)).all() and after.sum() < before.sum()


def test_without_correlation_the_nearest_codes_are_gptqs_bit_for_bit() -> None:
    weight = weights(16, 64, 3)
    weight[0, :5] = torch.tensor([-0.0, 0.0, -1e-9, 1e-9, -1e-4])
    for hessian in (torch.eye(64), torch.diag(torch.rand(64) + 0.1), torch.zeros(64, 64)):
        chosen = search_nvfp4(weight, "mse")
        for act_order in (False, True):
            assert torch.equal(gptq_nvfp4(weight, chosen, hessian, act_order=act_order).packed, chosen.packed)


def test_gptq_between_the_nearest_and_the_best_of_all_codes() -> None:
    """Only three inputs are ever active, so that all 15^3 choices of a row can be tried."""
    gained = 0
    for seed in range(6):
        weight, x = weights(4, 16, seed), torch.zeros(50, 16)
        x[:, :3] = inputs(50, 3, seed)
        hessian, chosen = hessian_of(x), search_nvfp4(weight, "max")
        found = output_error(weight, dequantize_nvfp4(*gptq_nvfp4(weight, chosen, hessian, damping=1e-6)), hessian)
        rounded = output_error(weight, dequantize_nvfp4(*chosen), hessian)
        grid = torch.tensor(list(itertools.product(GRID, repeat=3)), dtype=torch.float32)
        for row in range(4):
            tried = weight[row].expand(len(grid), 16).clone()
            tried[:, :3] = grid * nvfp4_step(chosen.scale, chosen.global_scale)[row]
            best = float(output_error(weight[row].expand_as(tried), tried, hessian).min())
            assert best * 0.999 <= float(found[row]) <= float(rounded[row])
            gained += float(found[row]) < float(rounded[row])
    assert gained > 4


def test_local_hessian_scales_are_the_best_of_the_candidates() -> None:
    weight, x = weights(3, 32, 5), inputs(80, 32, 5)
    made = search_local_hessian(weight, block_moments(x))
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    total = float(weight.abs().max()) / 2688
    assert float(made.global_scale) == pytest.approx(total)
    for row, block in itertools.product(range(3), range(2)):
        part = slice(16 * block, 16 * block + 16)
        w, h = weight[row, part].double().numpy(), (x[:, part].T @ x[:, part]).double().numpy()
        h = h / h.diagonal().mean() + 0.01 * np.eye(16)
        low = int(np.searchsorted(6 * total * numbers, np.abs(w).max()))
        costs = {}
        for k in range(max(1, low - BELOW), min(126, low + ABOVE) + 1):
            error = w - nearest(w / (numbers[k] * total)) * numbers[k] * total
            costs[k] = error @ h @ error
        k = int(made.scale.view(torch.uint8)[row, block])
        assert costs[k] <= min(costs.values()) * 1.0001


def test_local_hessian_without_data_is_the_smallest_squared_error() -> None:
    weight = weights(64, 64, 6)
    made, mse = search_local_hessian(weight, torch.zeros(4, 16, 16)), search_nvfp4(weight, "mse")
    errors = [(weight - dequantize_nvfp4(*q)).square().sum() for q in (made, mse)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=1e-6)


def test_local_hessian_loses_less_of_the_outputs_than_the_squared_error_does() -> None:
    weight, x = weights(128, 64, 7), inputs(300, 64, 7)
    blocks = block_moments(x)
    error = {}
    for name, made in (
        ("local", search_local_hessian(weight, blocks)),
        ("mse", search_nvfp4(weight, "mse")),
        ("max", search_nvfp4(weight, "max")),
    ):
        lost = (weight - dequantize_nvfp4(*made)).view(128, 4, 16).transpose(0, 1)
        error[name] = float(((lost @ blocks) * lost).sum())
    assert error["local"] < 0.97 * error["mse"] and error["local"] < 0.8 * error["max"]


def test_bad_second_moments_are_refused() -> None:
    weight = weights(4, 32, 8)
    chosen = search_nvfp4(weight, "max")
    with pytest.raises(CheckpointError, match="second moments of inputs are not finite"):
        gptq_nvfp4(weight, chosen, torch.full((32, 32), torch.nan))
    with pytest.raises(CheckpointError, match=r"not positive definite.*damping above 0.01"):
        gptq_nvfp4(weight, chosen, torch.ones(32, 32) - torch.eye(32) * 0.5)
    with pytest.raises(CheckpointError, match=r"second moments of shape \[1, 16, 16\].*\[2, 16, 16\]"):
        search_local_hessian(weight, torch.zeros(1, 16, 16))
