"""What a recursive model solves: exact accuracy by supervision step, and after how many steps it halts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tafkir.report.charts import Line, line_chart, percent
from tafkir.report.lab import LabFigure

__all__ = ["TRM_HEAD", "trm_beside", "trm_figures", "trm_rows", "trm_sentence"]

TRM_HEAD: Sequence[str] = ("Answer taken", "Whole grids right", "95 % interval", "Supervision steps", "Puzzles")

Result = Mapping[str, Any]


def _test(result: Result) -> Mapping[str, Any]:
    """The scores on unseen puzzles; empty where there are none."""
    found = result.get("test")
    return found if isinstance(found, Mapping) and isinstance(found.get("halting"), Mapping) else {}


def _arc(result: Result) -> Mapping[str, Any]:
    """The scores of ARC tasks by voting; empty where there are none."""
    found = result.get("arc")
    return found if isinstance(found, Mapping) and "2" in found.get("pass_at", {}) else {}


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def trm_sentence(result: Result) -> str:
    """The finding in one sentence; empty where nothing was measured."""
    test = _test(result)
    if not test:
        return ""
    if arc := _arc(result):
        two, rules = arc["pass_at"]["2"], arc["baselines"]["rules"]["2"]
        return (
            f"The recursive model solves {percent(two['value'])} of {arc['tasks']:,} tasks in two attempts "
            f"(95 % interval {_interval(two)}); simple rules solve {percent(rules['value'])}."
        )
    return (
        f"The recursive model solves {percent(test['exact']['value'])} of {test['puzzles']:,} unseen puzzles, every "
        f"cell right (95 % interval {_interval(test['exact'])})."
    )


def trm_beside(result: Result) -> list[str]:
    """What belongs beside the finding: what halting early costs, and what the recursion is worth."""
    test = _test(result)
    if not test:
        return []
    halting, first, last = test["halting"], test["by_step"][0], test["by_step"][-1]
    voted = []
    if arc := _arc(result):
        voted.append(
            f"Alone, without a vote of {arc['forms']} forms, it solves {percent(test['exact']['value'])} at the first "
            f"attempt; copying the input solves {percent(arc['baselines']['copy']['1']['value'])}."
        )
    return [
        *voted,
        f"Stopped where it takes its answer for right, it needs {halting['mean_steps']:.1f} of {len(test['by_step'])} "
        f"supervision steps and solves {percent(halting['exact']['value'])}.",
        f"After the first step {percent(first)} are solved, after the last one {percent(last)}.",
    ]


def _arc_rows(result: Result) -> list[list[str]]:
    """Attempts at ARC tasks whose forms vote, and what needs no learning."""
    arc = _arc(result)
    if not arc:
        return []
    steps, tasks = str(len(_test(result)["by_step"])), f"{arc['tasks']:,}"
    rows = [
        (f"{count} attempt{'s' * (count != '1')}\n{arc['forms']} forms of each task vote", found, steps)
        for count, found in arc["pass_at"].items()
    ]
    rows.append(("simple rules\n2 attempts", arc["baselines"]["rules"]["2"], "–"))
    rows.append(("the input as it is", arc["baselines"]["copy"]["1"], "–"))
    return [[name, percent(found["value"]), _interval(found), taken, tasks] for name, found, taken in rows]


def _surest_rows(test: Mapping[str, Any], steps: str, puzzles: str) -> list[list[str]]:
    found = test.get("surest")
    if not isinstance(found, Mapping):
        return []
    return [["after all steps, the answer of the highest q", percent(found["value"]), _interval(found), steps, puzzles]]


def trm_rows(result: Result) -> list[list[str]]:
    """Table rows, see `TRM_HEAD`: after all steps, and where the model halts itself."""
    test = _test(result)
    if not test:
        return []
    halting, puzzles = test["halting"], f"{test['puzzles']:,}"
    never, steps = halting["never"], str(len(test["by_step"]))
    taken = f"at the first step with q above {halting['threshold']:g}" + (f"\n{never} never halt" if never else "")
    return [
        *_arc_rows(result),
        [
            f"after all steps\n{percent(test['cells'])} of the cells right",
            percent(test["exact"]["value"]),
            _interval(test["exact"]),
            steps,
            puzzles,
        ],
        # Runs of earlier versions do not say.
        *_surest_rows(test, steps, puzzles),
        [
            taken,
            percent(halting["exact"]["value"]),
            _interval(halting["exact"]),
            f"{halting['mean_steps']:.1f}",
            puzzles,
        ],
    ]


def trm_figures(result: Result) -> list[LabFigure]:
    """Exact accuracy by supervision step, and the steps at which puzzles halt."""
    test = _test(result)
    if not test:
        return []
    halts = test["halting"]["histogram"]
    lines = (
        (
            "exact-by-step",
            "Solved by supervision step",
            "share of the unseen puzzles whose cells are all right",
            "a line that rises: each further step corrects answers. A flat one means that the recursion adds nothing.",
            [(float(i), float(share)) for i, share in enumerate(test["by_step"], start=1)],
        ),
        (
            "halting-depth",
            "Where puzzles halt",
            "share of the unseen puzzles that are taken for solved at each step; at the last one, what is left",
            "most of them at the first steps, and few at the last one.",
            [(float(i), count / test["puzzles"]) for i, count in enumerate(halts, start=1)],
        ),
    )
    figures = []
    for name, title, unit, look, points in lines:
        line = Line("unseen puzzles", points, "c-trm", dots=True)
        chart = line_chart(
            [line], title=f"{title}, by step", x_label="step", y_format=lambda v: percent(v, 0), y_min=0.0, y_max=1.0
        )
        figures.append(LabFigure(name, title, unit, look, [line], chart))
    return figures
