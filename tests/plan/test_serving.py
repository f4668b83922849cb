"""The cost model against what can be worked out by hand or was published, and its laws under any input."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.errors import RecipeError
from tafkir.plan.coefficients import DATASHEET, fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout, check_layout, weight_bytes_per_chip
from tafkir.plan.load import Fleet, predict_point
from tafkir.plan.precision import PRECISIONS, part_bytes
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment, Speculation, decode_step, expert_coverage, prefill, total

CHIPS = load_chips(own_only=True)
LAYOUTS = (Layout(tp=8), Layout(tp=8, ep=8), Layout(dp=8, ep=8), Layout(tp=4, pp=2), Layout(tp=2, dp=4, ep=8))


def deployment(
    model: str = "deepseek-r1", chip: str = "h200", precision: str = "fp8", layout: Layout = LAYOUTS[0]
) -> Deployment:
    return Deployment(find_shape(model), CHIPS[chip], PRECISIONS[precision], layout, fitted_coefficients())


@pytest.mark.parametrize(
    ("experts", "chosen", "seen"),
    [(256, 8, {1: 8, 4: 30, 8: 57, 16: 102, 32: 163, 64: 222, 128: 252}), (384, 6, {1: 6, 16: 86, 128: 333})],
)
def test_expert_coverage(experts: int, chosen: int, seen: dict[int, int]) -> None:
    for tokens, count in seen.items():
        assert expert_coverage(experts, chosen, tokens) == pytest.approx(count, abs=0.6)


def test_speculation() -> None:
    """V3 accepts 80 to 90 % of one drafted token and decodes 1.8 times as fast."""
    assert Speculation(1, 0.85).yields == pytest.approx(1.85)
    assert Speculation(3, 0.5).yields == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    slow, fast = (
        predict_point(Fleet(replace(deployment(), speculation=Speculation(tokens))), 1, 1024, 1024) for tokens in (0, 1)
    )
    assert 1.3 < slow.tpot_s / fast.tpot_s < 1.85


def test_a_step_by_hand() -> None:
    """Llama-3.1-8B in bfloat16 on one H100, one user: 15 GB of matrices and the cache, at the shares of the sheet."""
    d = replace(deployment("llama-3.1-8b", "h100", "bf16", Layout()), coefficients=DATASHEET)
    shape = d.shape
    matrices = 2 * (shape.total - shape.table)
    cache = 1000 * 131072
    assert total(decode_step(d, 1, 1000)) == pytest.approx((matrices + cache) / (0.8 * 3.35e12), rel=1e-6)
    flops = 1000 * (2 * (shape.total - 2 * shape.table) + shape.attention_flops(500))
    head = 2 * shape.table / (0.8 * 3.35e12)
    assert total(prefill(d, 1000)) == pytest.approx(flops / (0.5 * 989e12) + head, rel=0.01)


def test_deepseeks_own_bound_of_the_all_to_all() -> None:
    """Their arithmetic: 32 tokens x 9 experts x 7,168 x 3 B at 50 GB/s, 61 layers; 8 routed ones over 58 here."""
    chip = replace(CHIPS["h800"], domain_size=1)
    d = replace(deployment(layout=Layout(dp=256, ep=256)), chip=chip)
    d = replace(d, shape=replace(d.shape, routing_groups=0), coefficients=replace(DATASHEET, network_share=1.0))
    term = next(term for term in decode_step(d, 32, 4989) if term.name == "all-to-all")
    theirs = 120.96e-6 * 58 * 8 / 9 * (32 * 9 * 7168 * 3 / 50e9) / 120.96e-6
    assert term.seconds == pytest.approx(theirs + 58 * 20e-6, rel=0.05)


def test_weights_of_all_chips_are_the_checkpoint() -> None:
    d = deployment()
    whole = sum(part_bytes(d.shape, d.precision).values())
    assert sum(weight_bytes_per_chip(d.shape, d.precision, Layout()).values()) == whole
    copied = d.shape.attention_copied * d.precision.attention
    routers = part_bytes(d.shape, d.precision)["routers and norms"]
    split = 8 * sum(weight_bytes_per_chip(d.shape, d.precision, Layout(tp=8)).values())
    assert split == pytest.approx(whole + 7 * (copied + routers))


def test_wide_expert_parallelism_holds_copies_of_busy_experts() -> None:
    """DeepSeek's decoding: 144 chips, two routed experts each."""
    d = deployment()
    held = weight_bytes_per_chip(d.shape, d.precision, Layout(dp=144, ep=144))["routed experts"]
    assert held == pytest.approx(2 * d.shape.expert * d.shape.num_moe_layers * d.precision.experts)


def test_what_does_not_divide_is_refused() -> None:
    shape = find_shape("deepseek-r1")
    for layout, says in ((Layout(tp=3), "128 heads"), (Layout(tp=8, ep=3), "TP x DP 8"), (Layout(pp=99), "61 layers")):
        with pytest.raises(RecipeError, match=says):
            check_layout(shape, layout)
    with pytest.raises(RecipeError, match="dense model"):
        check_layout(find_shape("qwen3-32b"), Layout(tp=8, ep=8))


def test_single_stream_of_ring_flash_on_four_h20() -> None:
    """The model card: 200 tokens a second and more. Weights alone would allow thousands."""
    fitted = deployment("ring-flash-2.0", "h20", "fp8", Layout(tp=4))
    sheet = replace(fitted, coefficients=DATASHEET)
    assert 200 < 1 / total(decode_step(fitted, 1, 1024)) < 300
    assert 1 / total(decode_step(sheet, 1, 1024)) > 900


@settings(max_examples=60)
@given(
    batch=st.integers(1, 512),
    context=st.integers(16, 32768),
    layout=st.sampled_from(LAYOUTS),
    faster=st.floats(1.0, 4.0),
    model=st.sampled_from(["deepseek-r1", "qwen3-235b-a22b", "qwen3.5-397b-a17b"]),
)
def test_better_hardware_is_never_slower_and_more_work_never_faster(
    batch: int, context: int, layout: Layout, faster: float, model: str
) -> None:
    d = deployment(model, layout=layout)
    chip = d.chip
    base = total(decode_step(d, batch, context))
    more = replace(chip, bandwidth=chip.bandwidth * faster)
    linked = replace(chip, link=chip.link * faster, network=chip.network * faster)
    stronger = replace(chip, flops={name: rate * faster for name, rate in chip.flops.items()})
    for better in (more, linked, stronger):
        assert total(decode_step(replace(d, chip=better), batch, context)) <= base
    assert total(decode_step(d, batch + 1, context)) >= base
    assert total(decode_step(d, batch, context + 16)) >= base
    assert total(decode_step(replace(d, skew=1.3), batch, context)) >= base
    # A token of a larger batch is never dearer: dollars a token fall until a limit binds.
    assert total(decode_step(d, batch + 1, context)) / (batch + 1) <= base / batch * (1 + 1e-9)


@settings(max_examples=30)
@given(power=st.integers(1, 5), batch=st.integers(1, 256))
def test_more_expert_parallelism_lowers_weights_and_raises_the_all_to_all(power: int, batch: int) -> None:
    d = deployment(chip="gb200")
    narrow, wide = (Layout(dp=2**size, ep=2**size) for size in (power, power + 1))

    def cost(layout: Layout) -> tuple[float, float]:
        held = weight_bytes_per_chip(d.shape, d.precision, layout)["routed experts"]
        steps = decode_step(replace(d, layout=layout), batch, 1024)
        return held, next(term.seconds for term in steps if term.name == "all-to-all")

    assert cost(wide)[0] < cost(narrow)[0] and cost(wide)[1] > cost(narrow)[1]


def test_times_are_the_sum_of_their_terms_and_tokens_follow_from_them() -> None:
    prompts = deployment(layout=Layout(tp=8))
    for fleet in (Fleet(deployment()), Fleet(deployment(), 2, prompts, 1)):
        point = predict_point(fleet, 16, 2048, 512, cached=0.25)
        assert total(point.ttft) == pytest.approx(point.ttft_s) and total(point.tpot) == pytest.approx(point.tpot_s)
        per_user = 512 / (point.ttft_s + 512 * point.tpot_s)
        assert point.tokens_per_s == pytest.approx(point.concurrency * per_user)


def test_a_prefix_cache_shortens_the_wait() -> None:
    cold, warm = (predict_point(Fleet(deployment()), 16, 8192, 512, cached=share) for share in (0.0, 0.75))
    assert warm.ttft_s < cold.ttft_s and warm.tokens_per_s > cold.tokens_per_s
