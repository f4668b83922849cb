"""Chooses one option a group at the least loss within a budget: the multiple-choice knapsack, solved exactly.

A Lagrangian bound leaves few options open (Sinha and Zoltners 1979; the core of Pisinger 1995), and
dynamic programming over undominated states decides those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from tafkir.errors import RecipeError

__all__ = ["Allocation", "Option", "allocate", "allocate_reference", "best_choices"]


# Hundreds of groups stay far below; beyond, the answer is within what `Allocation.bound` says, if not the best.
_MAX_STATES = 2_000


@dataclass(frozen=True, slots=True)
class Option:
    """What a group may become.

    Attributes:
        cost: such as bytes, not negative.
        loss: such as nats, not negative.
    """

    cost: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for each group.

    Attributes:
        picks: index of the option of each group.
        cost: of all of them.
        loss: of all of them.
        price: loss that one more unit of budget is worth at this budget (the multiplier of the relaxed problem); 0
            where the budget does not bind.
        bound: no choice within the budget loses less than this, whole or in parts.
    """

    picks: tuple[int, ...]
    cost: int
    loss: float
    price: float
    bound: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """The options with the least sum of losses whose costs sum to at most `budget`.

    Exact up to hundreds of groups; where very many choices lie within the bound's reach, as with budgets that a few
    huge groups cannot fill, the best ones alone are followed, and `bound` says how near the answer is.

    Raises:
        RecipeError: even the cheapest options cost more.
    """
    frontiers = [_undominated(options) for options in groups]
    least = sum(options[frontier[0]].cost for options, frontier in zip(groups, frontiers, strict=True))
    if least > budget:
        raise RecipeError(f"a budget of {budget:,} is too small", expected=f"{least:,} or more")
    price, greedy = _relax(groups, frontiers, budget)
    incumbent = sum(options[pick].loss for options, pick in zip(groups, greedy, strict=True))
    reduced = [_reduced(options, frontier, price) for options, frontier in zip(groups, frontiers, strict=True)]
    bound = sum(min(o.loss + price * o.cost for o in options) for options in groups) - price * budget
    picks = _deepen(groups, reduced, budget, price, (bound, incumbent)) or greedy
    cost = sum(options[pick].cost for options, pick in zip(groups, picks, strict=True))
    return Allocation(tuple(picks), cost, _loss(groups, picks), price, min(bound, _loss(groups, picks)))


def _loss(groups: Sequence[Sequence[Option]], picks: Sequence[int]) -> float:
    return sum(options[pick].loss for options, pick in zip(groups, picks, strict=True))


def _undominated(options: Sequence[Option]) -> list[int]:
    """Options by rising cost, each with less loss than all cheaper ones."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss)):
        if not kept or options[i].loss < options[kept[-1]].loss:
            kept.append(i)
    return kept


def best_choices(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """(cost, loss) of the choices on the lower convex hull of all, from the cheapest to the one that loses least."""
    frontiers = [_undominated(options) for options in groups]
    picks = [frontier[0] for frontier in frontiers]
    cost = sum(options[pick].cost for options, pick in zip(groups, picks, strict=True))
    line = [(cost, _loss(groups, picks))]
    for _, group, pick in _steps(groups, frontiers):
        before, after = groups[group][picks[group]], groups[group][pick]
        picks[group] = pick
        line.append((line[-1][0] + after.cost - before.cost, line[-1][1] + after.loss - before.loss))
    return [(cost, max(0.0, loss)) for cost, loss in line]


def _steps(groups: Sequence[Sequence[Option]], frontiers: Sequence[Sequence[int]]) -> list[tuple[float, int, int]]:
    """Steps along each group's convex hull, those that save most for each unit of cost first: (rate, group, option)."""
    steps = []
    for group, frontier in enumerate(frontiers):
        options, hull = groups[group], list[int]()
        for i in frontier:
            while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(options, hull[-1], i):
                hull.pop()
            hull.append(i)
        steps += [(_slope(options, a, b), group, b) for a, b in pairwise(hull)]
    return sorted(steps, key=lambda step: (-step[0], step[1]))


def _relax(
    groups: Sequence[Sequence[Option]], frontiers: Sequence[Sequence[int]], budget: int
) -> tuple[float, list[int]]:
    """The multiplier of the linear relaxation, and what its greedy solution comes to in whole options."""
    picks = [frontier[0] for frontier in frontiers]
    left = budget - sum(options[pick].cost for options, pick in zip(groups, picks, strict=True))
    price, closed = 0.0, set[int]()
    for slope, group, pick in _steps(groups, frontiers):
        more = groups[group][pick].cost - groups[group][picks[group]].cost
        if group not in closed and more <= left:
            picks[group], left = pick, left - more
        else:
            # The first step that does not fit sets the price; what comes later only fills the gap.
            price = price or slope
            closed.add(group)
    return price, picks


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    """Loss saved for each unit of cost, from a to the dearer b."""
    return (options[a].loss - options[b].loss) / (options[b].cost - options[a].cost)


def _reduced(options: Sequence[Option], frontier: Sequence[int], price: float) -> list[tuple[int, float]]:
    """(option, what it lies above the group's best at this price)."""
    best = min(options[i].loss + price * options[i].cost for i in frontier)
    return [(i, max(0.0, options[i].loss + price * options[i].cost - best)) for i in frontier]


def _deepen(
    groups: Sequence[Sequence[Option]],
    reduced: Sequence[Sequence[tuple[int, float]]],
    budget: int,
    price: float,
    limits: tuple[float, float],
) -> list[int] | None:
    """The best choice, looked for at first near the bound alone; None where nothing beats the incumbent.

    A choice loses what the bound says, its reduced losses, and the price of what it leaves of the budget. So one that
    is within the slack of the bound is the best of all once all with reduced losses within the slack were seen.
    """
    bound, incumbent = limits
    # The room for rounding errors is that of the largest terms of the sums.
    whole, room = max(0.0, incumbent - bound), 1e-12 * (1 + incumbent + price * budget)
    slack = whole / 1024
    while True:
        picks = _search(groups, reduced, budget, price, min(slack, whole) + room)
        if picks is not None and (slack >= whole or _loss(groups, picks) <= bound + slack + room):
            return picks if _loss(groups, picks) < incumbent else None
        if slack >= whole:
            return None
        slack *= 4


def _search(
    groups: Sequence[Sequence[Option]],
    reduced: Sequence[Sequence[tuple[int, float]]],
    budget: int,
    price: float,
    slack: float,
) -> list[int] | None:
    """The best choice among those within the slack of the bound; None where there is none within the budget."""
    open_ = [[(i, above) for i, above in options if above <= slack] for options in reduced]
    order = sorted(range(len(groups)), key=lambda g: len(open_[g]))
    costs = [[groups[g][i].cost for i, _ in open_[g]] for g in range(len(groups))]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    # (cost, loss, sum of reduced losses, chain of picks)
    states: list[tuple[int, float, float, tuple[object, ...]]] = [(0, 0.0, 0.0, ())]
    for group in order:
        least, most = least - min(costs[group]), most - max(costs[group])
        grown = []
        for cost, loss, total, chain in states:
            for i, above in open_[group]:
                now, sum_above = cost + groups[group][i].cost, total + above
                unused = price * max(0, budget - now - most)
                if now + least <= budget and sum_above + unused <= slack:
                    grown.append((now, loss + groups[group][i].loss, sum_above, (chain, i)))
        states = []
        for state in sorted(grown, key=lambda state: state[:2]):
            if not states or state[1] < states[-1][1]:
                states.append(state)
        if len(states) > _MAX_STATES:
            states = sorted(sorted(states, key=lambda state: state[2])[:_MAX_STATES], key=lambda state: state[:2])
    if not states:
        return None
    link: Any = states[-1][3]
    picks = [0] * len(groups)
    for group in reversed(order):
        # A linked list: what came before, and the pick.
        link, picks[group] = link
    return picks


def allocate_reference(groups: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Every combination, one after the other; for tests."""
    fitting = [
        (_loss(groups, picks), sum(o[i].cost for o, i in zip(groups, picks, strict=True)), picks)
        for picks in product(*(range(len(options)) for options in groups))
        if sum(o[i].cost for o, i in zip(groups, picks, strict=True)) <= budget
    ]
    if not fitting:
        raise RecipeError(f"a budget of {budget:,} is too small")
    loss, cost, picks = min(fitting)
    return Allocation(picks, cost, loss, 0.0, loss)
