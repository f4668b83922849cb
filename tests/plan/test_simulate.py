"""The simulation against closed forms below the cliff, against itself one step at a time, and beyond the cliff."""

from __future__ import annotations

import math
import time

import pytest

from tafkir.errors import RecipeError
from tafkir.plan import simulate
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.load import Fleet
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment, prefill, total
from tafkir.plan.simulate import (
    ROUTERS,
    SimulatedLoad,
    _Times,
    percentiles,
    simulate_fleet,
    simulate_replica,
)
from tafkir.plan.workload import WORKLOADS, Workload

CHAT = WORKLOADS["chat"]
CACHE = 250_000


@pytest.fixture(scope="module")
def replica() -> Deployment:
    chip = load_chips(own_only=True)["h100"]
    return Deployment(find_shape("qwen3-32b"), chip, PRECISIONS["bf16"], Layout(tp=2), fitted_coefficients(), "vllm")


def steady_state(
    deployment: Deployment, workload: Workload, rate: float, max_sequences: int = 4096
) -> tuple[float, float]:
    """Mean sequences decoded at once, and mean time per token, by a fixed point: N = rate x output x time(N).

    Returns (inf, inf) where no number of sequences keeps up with the rate. Waiting is not in it.

    Args:
        deployment: the replica. workload: its mean lengths. rate: requests a second.
        max_sequences: beyond which it does not look.
    """
    times = _Times(deployment, workload.prompt_tokens + workload.output_tokens / 2, workload.cached)
    fresh = math.ceil(workload.prompt_tokens * (1 - workload.cached))
    prompts = rate * times.prompts(fresh, alone=False)
    if prompts >= 1:
        return math.inf, math.inf
    # With exponential lengths a sequence that runs has, in the mean, its whole mean output behind it.
    context = workload.prompt_tokens + workload.output_tokens
    number = 1.0
    for _ in range(500):
        base, slope = times.step(max(1, round(number)))
        step = (base + slope * number * context) / deployment.speculation.yields / (1 - prompts)
        after = rate * workload.output_tokens * step
        if after > max_sequences:
            return math.inf, math.inf
        if abs(after - number) < 1e-3 * number:
            return after, step
        number = 0.5 * (number + after)
    return number, step


def loaded(replica: Deployment, rate: float, requests: int = 3000, seed: int = 0) -> SimulatedLoad:
    return simulate_replica(replica, CHAT, rate, requests=requests, max_sequences=128, cache_tokens=CACHE, seed=seed)


@pytest.mark.parametrize("rate", [0.5, 1.5, 2.5, 3.0])
def test_means_agree_with_the_closed_form_below_the_cliff(replica: Deployment, rate: float) -> None:
    found = loaded(replica, rate, requests=6000)
    number, step = steady_state(replica, CHAT, rate)
    assert found.tpot.mean == pytest.approx(step, rel=0.1)
    assert found.batch == pytest.approx(number, rel=0.15)
    # What comes in goes out.
    assert found.tokens_per_s == pytest.approx(rate * CHAT.output_tokens, rel=0.1)


def test_little_and_the_cliff(replica: Deployment) -> None:
    """A mean hides it: half as much load again, and the first token takes a hundred times as long."""
    below, above = loaded(replica, 3.0), loaded(replica, 4.5)
    assert below.ttft.p90 < 1 < 10 < above.ttft.p50
    assert above.waiting > 100 and steady_state(replica, CHAT, 7.0) == (math.inf, math.inf)
    assert below.ttft.p50 <= below.ttft.p90 <= below.ttft.p99
    # Time per token grows a little, because the batch is full.
    assert 1 < above.tpot.mean / below.tpot.mean < 2
    assert loaded(replica, 9.0).tokens_per_s == pytest.approx(above.tokens_per_s, rel=0.1)


def test_jumps_change_nothing(replica: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every iteration by itself: the same requests meet the same times."""
    jumped = loaded(replica, 2.0, requests=300)

    class OneByOne(simulate._Replica):
        def _advance(self, until: float) -> None:
            super()._advance(min(until, self.clock + 1e-9))

    monkeypatch.setattr(simulate, "_Replica", OneByOne)
    stepped = loaded(replica, 2.0, requests=300)
    assert stepped.ttft.mean == pytest.approx(jumped.ttft.mean, rel=0.02)
    assert stepped.tpot.mean == pytest.approx(jumped.tpot.mean, rel=0.02)
    assert stepped.batch == pytest.approx(jumped.batch, rel=0.02)


def fleet(replica: Deployment, router: str, rate: float, replicas: int = 4) -> SimulatedLoad:
    return simulate_fleet(
        replica,
        CHAT,
        rate,
        replicas=replicas,
        router=router,
        requests=3000,
        max_sequences=128,
        cache_tokens=CACHE,
    )


def test_replicas_by_chance_are_each_a_replica_of_their_own(replica: Deployment) -> None:
    """Thinned Poisson arrivals are Poisson: four replicas at four times the rate are one at once the rate."""
    together, alone = fleet(replica, "random", 10.0), loaded(replica, 2.5, requests=3000)
    assert together.tpot.mean == pytest.approx(alone.tpot.mean, rel=0.05)
    assert together.ttft.p50 == pytest.approx(alone.ttft.p50, rel=0.05)
    assert fleet(replica, "random", 2.5, replicas=1) == alone


def test_routers_matter_near_the_cliff(replica: Deployment) -> None:
    found = {router: fleet(replica, router, 13.6) for router in ROUTERS[:3]}
    for router in ("least_loaded", "round_robin"):
        assert found[router].ttft.p99 < 0.5 * found["random"].ttft.p99
        assert found[router].ttft.mean < found["random"].ttft.mean
    with pytest.raises(RecipeError, match="one of random, round_robin, least_loaded"):
        fleet(replica, "nearest", 1.0)


def test_a_seed_is_an_answer(replica: Deployment) -> None:
    assert loaded(replica, 2.0, 500) == loaded(replica, 2.0, 500) != loaded(replica, 2.0, 500, seed=1)


def test_a_million_requests_take_minutes(replica: Deployment) -> None:
    """Five minutes of two cores are asked for; a fiftieth of them here."""
    start = time.process_time()
    loaded(replica, 3.0, requests=20000)
    assert time.process_time() - start < 300 / 50


def test_percentiles_by_nearest_rank() -> None:
    found = percentiles([float(value) for value in range(1, 101)])
    assert (found.p50, found.p90, found.p99, found.mean) == (50, 90, 99, 50.5)


def test_bad_simulations(replica: Deployment) -> None:
    with pytest.raises(RecipeError, match="0 requests a second"):
        loaded(replica, 0.0)
    with pytest.raises(RecipeError, match="does not fit the cache"):
        simulate_replica(replica, CHAT, 1.0, requests=100, cache_tokens=100)


def test_a_router_that_knows_prefixes_finds_more_of_them(replica: Deployment) -> None:
    """Each replica holds a part of the prefixes; together they hold more, if requests go where theirs is."""

    def behind(router: str, prefixes: int = 300) -> SimulatedLoad:
        return simulate_fleet(
            replica,
            CHAT,
            8.0,
            replicas=4,
            router=router,
            prefixes=prefixes,
            requests=3000,
            max_sequences=128,
            cache_tokens=CACHE,
        )

    knowing, blind = behind("prefix_aware"), behind("least_loaded")
    assert knowing.hits > blind.hits + 0.1 and knowing.ttft.mean < blind.ttft.mean
    # Few prefixes are held everywhere; with none to look for, all are found, as the closed form says.
    assert behind("least_loaded", 4).hits > 0.95 and behind("least_loaded", 0).hits == 1
    with pytest.raises(RecipeError, match="--prefixes"):
        behind("prefix_aware", 0)


def test_prompts_on_workers_of_their_own(replica: Deployment) -> None:
    """Tokens no longer wait for prompts of others, and beyond what the workers carry, prompts wait in line."""

    def apart(rate: float, workers: int) -> SimulatedLoad:
        fleet = Fleet(replica, 1, replica, workers)
        shape = {"requests": 3000, "max_sequences": 128, "cache_tokens": CACHE}
        return simulate_fleet(replica, CHAT, rate, replicas=1, apart=fleet, **shape)  # type: ignore[arg-type]

    one, mixed = apart(2.5, 1), loaded(replica, 2.5)
    assert one.tpot.mean < mixed.tpot.mean and one.tpot.p99 < mixed.tpot.p99
    each = total(prefill(replica, CHAT.prompt_tokens * (1 - CHAT.cached)))
    crowded = simulate_fleet(
        replica, CHAT, 1.5 / each, replicas=8, apart=Fleet(replica, 8, replica, 1), requests=2000, cache_tokens=1e9
    )
    relieved = simulate_fleet(
        replica, CHAT, 1.5 / each, replicas=8, apart=Fleet(replica, 8, replica, 3), requests=2000, cache_tokens=1e9
    )
    assert crowded.ttft.p90 > 5 * relieved.ttft.p90
    with pytest.raises(RecipeError, match="find all prefixes"):
        simulate_fleet(replica, CHAT, 1.0, replicas=1, apart=Fleet(replica, 1, replica, 1), prefixes=5)
