from __future__ import annotations

import re

from tafkir.data.augment import augment
from tafkir.data.contamination import find_overlaps, remove_overlaps
from tafkir.data.corpus import Corpus
from tafkir.data.sources import Problem
from tafkir.recipe.schema import AugmentConfig

LONG = "A farmer drives 12 miles to the market each day and sells five crates of ripe plums for $3 a crate"


def _problem(id: str, question: str) -> Problem:
    return Problem(id, "own", "train", question, "1")


def _windows(text: str) -> set[str]:
    """An independent reading of the rule: 13-word windows over text whose digits are masked."""
    words = re.sub(r"\d[\d,.]*", "#", text.lower()).split()
    return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}


def test_shared_wording_is_found_whatever_the_numbers() -> None:
    heldout = [_problem("h", LONG + ". How much does he earn?")]
    train = [
        _problem("same", "In spring " + LONG.replace("12", "40").replace("five", "9")),
        _problem("other", LONG.replace("plums", "figs").replace("market", "town")),
        _problem("short", "How many?"),
    ]
    overlaps = find_overlaps(train, heldout)
    assert [(o.train_id, o.heldout_id) for o in overlaps] == [("same", "h")]
    assert overlaps[0].text == "a farmer drives 0 miles to the market each day and sells 0"


def test_short_texts_overlap_only_as_a_whole() -> None:
    heldout = [_problem("h", "Tom has 3 pens. How many?")]
    assert find_overlaps([_problem("t", "Tom has 19 pens. How many?")], heldout)
    assert not find_overlaps([_problem("t", "Tom has 19 pens. How many now?")], heldout)


def test_the_report_lists_what_was_removed_and_proves_the_rest() -> None:
    kept, report = remove_overlaps([_problem("a", LONG), _problem("b", "no")], [_problem("h", LONG)])
    assert [problem.id for problem in kept] == ["b"]
    assert (report.num_train, report.num_heldout, report.remaining, report.clean) == (1, 1, 0, True)
    assert [overlap.train_id for overlap in report.removed] == ["a"]


def test_the_bundled_training_part_shares_nothing_with_what_is_held_out(corpus: Corpus) -> None:
    assert corpus.contamination.clean
    assert len(corpus.contamination.removed) == 8
    heldout = {window for problem in (*corpus.validation, *corpus.test) for window in _windows(problem.question)}
    assert heldout
    assert not any(_windows(problem.question) & heldout for problem in corpus.train)


def test_variants_of_training_problems_do_not_drift_into_what_is_held_out(corpus: Corpus) -> None:
    config = AugmentConfig(renumber=1.0, rename=1.0)
    variants = [augment(problem, seed, config) for seed, problem in enumerate(corpus.train[::12])]
    assert not find_overlaps(variants, (*corpus.validation, *corpus.test))
