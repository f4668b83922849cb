"""Drawing tokens from logits: counter-based uniforms and inverse-CDF sampling, both pure functions of their inputs.

Shape suffixes: B rows (one sequence each), V vocabulary, C blocks of the vocabulary, W width of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.errors import SamplingError

__all__ = [
    "advance_key",
    "greedy",
    "sample",
    "sample_reference",
    "stream_key",
    "top_logprobs",
    "truncation_mask",
    "uniform",
    "uniform_reference",
]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BLOCK = 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_reference(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, draw: int = 0) -> int:
    """The int64 start of a request's random stream: the first splitmix64 output for `seed` (taken modulo 2**64).

    Neighbouring seeds get unrelated keys, so that their streams do not run into each other. The key from `draw` on
    starts in the middle of the stream: `uniform(stream_key(seed, n), t)` is `uniform(stream_key(seed), n + t)`.
    """
    return _signed(_mix_reference((seed + _GAMMA) & _MASK) + draw * _GAMMA)


def advance_key(key: int, draws: int) -> int:
    """The key of the same stream so many draws on: `uniform(advance_key(key, n), t)` is `uniform(key, n + t)`."""
    return _signed(key + draws * _GAMMA)


def uniform_reference(seed: int, step: int) -> float:
    """Pure-Python twin of `uniform`, equal in every bit: splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return (_mix_reference((stream_key(seed) + (step + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key_B: Tensor, step_B: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for draw `step_B` (int64) of the streams `key_B` (int64, from `stream_key`).

    The value depends on (seed, step) alone. int64 products wrap around, which is what splitmix64 asks for.
    """
    z = (step_B + 1) * _signed(_GAMMA) + key_B
    z = (z ^ _logical_shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _logical_shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _logical_shift(z, 31)
    return _logical_shift(z, 11).to(torch.float64) * 2.0**-53


def truncation_mask(logits_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """True where a token stays eligible: top-k first, then top-p over what is left, renormalised.

    Args:
        logits_BV: float logits, already divided by the temperature.
        top_k_B: int64; 0 keeps every token. Of equal logits the lower token id stays.
        top_p_B: float; the smallest set of most probable tokens whose mass reaches top_p stays, never fewer than one.
    """
    sorted_BV, order_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    limit_B1 = torch.where(top_k_B > 0, top_k_B, logits_BV.shape[-1]).unsqueeze(-1)
    by_rank_BV = rank_V < limit_B1
    probs_BV = torch.softmax(sorted_BV.masked_fill(~by_rank_BV, -torch.inf).double(), dim=-1)
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    # top_p >= 1 keeps everything, also what rounding of the cumulative sum would drop.
    by_mass_BV = (before_BV < top_p_B.double().unsqueeze(-1)) | (top_p_B >= 1).unsqueeze(-1)
    keep_BV = by_rank_BV & by_mass_BV
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter_(-1, order_BV, keep_BV)


def _first_above(weight_BW: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B, 1] of the first entry whose cumulative weight exceeds the target, and the weight before it."""
    cdf_BW = weight_BW.cumsum(dim=-1, dtype=torch.float64)
    # Rounding may lift the target to the total; staying below it never lands on an entry of weight zero.
    below_B1 = torch.nextafter(cdf_BW[:, -1:], torch.zeros_like(target_B1))
    target_B1 = torch.minimum(target_B1, below_B1)
    index_B1 = torch.searchsorted(cdf_BW, target_B1, right=True)
    before_B1 = torch.where(index_B1 > 0, cdf_BW.gather(-1, (index_B1 - 1).clamp_min(0)), 0.0)
    return index_B1, before_B1


def _draw(weight_BCW: Tensor, sum_BC: Tensor, u_B: Tensor) -> Tensor:
    """Inverse CDF in two levels: the block first, then the token in it. A full cumulative sum reads far more."""
    total_B1 = sum_BC.sum(dim=-1, keepdim=True, dtype=torch.float64)
    target_B1 = u_B.unsqueeze(-1) * total_B1
    block_B1, before_B1 = _first_above(sum_BC, target_B1)
    width = weight_BCW.shape[-1]
    weight_BW = weight_BCW.gather(1, block_B1.unsqueeze(-1).expand(-1, 1, width)).squeeze(1)
    offset_B1, _ = _first_above(weight_BW, (target_B1 - before_B1).clamp_min(0))
    return (block_B1 * width + offset_B1).squeeze(-1)


def _weights(scaled_BV: Tensor, max_B1: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit - max) in blocks [B, C, W], padded with zeros, and the sum of each block [B, C]."""
    batch, vocab = scaled_BV.shape
    blocks = -(-vocab // _BLOCK)
    weight_BV = scaled_BV.new_empty(batch, blocks * _BLOCK)
    weight_BV[:, vocab:] = 0
    torch.sub(scaled_BV, max_B1, out=weight_BV[:, :vocab])
    weight_BV[:, :vocab].exp_()
    weight_BCW = weight_BV.view(batch, blocks, _BLOCK)
    return weight_BCW, weight_BCW.sum(dim=-1)


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF.

    Args:
        logits_BV: float logits; -inf forbids a token.
        temperature_B: float; 0 takes the most probable token (the lowest id among equals).
        top_k_B: int64; 0 means no cut.
        top_p_B: float; 1 means no cut.
        u_B: float64 in [0, 1), from `uniform`.

    Returns:
        token_B (int64) and logprob_B (float32): the natural log of the token's probability under the whole,
        untruncated distribution at the row's temperature, or at temperature 1 where the row is greedy.

    Raises:
        SamplingError: a row holds NaN or +inf, or nothing but -inf.
    """
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV.float()
    if bool((temperature_B != 1).any()):
        scaled_BV = scaled_BV / torch.where(greedy_B, 1.0, temperature_B).unsqueeze(-1)
    any_greedy = bool(greedy_B.any())
    max_B1, argmax_B1 = scaled_BV.max(dim=-1, keepdim=True) if any_greedy else (scaled_BV.amax(-1, True), None)
    _check_finite(max_B1)
    weight_BCW, sum_BC = _weights(scaled_BV, max_B1)
    log_total_B = sum_BC.sum(dim=-1, dtype=torch.float64).log()
    cut_B = ((top_k_B > 0) | (top_p_B < 1)) & ~greedy_B
    if bool(cut_B.any()):
        rows = cut_B.nonzero().squeeze(-1)
        keep_RV = truncation_mask(scaled_BV[rows], top_k_B[rows], top_p_B[rows])
        cut_RV = scaled_BV[rows].masked_fill(~keep_RV, -torch.inf)
        weight_BCW[rows], sum_BC[rows] = _weights(cut_RV, max_B1[rows])
    token_B = _draw(weight_BCW, sum_BC, u_B)
    if argmax_B1 is not None:
        token_B = torch.where(greedy_B, argmax_B1.squeeze(-1), token_B)
    chosen_B = scaled_BV.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)
    logprob_B = (chosen_B - max_B1.squeeze(-1)).double() - log_total_B
    return token_B, logprob_B.float()


def greedy(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """What `sample` gives at temperature 0, to the bit, without a draw."""
    scaled_BV = logits_BV.float()
    max_B1, argmax_B1 = scaled_BV.max(dim=-1, keepdim=True)
    _check_finite(max_B1)
    log_total_B = _weights(scaled_BV, max_B1)[1].sum(dim=-1, dtype=torch.float64).log()
    return argmax_B1.squeeze(-1), (-log_total_B).float()


def _check_finite(max_B1: Tensor) -> None:
    # max() hands NaN on, so the largest logit alone tells of NaN, of +inf and of a row of nothing but -inf.
    finite = torch.isfinite(max_B1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise SamplingError(
            f"the logits cannot be sampled from (largest value {float(max_B1[row])})",
            where=f"row {row} of {max_B1.shape[0]}",
            expected="finite logits",
            fix="check the weights for NaN or infinity",
        )


def sample_reference(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Slow twin of `sample`: one row at a time, the whole distribution in float64, one cumulative sum."""
    tokens, logprobs = [], []
    for row, logits_V in enumerate(logits_BV.double()):
        temperature = float(temperature_B[row])
        scaled_V = logits_V / (temperature if temperature > 0 else 1.0)
        if not torch.isfinite(scaled_V.max()):
            _check_finite(logits_BV.float().amax(-1, True))
        logprob_V = torch.log_softmax(scaled_V, dim=-1)
        if temperature == 0:
            token = int(scaled_V.argmax())
        else:
            keep_V = truncation_mask(scaled_V.float()[None], top_k_B[row : row + 1], top_p_B[row : row + 1])[0]
            cdf_V = torch.where(keep_V, logprob_V.exp(), 0.0).cumsum(0)
            token = int((cdf_V > u_B[row] * cdf_V[-1]).nonzero()[0, 0])
        tokens.append(token)
        logprobs.append(float(logprob_V[token]))
    return torch.tensor(tokens), torch.tensor(logprobs)


def top_logprobs(logits_BV: Tensor, temperature_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens a row: ids [B, count] and float32 logprobs, as `sample` measures them."""
    scale_B1 = torch.where(temperature_B == 0, 1.0, temperature_B).unsqueeze(-1)
    logprob_BV = torch.log_softmax(logits_BV.float() / scale_B1, dim=-1)
    values, indices = torch.topk(logprob_BV, min(count, logits_BV.shape[-1]), dim=-1)
    return indices, values
