"""Which layouts are found: minimum chips, limits that bind, infeasible plans, and how long the search takes."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tafkir.errors import RecipeError
from tafkir.plan.advise import Option, advise, memory_of, minimum_chips, nearest_change, replica_layouts
from tafkir.plan.claims import check_claims
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment
from tafkir.plan.workload import WORKLOADS, Workload, load_workload
from tests.conftest import ROOT

CHIPS = load_chips(own_only=True)
CHAT = WORKLOADS["chat"]


def deployment(model: str, chip: str, precision: str) -> Deployment:
    return Deployment(find_shape(model), CHIPS[chip], PRECISIONS[precision], Layout(), fitted_coefficients())


@pytest.mark.parametrize(
    ("model", "precision", "chip", "count"),
    [
        ("ring-flash-2.0", "bf16", "h20", 4),
        ("deepseek-r1", "fp8", "h200", 8),
        ("deepseek-r1", "fp8", "h20", 11),
        ("deepseek-r1", "fp8", "h100", 13),
        ("deepseek-r1", "nvfp4", "b200", 4),
        ("r2-rumoured", "int8", "ascend-910b3", 28),
    ],
)
def test_minimum_chips(model: str, precision: str, chip: str, count: int) -> None:
    """A tenth of the memory in reserve, a quarter of the rest for caches."""
    assert minimum_chips(find_shape(model), PRECISIONS[precision], CHIPS[chip]) == count


def kept(option: Option, workload: Workload) -> bool:
    return option.point.ttft_s <= workload.ttft_s and option.point.tpot_s <= workload.tpot_s


def test_what_is_recommended_fits_and_keeps_its_promises() -> None:
    d = deployment("deepseek-r1", "h200", "fp8")
    options, refusals = advise(d, CHAT, 16)
    assert options and refusals
    for option in options:
        assert kept(option, CHAT) and option.batch <= option.memory.sequences and 0 <= option.headroom <= 1
        assert option.replicas * option.fleet.chips + option.unused == 16
        used = sum(option.memory.weights.values()) + option.memory.activations + option.memory.other
        assert used + option.batch * option.memory.sequence <= option.memory.usable
    assert [o.tokens_per_s for o in options] == sorted((o.tokens_per_s for o in options), reverse=True)
    assert any(option.fleet.prompts for option in options)
    fastest = advise(d, CHAT, 16, objective="latency")[0][0]
    assert fastest.point.tpot_s == min(option.point.tpot_s for option in options)
    assert advise(d, CHAT, 16, objective="chips")[0][0].fleet.chips == min(option.fleet.chips for option in options)


def test_one_more_user_would_break_a_promise_or_the_memory() -> None:
    d = deployment("deepseek-r1", "b200", "nvfp4")
    for option in advise(d, WORKLOADS["reasoning"], 8, split=False)[0]:
        if option.limit == "memory":
            assert option.batch == option.memory.sequences
        else:
            assert option.headroom > 0


def test_dollars_pay_for_every_chip() -> None:
    d = deployment("ring-flash-2.0", "h20", "fp8")
    for option in advise(d, CHAT, 4)[0]:
        assert option.dollars_in and option.dollars_out and d.chip.price
        prompts = option.point.tokens_per_s * CHAT.prompt_tokens / CHAT.output_tokens
        earned = option.point.tokens_per_s * option.dollars_out[1] + prompts * option.dollars_in[1]
        assert earned * 3600 / 1e6 == pytest.approx(option.fleet.chips * d.chip.price.mid)
        assert option.dollars_out[0] <= option.dollars_out[1] <= option.dollars_out[2]
    idle = replace(CHAT, utilization=0.5)
    half = advise(d, idle, 4)[0][0]
    full = advise(d, CHAT, 4)[0][0]
    assert half.dollars_out and full.dollars_out
    assert half.dollars_out[1] == pytest.approx(2 * full.dollars_out[1])
    free = replace(d, chip=replace(d.chip, price=None))
    assert advise(free, CHAT, 4)[0][0].dollars_out is None


def test_infeasible_plans_say_which_limit_by_how_much_and_what_would_do() -> None:
    d = deployment("deepseek-r1", "h100", "fp8")
    options, refusals = advise(d, CHAT, 8)
    assert not options and {refusal.limit for refusal in refusals} == {"memory"}
    tp8 = next(refusal for refusal in refusals if refusal.layout == Layout(tp=8))
    memory = memory_of(replace(d, layout=Layout(tp=8)), CHAT)
    assert tp8.missing == pytest.approx((memory.sequence - memory.free) / memory.usable)
    ways = nearest_change(d, CHAT, 8, [PRECISIONS["w4a16"]])
    assert ways == ["--precision w4a16", "16 chips"]
    assert advise(d, CHAT, 16)[0] and advise(replace(d, precision=PRECISIONS["w4a16"]), CHAT, 8)[0]


def test_impatient_people_are_told_how_long_it_takes() -> None:
    d = deployment("deepseek-r1", "h200", "fp8")
    hurried = replace(CHAT, tpot_s=0.001)
    options, refusals = advise(d, hurried, 8)
    assert not options and "time per token" in {refusal.limit for refusal in refusals}
    assert any("ms a token" in way for way in nearest_change(d, hurried, 8, []))


def test_a_demanded_rate() -> None:
    d = deployment("ring-flash-2.0", "h20", "fp8")
    options, _ = advise(d, replace(CHAT, requests_per_s=10), 4)
    assert options
    none, refusals = advise(d, replace(CHAT, requests_per_s=1e5), 4)
    assert not none and any("chips would do" in refusal.why for refusal in refusals)


def test_layouts_prior_work_uses_are_searched() -> None:
    r1 = find_shape("deepseek-r1")
    assert Layout(dp=32, ep=32) in set(replica_layouts(r1, CHIPS["h800"], 32))
    assert Layout(dp=144, ep=144) in set(replica_layouts(r1, CHIPS["h800"], 144))
    assert Layout(tp=8) in set(replica_layouts(r1, CHIPS["h20"], 8))
    assert all(
        layout.ep == 1 and layout.dp == 1 for layout in replica_layouts(find_shape("qwen3-32b"), CHIPS["h100"], 8)
    )


def test_a_full_search_of_r1_takes_seconds() -> None:
    start = time.process_time()
    d = deployment("deepseek-r1", "h800", "fp8")
    found = [len(advise(d, CHAT, chips)[0]) for chips in range(8, 145, 8)]
    assert time.process_time() - start < 5
    assert found[0] == 0 and all(found[1:])


def test_workloads_from_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("prompt_tokens = 4000\noutput_tokens = 100\nrequests_per_s = 3.5\n")
    assert load_workload(str(path)) == Workload(prompt_tokens=4000, output_tokens=100, requests_per_s=3.5)
    assert load_workload("chat") is CHAT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("requests_per_s = -1", "requests_per_s = -1.*not negative"),
        ("prompt_tokens = 0", "prompt_tokens = 0"),
        ("cached = 1.5", "cached = 1.5.*0 to 0.99"),
        ("output_token = 5", "did you mean 'output_tokens'"),
        ("x = [", "not valid TOML"),
    ],
)
def test_bad_workloads(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_workload(str(path))
    with pytest.raises(RecipeError, match="chat, reasoning, or a TOML file"):
        load_workload("batch")


def test_claims_come_out_as_the_sources_say() -> None:
    """The arithmetic of the published sources: each figure was worked out elsewhere before."""
    found = {(claim.system.split(" ")[0], claim.claim): claim for claim in check_claims()}
    text = "\n".join(f"{claim.claim}: {claim.computed}" for claim in found.values())
    for figure in (
        "102.89B, 6.15B, 4.86B",
        "688.6 GB / 423.6 GB = 1.626",
        "226.9 nodes",
        "97.2% in, 97.3% out",
        "$0.63 on NVIDIA H800",
        "$0.45 on Huawei Ascend 910C",
        "$0.20 on NVIDIA GB200",
        "breaks even at $0.90",
        "288 of 312 TFLOPS (92%)",
        "1,600 chips' peak, or 82 % of 1,951",
        "159 days, 194, 529",
        "1,300T tokens, 37.7 years",
        "7 B200 in NVFP4; 28 Ascend 910B",
        "6.83M",
    ):
        assert figure in text, figure
    fleet = [claim for claim in found.values() if "fleet" in claim.system]
    assert [claim.verdict for claim in fleet] == ["holds"] * 3
    assert sum(claim.verdict == "contradiction" for claim in found.values()) == 4


def test_the_page_says_what_the_tables_say() -> None:
    """Chips, claims, training and minimum chips of docs/plan.md come out of the package as it is."""
    spec = importlib.util.spec_from_file_location("plan_tables", ROOT / "benchmarks" / "plan_tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page) == page, "run benchmarks/plan_tables.py"
