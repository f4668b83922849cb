"""`tafkir bench serve` against the live server: what it reports is what was sent, and its numbers are defined."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import httpx
import pytest

from tafkir.errors import BackendUnavailable, RecipeError
from tafkir.serve.loadtest import Goal, Measured, Target, run_load, summarize
from tafkir.serve.traffic import Lengths, Load, plan_requests
from tests.conftest import Cli
from tests.serve.conftest import Server


def test_a_closed_loop_through_the_command(here: Cli, server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "load.png"
    done = here(
        "bench", "serve", f"{server.url}/v1", "--requests", "10", "--concurrency", "4", "--prompt-tokens", "20",
        "--answer-tokens", "8", "--json", "--plot", str(picture),
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert (report["requests"], report["succeeded"], report["statuses"]) == (10, 10, {"200": 10})
    assert report["answer_tokens"] == 80
    assert 10 * 10 <= report["prompt_tokens"] <= 10 * 40
    for name in ("ttft_s", "tpot_s", "latency_s"):
        spread = report[name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
    assert report["tokens_per_s"] == pytest.approx(80 / report["wall_s"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_open_loop_keeps_its_clock_and_counts_refusals(server: Server) -> None:
    lengths = Lengths("reasoning", scale=0.02, max_prompt=30, max_answer=40)
    measured, wall_s = run_load(Target(f"{server.url}/v1", api="chat"), Load(12, rate=40.0), lengths, seed=3)
    assert sum(m.ok for m in measured) == 12, [m.detail for m in measured]
    plan = plan_requests(Load(12, rate=40.0), lengths, 1.0, 3)
    for planned, met in zip(plan, measured, strict=True):
        assert planned.at_s <= met.sent_s < planned.at_s + 0.5, "a slow answer holds nobody up"
        assert met.answer_tokens == planned.answer_tokens
    too_long = run_load(Target(f"{server.url}/v1"), Load(2), Lengths(prompt=2000, answer=2))[0]
    assert {m.status for m in too_long} == {400} and "context" in too_long[0].detail
    assert wall_s > plan[-1].at_s


def test_percentiles_and_goodput_by_hand() -> None:
    measured = [
        Measured(200, 0, ttft_s=i / 10, latency_s=i / 10 + 0.9, answer_tokens=10, gaps_s=[0.1] * 9)
        for i in range(1, 11)
    ]
    measured += [Measured(503, 0, latency_s=0.01, detail="busy"), Measured(200, 0, 0.1, 0.1, 1, 1)]
    report = summarize(measured, 4.0, Goal(ttft_s=0.55, tpot_s=0.11))
    assert report.succeeded == 11
    assert report.ttft_s["p50"] == pytest.approx(0.5)
    assert report.tpot_s["mean"] == pytest.approx(0.1)
    assert report.tokens_per_s == pytest.approx(101 / 4)
    assert (report.good_share, report.goodput_per_s) == (6 / 12, 6 / 4)
    assert report.refusal_s["max"] == 0.01 and report.statuses == {"200": 11, "503": 1}
    assert summarize(measured, 4.0, Goal(0.55, 0.09)).good_share == 1 / 12


def test_drawn_lengths_have_the_means_that_are_promised() -> None:
    rng = random.Random(0)
    wide = Lengths("chat", max_prompt=10**9, max_answer=10**9)
    drawn = [wide.draw(rng) for _ in range(40_000)]
    assert statistics.fmean(p for p, _ in drawn) == pytest.approx(220, rel=0.04)
    assert statistics.fmean(a for _, a in drawn) == pytest.approx(200, rel=0.04)
    assert max(Lengths("reasoning", max_answer=50).draw(rng)[1] for _ in range(99)) == 50
    assert plan_requests(Load(5, rate=2.0), wide, 1.3, 7) == plan_requests(Load(5, rate=2.0), wide, 1.3, 7)
    with pytest.raises(RecipeError):
        Load(1, rate=0.0)


def test_what_is_no_server(server: Server) -> None:
    with pytest.raises(BackendUnavailable, match="no OpenAI server"):
        run_load(Target("http://127.0.0.1:9/v1"), Load(1), Lengths())
    with pytest.raises(BackendUnavailable, match="refused"):
        run_load(Target(f"{server.url}/v1", model="other"), Load(1), Lengths())
    assert httpx.get(f"{server.url}/health").status_code == 200
