"""Ratings: Codeforces Elo of what was solved, and Elo (Bradley-Terry) and Glicko-2 of who beat whom."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate

from tafkir.errors import DataError

__all__ = [
    "Game", "Glicko", "contest_points", "contest_rating", "elo_ratings", "expected_rank", "percentile",
    "rate_glicko", "rating_difference", "solved_rating",
]  # fmt: skip

_SCALE = math.log(10) / 400
_LOWEST, _HIGHEST = 0.0, 5000.0


# ---- Codeforces ----------------------------------------------------------------------------------------------------


def contest_points(problems: Mapping[str, float | None], tries: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """Points and penalty of a contest, by the tries at its problems in their order.

    A problem with points gives them less 50 for each try that failed before; one without (None) gives 1, and 10 minutes
    of penalty for each such try (CodeElo's way, arXiv 2501.01257, where nobody is timed).
    """
    points = penalty = 0.0
    for name, worth in problems.items():
        failed = next((number for number, solved in enumerate(tries.get(name, ())) if solved), None)
        if failed is None:
            continue
        if worth is None:
            points, penalty = points + 1, penalty + 10 * failed
        else:
            points += max(0.0, worth - 50 * failed)
    return points, penalty


def expected_rank(rating: float, field: Sequence[float]) -> float:
    """1 plus the chances of all others to do better: Codeforces' seed of a participant among a field of ratings."""
    return 1 + math.fsum(1 / (1 + 10 ** ((rating - other) / 400)) for other in field)


def contest_rating(rank: float, field: Sequence[float]) -> float:
    """The rating whose expected rank among the field is this one, between 0 and 5000.

    Args:
        rank: 1 is the first; ties share the mean of their ranks.
        field: ratings of the contest's participants.

    Raises:
        DataError: there is no field, or the rank is not in it.
    """
    if not field or not 1 <= rank <= len(field) + 1:
        raise DataError(f"rank {rank:g} in a field of {len(field)}", expected=f"1 to {len(field) + 1}")
    return _bisect(lambda rating: rank - expected_rank(rating, field))


def solved_rating(problems: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The most likely rating of who solved and missed problems of these ratings, and its standard error.

    A problem of rating d is solved with chance 1 / (1 + 10 ** ((d - r) / 400)). With all or none solved the likelihood
    has no top: half a problem, of the mean rating, is then taken to be missed or solved.

    Args:
        problems: rating, and 1 where it was solved; of several tries the share of them.

    Raises:
        DataError: there is no problem.
    """
    if not problems:
        raise DataError("no rated problem was tried", expected="at least one")
    solved = math.fsum(done for _, done in problems)
    solved = min(max(solved, 0.5), len(problems) - 0.5)

    def chances(rating: float) -> list[float]:
        return [1 / (1 + 10 ** ((difficulty - rating) / 400)) for difficulty, _ in problems]

    rating = _bisect(lambda own: math.fsum(chances(own)) - solved)
    information = _SCALE**2 * math.fsum(chance * (1 - chance) for chance in chances(rating))
    return rating, 1 / math.sqrt(information)


def rating_difference(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """How far the second's rating is above the first's on the same problems in the same order, and its standard error.

    The error is that of the paired influences of the problems on the two most likely ratings (the sandwich of Huber
    1967), so that a problem that both solve or both miss does not count for chance.
    """
    influences = []
    ratings = [solved_rating(side)[0] for side in (first, second)]
    for rating, side in zip(ratings, (first, second), strict=True):
        chances = [1 / (1 + 10 ** ((difficulty - rating) / 400)) for difficulty, _ in side]
        slope = _SCALE * math.fsum(chance * (1 - chance) for chance in chances)
        influences.append([(done - chance) / slope for (_, done), chance in zip(side, chances, strict=True)])
    spread = math.fsum((b - a) ** 2 for a, b in zip(*influences, strict=True))
    return ratings[1] - ratings[0], math.sqrt(spread)


def _bisect(rises: Callable[[float], float]) -> float:
    low, high = _LOWEST, _HIGHEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) > 0 else (middle, high)
    return (low + high) / 2


@cache
def _distribution() -> tuple[list[int], list[int]]:
    text = files("tafkir").joinpath("datasets", "codeforces", "ratings_2024.json").read_text("utf-8")
    counts = {int(rating): int(users) for rating, users in json.loads(text).items()}
    ratings = sorted(counts)
    return ratings, [0, *accumulate(counts[rating] for rating in ratings)]


def percentile(rating: float) -> float:
    """Share in percent of the 89,352 Codeforces users of 2024 whose rating is lower."""
    ratings, below = _distribution()
    return 100 * below[bisect_left(ratings, rating)] / below[-1]


# ---- who beat whom -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Game:
    """`score` is 1 where the first won, 0 where the second did, 0.5 for a tie."""

    first: str
    second: str
    score: float


def elo_ratings(games: Sequence[Game], *, anchor: str | None = None, anchor_rating: float = 1000.0) -> dict[str, float]:
    """Bradley-Terry ratings on the Elo scale: the most likely ones, whatever the order of the games.

    Half a game lost and won against each opponent keeps them finite. With an anchor all are moved so that it has
    `anchor_rating`; else their mean has.
    """
    names = sorted({name for game in games for name in (game.first, game.second)})
    won = {name: 0.0 for name in names}
    met: dict[tuple[str, str], float] = {}
    for game in games:
        won[game.first] += game.score
        won[game.second] += 1 - game.score
        pair = (min(game.first, game.second), max(game.first, game.second))
        met[pair] = met.get(pair, 0.0) + 1
    for first, second in met:
        met[first, second] += 1
        won[first] += 0.5
        won[second] += 0.5
    strength = dict.fromkeys(names, 1.0)
    for _ in range(10_000):  # Hunter's minorisation (2004), which rises to the maximum from anywhere
        share = dict.fromkeys(names, 0.0)
        for (first, second), count in met.items():
            part = count / (strength[first] + strength[second])
            share[first] += part
            share[second] += part
        fresh = {name: won[name] / share[name] for name in names}
        scale = math.exp(math.fsum(map(math.log, fresh.values())) / len(fresh))
        fresh = {name: value / scale for name, value in fresh.items()}
        moved = max(abs(math.log(fresh[name] / strength[name])) for name in names)
        strength = fresh
        if moved < 1e-10:
            break
    ratings = {name: anchor_rating + math.log(value) / _SCALE for name, value in strength.items()}
    shift = anchor_rating - ratings[anchor] if anchor is not None else 0.0
    return {name: rating + shift for name, rating in ratings.items()}


@dataclass(frozen=True, slots=True)
class Glicko:
    """A Glicko-2 rating, its deviation and volatility (Glickman, 2012), on the Glicko scale."""

    rating: float = 1500.0
    deviation: float = 350.0
    volatility: float = 0.06


def rate_glicko(player: Glicko, results: Sequence[tuple[Glicko, float]], *, tau: float = 0.5) -> Glicko:
    """The player after one rating period: opponents with scores from 0 to 1.

    Source: Glickman, "Example of the Glicko-2 system" (2012), steps 2 to 8.
    """
    mu, phi = (player.rating - 1500) / 173.7178, player.deviation / 173.7178
    if not results:
        return Glicko(player.rating, 173.7178 * math.hypot(phi, player.volatility), player.volatility)
    precision = gain = 0.0
    for opponent, score in results:
        their_mu, their_phi = (opponent.rating - 1500) / 173.7178, opponent.deviation / 173.7178
        weight = 1 / math.sqrt(1 + 3 * their_phi**2 / math.pi**2)
        chance = 1 / (1 + math.exp(-weight * (mu - their_mu)))
        precision += weight**2 * chance * (1 - chance)
        gain += weight * (score - chance)
    variance = 1 / precision
    volatility = _volatility(phi, player.volatility, variance, variance * gain, tau)
    phi = 1 / math.sqrt(1 / (phi**2 + volatility**2) + precision)
    return Glicko(1500 + 173.7178 * (mu + phi**2 * gain), 173.7178 * phi, volatility)


def _volatility(phi: float, sigma: float, variance: float, delta: float, tau: float) -> float:
    """Step 5: the root of Glickman's f by the Illinois method."""
    start = math.log(sigma**2)

    def f(x: float) -> float:
        power = math.exp(x)
        top = power * (delta**2 - phi**2 - variance - power)
        return top / (2 * (phi**2 + variance + power) ** 2) - (x - start) / tau**2

    low = start
    if delta**2 > phi**2 + variance:
        high = math.log(delta**2 - phi**2 - variance)
    else:
        high = start - tau
        while f(high) < 0:
            high -= tau
    at_low, at_high = f(low), f(high)
    while abs(high - low) > 1e-9:
        middle = low + (low - high) * at_low / (at_high - at_low)
        at_middle = f(middle)
        if at_middle * at_high <= 0:
            low, at_low = high, at_high
        else:
            at_low /= 2
        high, at_high = middle, at_middle
    return math.exp(low / 2)
