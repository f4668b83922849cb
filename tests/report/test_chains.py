"""Sample chains: which lines compute, and which answers are shown."""

from __future__ import annotations

import pytest

from tafkir.report.chains import read_chain
from tafkir.report.collect import pick_by_outcome


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("48/2=24", "right"),
        ("48/2=25", "false"),
        ("48*0.5 = 24", "right"),
        ("1/3=0.3333", "false"),
        ("(16-3)-4=9", "right"),
        ("5/0=1", "text"),
        ("She has 3 apples", "text"),
        ("a=b=c", "text"),
        ("=", "text"),
        ("<think>", "mark"),
        ("</think>", "mark"),
        ("\\boxed{72}", "final"),
        ("__import__('os').system('true')=1", "text"),
        ("(" * 5000 + "=1", "text"),
    ],
)
def test_lines_are_recognised(line: str, kind: str) -> None:
    assert [part.kind for part in read_chain(line)] == [kind]


def test_nothing_of_the_text_is_lost() -> None:
    text = "<think>\n\n  2+2=4\n</think>\n\\boxed{4}"
    assert "\n".join(line.text for line in read_chain(text)) == text


def _answers(**counts: int) -> dict[str, dict[str, str]]:
    return {f"{outcome}/{i}": {"outcome": outcome} for outcome, count in counts.items() for i in range(count)}


def _picked(answers: dict[str, dict[str, str]], count: int) -> dict[str, int]:
    shares: dict[str, int] = {}
    for example_id in pick_by_outcome(answers, count):
        outcome = answers[example_id]["outcome"]
        shares[outcome] = shares.get(outcome, 0) + 1
    return shares


def test_outcomes_are_shown_in_their_proportion() -> None:
    assert _picked(_answers(correct=40, wrong=60), 10) == {"correct": 4, "wrong": 6}
    assert _picked(_answers(correct=33, wrong=65, length=2), 10) == {"correct": 3, "wrong": 6, "length": 1}


def test_a_rare_outcome_still_shows_once() -> None:
    assert _picked(_answers(correct=997, wrong=1, no_answer=1, length=1), 10) == {
        "correct": 7,
        "wrong": 1,
        "no_answer": 1,
        "length": 1,
    }


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
def test_the_number_asked_for_is_shown(count: int) -> None:
    answers = _answers(correct=5, wrong=9, length=1, no_answer=2)
    picked = pick_by_outcome(answers, count)
    assert len(picked) == len(set(picked)) == min(count, len(answers))


def test_the_choice_repeats_and_does_not_follow_the_ids() -> None:
    answers = _answers(wrong=200)
    assert pick_by_outcome(answers, 5) == pick_by_outcome(dict(reversed(answers.items())), 5)
    assert pick_by_outcome(answers, 5) != sorted(answers)[:5]
