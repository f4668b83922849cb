"""What five systems say of themselves, recomputed from shapes, prices and hardware tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tafkir.plan.advise import minimum_chips
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import Chip, load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.load import Fleet, predict_point
from tafkir.plan.precision import PRECISIONS, checkpoint_bytes
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment, decode_step, total
from tafkir.plan.training import train_flops_per_token
from tafkir.recipe.trm import TrmModelConfig

__all__ = ["LIST_PRICES", "Claim", "check_claims"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence.

    Attributes:
        system: whose. claim: what is said. inputs: what the computation rests on. computed: what comes out.
        verdict: `holds`, `plausible`, `does not hold`, `contradiction` or `unconfirmed`.
    """

    system: str
    claim: str
    inputs: str
    computed: str
    verdict: str


LIST_PRICES: Mapping[str, tuple[float, float]] = {
    "GPT-4o since 2024-08": (2.50, 10.0),
    "GPT-4o of 2024-05": (5.0, 15.0),
    "GPT-4 Turbo": (10.0, 30.0),
    "GPT-4": (30.0, 60.0),
}
"""Dollars for a million tokens in and out (GPT-4's and Turbo's from general knowledge)."""

_R2_PRICE = (0.07, 0.27)
_R2_TOKENS = 15e12
# Cached input, other input, output, of 2025-02.
_V3_PRICES = (0.07, 0.27, 1.10)


def check_claims() -> list[Claim]:
    """Every claim, system by system."""
    chips = load_chips(own_only=True)
    served = [*_ring(chips), *_r1_fp4(chips), *_mhc(chips), *_trm(chips)]
    return [*served, *_r2(chips), *_r2_cluster(chips), *_fleet()]


def _verdict(value: float, claimed: float, tolerance: float) -> str:
    return "holds" if abs(value / claimed - 1) <= tolerance else "does not hold"


def _ring(chips: Mapping[str, Chip]) -> list[Claim]:
    shape = find_shape("ring-flash-2.0")
    sizes = [shape.total / 1e9, shape.active / 1e9, shape.active_non_embedding / 1e9]
    right = all(abs(size / said - 1) <= 0.03 for size, said in zip(sizes, (100, 6.1, 4.8), strict=True))
    speeds = {}
    for name in ("bf16", "fp8"):
        d = Deployment(shape, chips["h20"], PRECISIONS[name], Layout(tp=4), fitted_coefficients())
        speeds[name] = 1 / total(decode_step(d, 1, 1024))
    fast = max(speeds.values())
    return [
        Claim(
            "Ring-flash-2.0",
            "100B parameters, 6.1B active, 4.8B without embeddings",
            "the published config.json",
            f"{sizes[0]:.2f}B, {sizes[1]:.2f}B, {sizes[2]:.2f}B",
            "holds" if right else "does not hold",
        ),
        Claim(
            "Ring-flash-2.0",
            "more than 200 tokens/s on four H20",
            "TP4, one user, 1,024 tokens of context, fitted coefficients",
            ", ".join(f"{speed:.0f} tokens/s in {name}" for name, speed in speeds.items())
            + f"; the weights alone would allow {_weights_only(shape.active, chips['h20']):,.0f} in fp8",
            "plausible" if fast >= 0.85 * 200 else "does not hold",
        ),
    ]


def _weights_only(active: int, chip: Chip) -> float:
    return 4 * chip.bandwidth * 0.8 / active


def _r1_fp4(chips: Mapping[str, Chip]) -> list[Claim]:
    shape, b200 = find_shape("deepseek-r1"), chips["b200"]
    fp8 = checkpoint_bytes(shape, PRECISIONS["fp8"])
    fp4 = {name: checkpoint_bytes(shape, PRECISIONS[name]) for name in ("nvfp4-v1", "nvfp4")}
    ratio = fp8 / fp4["nvfp4-v1"]
    least = minimum_chips(shape, PRECISIONS["nvfp4-v1"], b200, speculative=True)
    d = Deployment(shape, b200, PRECISIONS["nvfp4-v1"], Layout(tp=8, ep=8), fitted_coefficients(), "trtllm")
    point = predict_point(Fleet(d), 1, 1024, 2048)
    return [
        Claim(
            "DeepSeek-R1-0528-FP4",
            "1.6 times less memory than FP8",
            "R1's shape; MLPs and experts in NVFP4 (4.5 bits), the rest bf16; FP8 in blocks of 128 x 128",
            f"{fp8 / 1e9:.1f} GB / {fp4['nvfp4-v1'] / 1e9:.1f} GB = {ratio:.3f}; with o_proj (v2) "
            f"{fp8 / fp4['nvfp4']:.3f}",
            _verdict(ratio, 1.6, 0.03),
        ),
        Claim(
            "DeepSeek-R1-0528-FP4",
            "served by eight B200",
            "a tenth of 180 GB in reserve, a quarter of the rest for caches",
            f"{least} B200 hold it; on eight, one user gets {1 / point.tpot_s:.0f} tokens/s without speculation "
            "(published: 67, and 253 after fusing kernels)",
            "holds" if least <= 8 else "does not hold",
        ),
    ]


def _mhc(chips: Mapping[str, Chip]) -> list[Claim]:
    """Traffic of the fused kernels over the time of a 27B model's sublayer, both forward and backward."""
    hidden, layers, active, streams = 2560, 30, 4.14e9, 4
    chip = chips["h800"]
    moved = (45 - 9) * hidden * 2 * 2 * layers
    extra = moved / (0.8 * chip.bandwidth)
    compute = 6 * active / (0.5 * chip.peak("bf16"))
    share = extra / compute
    return [
        Claim(
            "DeepSeek mHC",
            "6.7 % more time a step at four streams",
            f"27B model of width {hidden}, {layers} layers, {active / 1e9:.1f}B active (assumed); kernels that move 45 "
            f"hidden states a token and sublayer in place of 9; H800 at half its peak and 0.8 of its bandwidth; "
            f"{streams} streams",
            f"{share:.1%} if nothing overlaps and nothing is recomputed",
            "plausible" if 0.5 <= share / 0.067 <= 2 else "does not hold",
        )
    ]


def _trm(chips: Mapping[str, Chip]) -> list[Claim]:
    arc = TrmModelConfig(num_latent_steps=4).for_puzzles(12, 900)
    count = arc.num_parameters(puzzle_table=False)
    steps = 518_000
    flops = steps * 768 * arc.flops_per_supervision_step(train=True)
    hours, h100 = 288, chips["h100"]
    rate = flops / (hours * 3600)
    price = h100.price.mid * hours if h100.price else math.nan
    return [
        Claim(
            "Samsung TRM",
            "7M parameters",
            "two blocks of width 512 with attention, without the table of puzzle vectors",
            f"{count / 1e6:.2f}M",
            _verdict(count, 7e6, 0.05),
        ),
        Claim(
            "Samsung TRM",
            "ARC-AGI in about three days on four H100 (288 GPU hours)",
            f"{steps:,} steps of 768 puzzles on 900 cells: {flops:.2g} FLOP, from the shape",
            f"{rate / 1e12:.0f} TFLOPS on each chip, {rate / h100.peak('bf16'):.0%} of its bf16 peak; "
            f"{price:,.0f} dollars at {h100.price.mid if h100.price else math.nan:.2f} an hour",
            "plausible" if 0.05 <= rate / h100.peak("bf16") <= 0.5 else "does not hold",
        ),
    ]


def _r2(chips: Mapping[str, Chip]) -> list[Claim]:
    shape = find_shape("r2-rumoured")
    system = "DeepSeek R2 (a rumour; never released)"
    ratios = {
        name: tuple(1 - mine / theirs for mine, theirs in zip(_R2_PRICE, price, strict=True))
        for name, price in LIST_PRICES.items()
    }
    matches = [name for name, pair in ratios.items() if all(abs(ratio - 0.973) < 0.0015 for ratio in pair)]
    listed = "; ".join(f"{name} {pair[0]:.1%} in, {pair[1]:.1%} out" for name, pair in ratios.items())
    costs, served = _r2_cost(chips)
    covered = [cost <= _R2_PRICE[1] for cost in costs]
    gpt_4o = LIST_PRICES["GPT-4o since 2024-08"][1]
    return [
        Claim(
            system,
            "1.2T parameters, 78B active",
            "the preset r2-rumoured: sizes of our own choice that give these counts",
            f"{shape.total / 1e12:.2f}T, {shape.active / 1e9:.1f}B",
            "unconfirmed",
        ),
        Claim(
            system,
            "97.3 % cheaper than GPT-4, GPT-4 Turbo or GPT-4o (outlets differ)",
            "list prices alone: $0.07 in and $0.27 out against OpenAI's",
            f"{listed}: reproduces for {', '.join(matches) or 'none'} only, and says nothing of cost",
            "holds" if matches else "does not hold",
        ),
        Claim(
            system,
            "$0.07 in and $0.27 out for a million tokens",
            "DeepSeek-V3's list of 2025-02: $0.07 for cached input, $0.27 for other input, $1.10 for output",
            f"both are V3's input prices; against GPT-4o, V3's output is {1 - _V3_PRICES[2] / gpt_4o:.1%} cheaper",
            "contradiction" if _V3_PRICES[:2] == _R2_PRICE else "plausible",
        ),
        Claim(
            system,
            "$0.27 for a million tokens of output would cover the cost",
            "decoding of 37B (published: 1,850 tokens/s on an H800, 1,943 on a 910C, 13,386 on a GB200 in NVFP4) "
            "scaled to 78B, at 2.00, 1.50 and 4.54 dollars an hour",
            served,
            "holds" if all(covered) else "plausible" if any(covered) else "does not hold",
        ),
    ]


def _r2_cost(chips: Mapping[str, Chip]) -> tuple[list[float], str]:
    """Dollars for a million tokens, decode only, fully loaded."""
    scale = 37 / 78
    points = {"h800": (1850, 2.00), "ascend-910c": (1943, 1.50), "gb200": (13386, 4.54)}
    costs = {key: price / (rate * scale * 3600) * 1e6 for key, (rate, price) in points.items()}
    break_even = 0.27 * points["ascend-910c"][0] * scale * 3600 / 1e6
    listed = ", ".join(f"${cost:.2f} on {chips[key].name}" for key, cost in costs.items())
    return list(costs.values()), f"{listed}; a 910C breaks even at ${break_even:.2f} an hour, fully loaded"


def _r2_cluster(chips: Mapping[str, Chip]) -> list[Claim]:
    shape = find_shape("r2-rumoured")
    system = "DeepSeek R2 (a rumour; never released)"
    per_token = train_flops_per_token(shape, 4096)
    simple = 6 * 78e9 * _R2_TOKENS

    def days(rate: float) -> float:
        return simple / rate / 86400

    needed = 320 * 0.82 / 0.91
    corpus = 5.2e15 / 4
    b3 = chips["ascend-910b3"]
    hours = per_token * _R2_TOKENS / (b3.peak("bf16") * 0.285) / 3600
    int8 = minimum_chips(shape, PRECISIONS["int8"], b3)
    block = shape.expert * (shape.num_experts + 1)
    with_mtp = replace(shape, mtp=block, mtp_matrices=block, mtp_depth=1, mtp_copies=True)
    nvfp4 = minimum_chips(with_mtp, PRECISIONS["nvfp4"], chips["b200"], speculative=True)
    return [
        Claim(
            system,
            "512 PFLOPS measured at 82 % of an Ascend 910B cluster",
            "910B peaks of 256 (as sold in 2019) and 320 TFLOPS",
            f"2,048 x 256 = {2048 * 0.256:.0f} PFLOPS is the 2019 server's peak; at 320 TFLOPS it is "
            f"{512e3 / 320:,.0f} chips' peak, or 82 % of {512e3 / 320 / 0.82:,.0f}",
            "contradiction" if abs(2048 * 256 / 512e3 - 1) < 0.03 else "unconfirmed",
        ),
        Claim(
            system,
            "91 % of an A100 cluster of the same size",
            "320 TFLOPS at 82 %; A100 312 TFLOPS",
            f"the A100 would have to reach {needed:.0f} of 312 TFLOPS ({needed / 312:.0%}); the best published MoE "
            "training on Ascend reaches 30 % (Pangu Ultra MoE), so 82 % is not MFU",
            "contradiction" if needed / 312 > 0.6 else "plausible",
        ),
        Claim(
            system,
            "trained on 5.2 PB",
            "4 bytes a token; 6 x 78B FLOP each",
            f"{corpus / 1e12:,.0f}T tokens, {days(512e15) * corpus / _R2_TOKENS / 365:.1f} years at 512 PFLOPS: not "
            "the number of tokens",
            "contradiction" if corpus > 10 * _R2_TOKENS else "plausible",
        ),
        Claim(
            system,
            "what it would take: 15T tokens",
            "6 x 78B FLOP a token; 512 PFLOPS sustained, at 82 %, at 30 %; 910B3 at 28.5 % of its cube units' peak",
            f"{days(512e15):.0f} days, {days(0.82 * 512e15):.0f}, {days(0.30 * 512e15):.0f}; {hours / 1e6:.0f}M NPU "
            "hours with attention",
            "plausible",
        ),
        Claim(
            system,
            "what it would take to serve",
            "a tenth of the memory in reserve, a quarter for caches; NVFP4 with a multi-token-prediction layer as V3's",
            f"{nvfp4} B200 in NVFP4; {int8} Ascend 910B of 64 GB in INT8 (it has no FP8)",
            "plausible",
        ),
    ]


def _fleet() -> list[Claim]:
    """The one service whose traffic, speed, price and fleet were all published: a check of the arithmetic itself."""
    cached, fresh, out = 342e9, 266e9, 168e9
    nodes = ((cached + fresh) / 73_700 + out / 14_800) / 86400
    cost = nodes * 8 * 2.0 * 24
    revenue = (cached * 0.14 + fresh * 0.55 + out * 2.19) / 1e6
    system = "DeepSeek's own fleet (2025-02, one day)"
    inputs = "608B tokens in (342B cached), 168B out; 73,700 in and 14,800 out a second and node of eight H800"
    return [
        Claim(system, "226.75 nodes", inputs, f"{nodes:.1f} nodes", _verdict(nodes, 226.75, 0.01)),
        Claim(
            system, "$87,072 a day", f"{inputs}; $2 an hour and chip", f"${cost:,.0f}", _verdict(cost, 87_072, 0.001)
        ),
        Claim(
            system,
            "$562,027 a day in theory",
            "R1's list: $0.14 cached, $0.55 other input, $2.19 output for a million",
            f"${revenue:,.0f}",
            _verdict(revenue, 562_027, 0.001),
        ),
    ]
