"""A day of a fleet of any size: traffic that rises and falls, replicas that start slowly, fail, and are scaled.

Replicas are alike and requests many, so both flow like a fluid in steps of a minute; what happens inside a replica is
`plan/simulate.py`'s matter.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from tafkir.errors import RecipeError

__all__ = ["Day", "Scaler", "Traffic", "run_day"]

_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests a second over a day: a cosine from the trough at midnight to the peak at noon.

    Attributes:
        peak: requests a second. trough: share of it at night.
    """

    peak: float
    trough: float = 0.3

    def rate(self, second: float) -> float:
        """At a moment of the day."""
        swing = 0.5 - 0.5 * math.cos(2 * math.pi * second / _DAY_S)
        return self.peak * (self.trough + (1 - self.trough) * swing)


@dataclass(frozen=True, slots=True)
class Scaler:
    """How many replicas are wanted.

    Attributes:
        target: share of their capacity that replicas shall work at. low: below it one of them may go.
        every_s: between decisions. start_s: from the decision until a replica answers.
        consolidates: takes a replica away only if the others then stay at the target, load N / (N - 1). Without it a
            fleet swings between two sizes for ever (ai-dynamo/dynamo, pull request 9294).
        fixed: this many replicas all day; 0 scales.
    """

    target: float = 0.8
    low: float = 0.6
    every_s: float = 60.0
    start_s: float = 300.0
    consolidates: bool = True
    fixed: int = 0

    def wanted(self, rate: float, capacity: float, have: int) -> int:
        """Replicas for a rate, given what each carries and how many there are."""
        if self.fixed:
            return self.fixed
        load = rate / capacity
        if load > self.target * have:
            return math.ceil(load / self.target)
        if have > 1 and load < self.low * have:
            fewer = max(1, math.ceil(load / self.target)) if self.consolidates else max(1, math.ceil(have / 2))
            return min(have, fewer)
        return have


@dataclass(frozen=True, slots=True)
class Day:
    """What a day took.

    Attributes:
        replica_hours: paid for, those that start among them. most: replicas at once. changes: of their wanted number.
        turns: times that growing followed shrinking or the other way round.
        late: share of requests that found a line. longest_wait_s: in it.
        failures: of replicas. requests: that came.
    """

    replica_hours: float
    most: int
    changes: int
    turns: int
    late: float
    longest_wait_s: float
    failures: float
    requests: float


def run_day(traffic: Traffic, scaler: Scaler, capacity: float, *, failures_per_day: float = 0.0, days: int = 1) -> Day:
    """The last of so many days, minute by minute.

    Args:
        traffic: what comes. scaler: how many replicas are wanted.
        capacity: requests a second that a replica carries.
        failures_per_day: of one replica; its successor takes `start_s`.
        days: simulated; the first starts with what it needs.

    Raises:
        RecipeError: a rate or a share is out of range.
    """
    if not (traffic.peak > 0 and capacity > 0 and 0 <= traffic.trough <= 1 and 0 < scaler.target <= 1):
        raise RecipeError("rates must be positive, shares between 0 and 1", where="a day's traffic")
    if failures_per_day < 0 or scaler.every_s <= 0 or scaler.start_s < 0:
        raise RecipeError("times and failures must not be negative", where="a day's traffic")
    step = scaler.every_s
    have = scaler.wanted(traffic.rate(0), capacity, 1)
    ready, starting, line = float(have), deque[tuple[float, float]](), 0.0
    tally = _Tally()
    for number in range(round(days * _DAY_S / step)):
        if number == round((days - 1) * _DAY_S / step):
            tally = _Tally()
        now = number * step
        while starting and starting[0][0] <= now:
            ready += starting.popleft()[1]
        rate = traffic.rate(now % _DAY_S)
        wanted = scaler.wanted(rate, capacity, have)
        if wanted > have:
            starting.append((now + scaler.start_s, float(wanted - have)))
        elif wanted < have:
            ready = _remove(ready, starting, have - wanted)
        tally.change(wanted - have)
        have = wanted
        failed = min(ready, ready * failures_per_day * step / _DAY_S)
        ready -= failed
        if failed:
            starting.append((now + scaler.start_s, failed))
        carried = ready * capacity * step
        late = line > 0
        line = max(0.0, line + rate * step - carried)
        tally.minute(rate * step, line > 0 or late, line / max(ready * capacity, 1e-9), have * step, have, failed)
    return tally.day()


def _remove(ready: float, starting: deque[tuple[float, float]], count: float) -> float:
    """Take away what is still starting first; returns the replicas that answer after that."""
    while starting and count > 0:
        when, number = starting.pop()
        gone = min(number, count)
        count -= gone
        if number > gone:
            starting.append((when, number - gone))
    return max(0.0, ready - count)


class _Tally:
    """Sums of a day."""

    def __init__(self) -> None:
        self.requests = self.late = self.wait = self.seconds = self.failures = 0.0
        self.most = self.changes = self.turns = self.last = 0

    def change(self, difference: int) -> None:
        if not difference:
            return
        sign = 1 if difference > 0 else -1
        self.changes += 1
        self.turns += sign == -self.last
        self.last = sign

    def minute(self, came: float, late: bool, wait: float, seconds: float, have: int, failed: float) -> None:
        self.requests += came
        self.late += came if late else 0.0
        self.wait = max(self.wait, wait if late else 0.0)
        self.seconds += seconds
        self.most = max(self.most, have)
        self.failures += failed

    def day(self) -> Day:
        share = self.late / self.requests if self.requests else 0.0
        return Day(
            self.seconds / 3600, self.most, self.changes, self.turns, share, self.wait, self.failures, self.requests
        )
