"""Waiting and percentiles: replicas under random arrivals, iteration by iteration, with the cost model's times.

Between events nothing changes but the length of the caches, so that many iterations are one addition: a million
requests take well under a minute of one core.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from tafkir.errors import RecipeError
from tafkir.plan.advise import Option
from tafkir.plan.load import CHUNK_TOKENS, Fleet
from tafkir.plan.serving import Deployment, decode_step, prefill, total
from tafkir.plan.workload import Workload

__all__ = [
    "ROUTERS",
    "Percentiles",
    "SimulatedLoad",
    "load_curve",
    "percentiles",
    "simulate_fleet",
    "simulate_replica",
]

ROUTERS = ("random", "round_robin", "least_loaded", "prefix_aware")
"""How a router chooses a replica: by chance, in turn, the one with the fewest unfinished requests, or the same among
those that hold the request's prefix, unless they are far busier than the others."""

# A holder of the prefix is passed over at this many times the least load, and so many requests on top.
_BUSIER, _MORE = 1.5, 8

_EXACT_BATCH, _BATCH_GRID = 64, 8
_SHORTEST_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a time in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class SimulatedLoad:
    """What users met.

    Attributes:
        rate: requests a second that arrived. requests: that were measured. tokens_per_s: of their answers.
        batch: sequences that were decoded together in the mean. waiting: prompts in line at the end.
        hits: share of the requests that found their prefix.
    """

    rate: float
    requests: int
    ttft: Percentiles
    tpot: Percentiles
    tokens_per_s: float
    batch: float
    waiting: int
    hits: float = 1.0


@dataclass(slots=True)
class _Times:
    """Seconds of an iteration, looked up: the cost model's terms are linear in the caches' length."""

    deployment: Deployment
    context: float
    cached: float
    prefix_tokens: float = 0.0
    _steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    _prefills: dict[int, float] = field(default_factory=dict)

    def step(self, batch: int) -> tuple[float, float]:
        """(seconds with empty caches, seconds more for every token in all of them) of a decoding iteration."""
        key = batch if batch <= _EXACT_BATCH else -(-batch // _BATCH_GRID) * _BATCH_GRID
        if key not in self._steps:
            groups = self.deployment.layout.dp
            each = key / groups
            short, long = (total(decode_step(self.deployment, each, scale * self.context)) for scale in (0.5, 1.5))
            slope = (long - short) / (self.context * key)
            self._steps[key] = (short - 0.5 * slope * self.context * key, slope)
        return self._steps[key]

    def prompts(self, tokens: int, *, alone: bool) -> float:
        """Seconds that prompt tokens add to an iteration, or take by themselves."""
        key = _SHORTEST_CHUNK
        while key < tokens:
            key *= 2
        if key not in self._prefills:
            self._prefills[key] = total(prefill(self.deployment, max(1.0, key / self.deployment.layout.dp)))
        shared = 0.0 if alone else self.deployment.shape.num_layers * self.deployment.coefficients.layer_s
        # Between grid points a pass costs in proportion to its tokens.
        return max(0.0, self._prefills[key] * max(tokens / key, 0.5) - shared)


def percentiles(values: list[float]) -> Percentiles:
    """Of at least one value, by nearest rank."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]

    return Percentiles(sum(ordered) / len(ordered), at(0.5), at(0.9), at(0.99))


# Shares of what a closed loop of patient users gets out of the replica.
_LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def load_curve(
    option: Option, workload: Workload, requests: int, *, router: str | None = None, prefixes: int = 0
) -> list[SimulatedLoad]:
    """One replica of an option, or all behind a router, at growing load, up to and beyond what they carry.

    Args:
        option: where prompts have workers of their own, these and the decoding ones together are a replica.
        workload: its mean lengths.
        requests: of each point.
        router: one of `ROUTERS`; None takes one replica. prefixes: see `simulate_fleet`.
    """
    d, memory = option.fleet.decode, option.memory
    count = option.replicas if router else 1
    most = count * option.point.tokens_per_s / workload.output_tokens
    apart = replace(option.fleet, num_prefill=count * option.fleet.num_prefill) if option.fleet.prompts else None
    if apart and not router:
        router = "least_loaded"
    tokens = memory.free / memory.sequence * (workload.prompt_tokens + workload.output_tokens) * d.layout.dp
    limit = min(option.batch, memory.sequences) * d.layout.dp
    return [
        simulate_fleet(
            d,
            workload,
            share * most,
            replicas=count * option.fleet.num_decode,
            router=router or ROUTERS[0],
            prefixes=prefixes,
            apart=apart,
            requests=requests,
            max_sequences=limit,
            cache_tokens=tokens,
        )
        for share in _LOADS
    ]


def simulate_replica(
    deployment: Deployment,
    workload: Workload,
    rate: float,
    *,
    requests: int = 20000,
    max_sequences: int = 256,
    cache_tokens: float = math.inf,
    seed: int = 0,
) -> SimulatedLoad:
    """Poisson arrivals with exponential lengths, served first come first served with chunked prefill.

    Args:
        deployment: the replica. workload: its mean lengths and cached share.
        rate: requests a second.
        requests: that arrive; the first fifth warms up and is not measured.
        max_sequences: decoded at once. cache_tokens: that the caches hold; a request is let in with room for all of it.
        seed: of arrivals and lengths.

    Raises:
        RecipeError: the rate is not positive, or a typical request does not fit the cache.
    """
    return simulate_fleet(
        deployment,
        workload,
        rate,
        replicas=1,
        requests=requests,
        max_sequences=max_sequences,
        cache_tokens=cache_tokens,
        seed=seed,
    )


def simulate_fleet(
    deployment: Deployment,
    workload: Workload,
    rate: float,
    *,
    replicas: int,
    router: str = "least_loaded",
    prefixes: int = 0,
    apart: Fleet | None = None,
    requests: int = 20000,
    max_sequences: int = 256,
    cache_tokens: float = math.inf,
    seed: int = 0,
) -> SimulatedLoad:
    """The same for identical replicas behind a router that sends each request to one of them as it arrives.

    Args:
        rate: requests a second of all replicas together.
        replicas: how many. router: one of `ROUTERS`.
        prefixes: that requests share, each as long as the cached share of a mean prompt, popular ones asked for more
            often (the share of the first x is the root of x). A replica keeps those that it used last in what room
            requests leave. 0: every request finds its cached share.
        apart: whose workers for prompts do these first; the replicas decode.

    The other arguments and the errors are those of `simulate_replica`.
    """
    _check(workload, rate, requests, cache_tokens, router, prefixes)
    times = _Times(
        deployment,
        workload.prompt_tokens + workload.output_tokens / 2,
        workload.cached,
        workload.cached * workload.prompt_tokens,
    )
    fleet = [_Replica(times, max_sequences, cache_tokens) for _ in range(replicas)]
    events: Iterable[tuple[float, list[float]]] = _arrivals(workload, rate, requests, cache_tokens, prefixes, seed)
    if apart is not None:
        if prefixes:
            raise RecipeError(
                "workers of their own for prompts find all prefixes", where="--prefixes", fix="leave it out"
            )
        events = _prefilled(events, apart, workload)
    routes = random.Random(seed + 1)
    arrival, warm, start = 0.0, requests // 5, 0.0
    for number, (arrival, request) in enumerate(events):
        for replica in fleet:
            replica.work_until(arrival)
        if number == warm:
            start = arrival
            for replica in fleet:
                replica.forget()
        _route(fleet, router, number, routes, int(request[4])).line.append(request)
    # While requests still arrive, every replica is as busy as it stays.
    span = max(arrival - start, 1e-9)
    tokens = sum(replica.tokens for replica in fleet)
    busy = sum(replica.busy_s for replica in fleet)
    batch = sum(replica.sequence_s for replica in fleet) / max(busy, 1e-9)
    waiting = sum(len(replica.line) for replica in fleet)
    found = sum(replica.found for replica in fleet)
    hits = found / max(1, found + sum(replica.missed for replica in fleet)) if prefixes else 1.0
    for replica in fleet:
        replica.work_until(math.inf)
    ttft = [seconds for replica in fleet for seconds in replica.ttft]
    tpot = [seconds for replica in fleet for seconds in replica.tpot]
    return SimulatedLoad(rate, len(tpot), percentiles(ttft), percentiles(tpot), tokens / span, batch, waiting, hits)


def _check(workload: Workload, rate: float, requests: int, cache_tokens: float, router: str, prefixes: int) -> None:
    if not rate > 0 or requests < 10:
        raise RecipeError(f"{rate:g} requests a second, {requests} of them", where="simulation", expected="more")
    if cache_tokens < workload.prompt_tokens + workload.output_tokens:
        raise RecipeError("a typical request does not fit the cache", where="simulation", fix="take another layout")
    if router not in ROUTERS:
        raise RecipeError("no such router", where=router, expected=f"one of {', '.join(ROUTERS)}")
    if router == "prefix_aware" and not prefixes:
        raise RecipeError("no prefixes to know of", where="--router prefix_aware", fix="say how many with --prefixes")


def _arrivals(
    workload: Workload, rate: float, requests: int, cache_tokens: float, prefixes: int, seed: int
) -> Iterator[tuple[float, list[float]]]:
    """Moments, and [arrival, prompt tokens to work on, output, prompt, prefix or -1], one after the other."""
    lengths, asked = random.Random(seed), random.Random(seed + 2)
    arrival = 0.0
    for _ in range(requests):
        arrival += lengths.expovariate(rate)
        prompt = max(1.0, lengths.expovariate(1 / workload.prompt_tokens))
        output = max(1.0, lengths.expovariate(1 / workload.output_tokens))
        prompt = min(prompt, max(1.0, cache_tokens - output))
        prefix = int(prefixes * asked.random() ** 2) if prefixes else -1
        yield arrival, [arrival, max(1.0, prompt * (1 - workload.cached)), output, prompt, prefix]


def _prefilled(
    events: Iterable[tuple[float, list[float]]], fleet: Fleet, workload: Workload
) -> list[tuple[float, list[float]]]:
    """The same requests as they leave the workers for prompts, first come first served, with their caches moved."""
    d, worker = fleet.decode, fleet.prompts
    assert worker is not None
    times = _Times(worker, workload.prompt_tokens, workload.cached)
    # Groups that copy attention work on prompts of their own.
    free = [0.0] * (fleet.num_prefill * worker.layout.dp)
    ready = []
    for arrival, request in events:
        began = max(arrival, heapq.heappop(free))
        done = began + times.prompts(math.ceil(request[1]) * worker.layout.dp, alone=True)
        heapq.heappush(free, done)
        size = d.shape.sequence_bytes(request[3], d.cache_dtype_bytes)
        request[1] = 0.0
        ready.append((done + size / (d.chip.network * d.coefficients.network_share), request))
    return sorted(ready)


def _route(fleet: list[_Replica], router: str, number: int, rng: random.Random, prefix: int) -> _Replica:
    if len(fleet) == 1:
        return fleet[0]
    if router == "random":
        return rng.choice(fleet)
    if router == "round_robin":
        return fleet[number % len(fleet)]
    least = min(fleet, key=lambda replica: replica.load)
    if router == "prefix_aware":
        holders = [replica for replica in fleet if prefix in replica.prefixes]
        holder = min(holders, key=lambda replica: replica.load, default=least)
        return holder if holder.load <= _BUSIER * least.load + _MORE else least
    return least


class _Replica:
    """The state of one replica: what runs, what waits, and the clock."""

    def __init__(self, times: _Times, max_sequences: int, cache_tokens: float) -> None:
        self.times, self.max_sequences, self.cache_tokens = times, max_sequences, cache_tokens
        self.yields = times.deployment.speculation.yields
        c = times.deployment.coefficients
        self.constant, self.admission = c.request_s, c.first_token_steps[times.deployment.engine]
        self.clock, self.iteration, self.reserved, self.context = 0.0, 0, 0.0, 0.0
        # (last iteration, number, first token's time, steps, prompt, tokens reserved) of what is decoded.
        self.running: list[tuple[int, int, float, int, float, float]] = []
        # Prefixes that it holds, the one used last at the end.
        self.prefixes: OrderedDict[int, None] = OrderedDict()
        # [arrival, prompt tokens left, output, prompt, prefix] of what is not let in, and of what is.
        self.line: deque[list[float]] = deque()
        self.pending: deque[list[float]] = deque()
        self.started = 0
        self.forget()

    def forget(self) -> None:
        """Measure from here on."""
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.busy_s = self.sequence_s = self.tokens = 0.0
        self.found = self.missed = 0

    @property
    def load(self) -> int:
        """Requests that it has not finished."""
        return len(self.running) + len(self.pending) + len(self.line)

    def work_until(self, until: float) -> None:
        """Go on to a moment, or a little beyond it: an iteration is not interrupted."""
        while self.clock < until:
            self._admit()
            if not self.running and not self.pending:
                if math.isfinite(until):
                    self.clock = until
                return
            self._advance(until)

    def _admit(self) -> None:
        """Let requests in, first come first served, as long as all of each fits."""
        while self.line and len(self.running) + len(self.pending) < self.max_sequences:
            _, _, output, prompt, prefix = self.line[0]
            if self.reserved + prompt + output > self.cache_tokens and self.reserved:
                return
            self.reserved += prompt + output
            head = self.line.popleft()
            if prefix >= 0:
                self._find_prefix(head, int(prefix))
            self.pending.append(head)

    def _find_prefix(self, head: list[float], prefix: int) -> None:
        """Charge the whole prompt where its prefix is not held; keep it, and forget those for which room is lacking."""
        if prefix in self.prefixes:
            self.found += 1
            self.prefixes.move_to_end(prefix)
        else:
            self.missed += 1
            head[1] = head[3]
            self.prefixes[prefix] = None
        room = max(0.0, self.cache_tokens - self.reserved)
        while self.prefixes and len(self.prefixes) * self.times.prefix_tokens > room:
            self.prefixes.popitem(last=False)

    def _advance(self, until: float) -> None:
        """One iteration with prompts in it, or as many without as nothing else happens."""
        batch = len(self.running)
        base, slope = self.times.step(batch) if batch else (0.0, 0.0)
        if self.pending:
            count = 1
            decode_s = base + slope * self.context
            seconds = decode_s + self._prefill(batch, decode_s)
        else:
            count = self.running[0][0] - self.iteration
            first = base + slope * (self.context + batch)
            if math.isfinite(until):
                count = max(1, min(count, math.ceil((until - self.clock) / first)))
            seconds = count * base + slope * (count * self.context + batch * count * (count + 1) / 2 * self.yields)
            self.clock += seconds
        if batch:
            self.iteration += count
            self.context += count * batch * self.yields
            self.tokens += count * batch * self.yields
            self.busy_s += seconds
            self.sequence_s += seconds * batch
            self._finish()

    def _prefill(self, batch: int, decode_s: float) -> float:
        """Work on the prompts at the head of the line, up to a chunk, and start those that are done."""
        room, used = float(CHUNK_TOKENS), 0.0
        done = []
        while self.pending and room > 0:
            head = self.pending[0]
            part = min(room, head[1])
            head[1] -= part
            room -= part
            used += part
            if head[1] > 0:
                break
            done.append(self.pending.popleft())
        seconds = self.times.prompts(math.ceil(used), alone=batch == 0) if used else 0.0
        self.clock += decode_s + seconds
        # What was running has had an iteration by the time that these have their first.
        now = self.iteration + (1 if batch else 0)
        for arrival, _, output, prompt, _ in done:
            self.ttft.append(self.clock - arrival + self.constant + self.admission * decode_s)
            self.started += 1
            steps = max(1, math.ceil((output - 1) / self.yields))
            heapq.heappush(self.running, (now + steps, self.started, self.clock, steps, prompt, prompt + output))
            self.context += prompt
        return seconds

    def _finish(self) -> None:
        while self.running and self.running[0][0] <= self.iteration:
            _, _, began, steps, prompt, reserved = heapq.heappop(self.running)
            self.tpot.append((self.clock - began) / (steps * self.yields))
            self.reserved -= reserved
            self.context = max(0.0, self.context - prompt - steps * self.yields)
