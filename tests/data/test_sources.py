from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from tafkir.data.arithmetic import evaluate, parse_expression, parse_number
from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.sources import Problem, read_source
from tafkir.errors import DataError
from tafkir.recipe.schema import DataConfig

GOOD = {"question": "Tom has 3 bags of 4 pears. He eats 2. How many are left?", "answer": "3*4=<<3*4=12>>12 #### 10"}


def _write(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def test_bundled_sets_have_the_known_counts(corpus: Corpus) -> None:
    assert corpus.counts() == {
        "gsm8k": {"train": 6465, "validation": 290, "test": 660},
        "svamp": {"train": 600, "validation": 100, "test": 300},
    }
    assert sum(corpus.dropped["gsm8k"].values()) + len(corpus.contamination.removed) + 6465 + 290 == 7473


def test_every_step_recomputes_and_the_last_one_is_the_answer(corpus: Corpus) -> None:
    for problem in corpus.train:
        assert problem.steps and not problem.flaw
        for step in problem.steps:
            assert evaluate(parse_expression(step.expression)) == Fraction(step.result), problem.id
        assert problem.steps[-1].result == problem.answer
        assert " " not in "".join(map(str, problem.steps))


def test_answers_are_canonical(corpus: Corpus) -> None:
    for problem in (*corpus.train, *corpus.validation, *corpus.test):
        value = parse_number(problem.answer)
        assert (
            value is not None
            and "," not in problem.answer
            and str(value) in (problem.answer, str(Fraction(problem.answer)))
        )


def test_a_known_gsm8k_row_and_a_known_svamp_row(corpus: Corpus) -> None:
    by_id = {problem.id: problem for problem in (*corpus.train, *corpus.validation, *corpus.test)}
    clips = by_id["gsm8k-train-0"]
    assert [str(step) for step in clips.steps] == ["48/2=24", "48+24=72"] and clips.answer == "72"
    dvds = by_id["svamp-chal-1"]
    assert dvds.question.startswith(
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack, "
    )
    assert [str(step) for step in dvds.steps] == ["76-25=51"]


def test_annotations_can_stay_in_one_piece(tmp_path: Path) -> None:
    path = _write(tmp_path / "own.jsonl", {"question": "q", "answer": "<<15*02=30>> <<100-50-30-15=5>> #### 5"})
    for split_operations, steps in (
        (True, ["15*2=30", "100-50=50", "50-30=20", "20-15=5"]),
        (False, ["15*2=30", "100-50-30-15=5"]),
    ):
        problems, _ = read_source(path, split_operations=split_operations)
        assert [str(step) for step in problems[0].steps] == steps


@pytest.mark.parametrize(
    ("equation", "flaw"),
    [
        ("7+5=12", ""),
        ("12/5=2", "equation does not recompute"),
        ("12/0=0", "malformed equation"),
        ("5-7=2", "equation does not recompute"),
        ("10/3=3.33", "equation does not recompute"),
        ("10/3=10/3", "result has no exact decimal"),
        ("0.5*8=4", ""),
        ("7+=12", "malformed equation"),
        ("12=12", "no operation"),
        ("6*2=12", ""),
    ],
)
def test_what_makes_an_equation_unfit_to_learn_from(tmp_path: Path, equation: str, flaw: str) -> None:
    answer = equation.partition("=")[2]
    path = _write(tmp_path / "own.jsonl", {"question": "q", "answer": f"<<{equation}>> #### {answer}"})
    (problem,), _ = read_source(path)
    assert problem.flaw == flaw and bool(problem.steps) == (not flaw)


def test_own_files_in_every_accepted_form(tmp_path: Path) -> None:
    rows = [
        {"question": "q one", "answer": "8*3=<<8*3=24>>24\n#### 24", "split": "train", "id": "first"},
        {"question": "q two", "answer": 7, "split": "train"},
        {"question": "q three", "answer": "$1,234", "equation": "1200 + 34", "split": "train"},
        {"question": "q four", "answer": 10.0, "equation": "( 3 * 4 ) - 2", "split": "validation"},
        {"question": "q five", "answer": "1/2", "equation": "8*3; 24+1", "split": "test"},
        {"question": "q six", "answer": "4", "equation": "2+3", "split": "train"},
    ]
    plain = _write(tmp_path / "own.jsonl", *rows)
    packed = tmp_path / "own.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    problems, report = read_source(plain)
    assert read_source(packed)[0] == problems
    assert [p.answer for p in problems] == ["24", "7", "1234", "10", "0.5", "4"]
    assert [p.id for p in problems] == ["first", "own-2", "own-3", "own-4", "own-5", "own-6"]
    assert [len(p.steps) for p in problems] == [1, 0, 1, 2, 0, 0]
    assert [p.split for p in problems] == ["train", "train", "train", "validation", "test", "train"]
    assert problems[1].flaw == "" and report.flaws == {"last result is not the answer": 2}


def test_flawed_rows_are_dropped_from_training_and_kept_in_test(tmp_path: Path) -> None:
    bad = {"answer": "<<2+2=5>>5 #### 5"}
    rows = [
        {"question": "a b c d", "split": "train", **bad},
        {"question": "e f g h", "split": "test", **bad},
        {"question": "i j k l", "split": "train", "answer": "<<2+2=4>>4 #### 4"},
        {"question": "m n o p", "split": "train", "answer": "<<1+1=2>><<2+1=3>><<3+1=4>><<4+1=5>> #### 5"},
    ]
    path = _write(tmp_path / "own.jsonl", *rows)
    corpus = load_corpus(DataConfig(sources=(str(path),), max_steps=3))
    assert [p.id for p in corpus.train] == ["own-3"]
    assert [(p.id, p.steps) for p in corpus.test] == [("own-2", ())]
    assert corpus.dropped == {"own": {"equation does not recompute": 1, "too many steps": 1}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"question": "x", "answer": ', "valid JSON"),
        ("[1, 2]", "a JSON object"),
        ({"answer": "3"}, "'question'"),
        ({"question": "  ", "answer": "3"}, "'question'"),
        ({"question": 5, "answer": "3"}, "'question'"),
        ({"question": "x"}, "'answer'"),
        ({"question": "x", "answer": True}, "'answer'"),
        ({"question": "x", "answer": "many"}, "a number as the answer"),
        ({"question": "x", "answer": "so #### some"}, "after ####"),
        ('{"question": "x", "answer": NaN}', "a number as the answer"),
        ({"question": "x", "answer": "3", "split": "dev"}, "'split'"),
        ({"question": "x", "answer": "3", "equation": 4}, "'equation'"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line_and_nothing_is_used(tmp_path: Path, row: object, said: str) -> None:
    path = _write(tmp_path / "own.jsonl", GOOD, row, GOOD)
    with pytest.raises(DataError) as caught:
        read_source(path)
    assert f"{path}:2: malformed row" in str(caught.value)
    assert said in str(caught.value) and "on_bad_row" in str(caught.value)
    problems, report = read_source(path, on_bad_row="skip")
    assert len(problems) == 2 and report.rows == 2
    assert len(report.bad_rows) == 1 and report.bad_rows[0].startswith(f"{path}:2: ")


def test_a_missing_file_an_empty_one_and_one_without_a_valid_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*gsm8k, svamp"):
        read_source(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no valid rows"):
        read_source(_write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"no valid rows \(2 malformed\)"):
        read_source(_write(tmp_path / "bad.jsonl", "{", "{"), on_bad_row="skip")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(GOOD).encode() * 50)
    truncated = tmp_path / "cut.jsonl.gz"
    truncated.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: the gzip file is truncated"):
        read_source(truncated)
    no_gzip = tmp_path / "plain.jsonl.gz"
    no_gzip.write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_source(no_gzip)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: the file is not UTF-8"):
        read_source(latin)
    with pytest.raises(DataError, match="cannot be read"):
        read_source(tmp_path)


def test_a_corpus_without_training_problems_or_with_repeated_ids_is_refused(tmp_path: Path) -> None:
    held = _write(tmp_path / "held.jsonl", {**GOOD, "split": "test"})
    with pytest.raises(DataError, match="no problem is left to train on"):
        load_corpus(DataConfig(sources=(str(held),)))
    twice = _write(tmp_path / "twice.jsonl", {**GOOD, "id": "a"}, {**GOOD, "id": "a"})
    with pytest.raises(DataError, match="a: 1 problem ids repeat"):
        load_corpus(DataConfig(sources=(str(twice),)))


def test_an_example_says_the_same_as_its_problem() -> None:
    problem = Problem("i", "s", "test", "q", "4")
    example = problem.as_example()
    assert (example.id, example.source, example.split, example.question, example.answer) == ("i", "s", "test", "q", "4")
