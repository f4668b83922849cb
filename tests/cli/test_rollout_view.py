"""`tafkir rollouts`: which rows it shows and in which colours, that Arabic stays whole, what it says of mistakes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tafkir.cli.main import main
from tafkir.cli.ratios import colour_text, legend, log_ratios, style_of, whole_pieces
from tafkir.data.tokenizer import Tokenizer
from tafkir.runlog.rollouts import RolloutLog
from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli

ARABIC = "عنده ثلاث تفاحات"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["5 + 3 = 8 apples in a box", "So many apples"] * 3, 300)


def row(tokenizer: Tokenizer, step: int, place: int, text: str, reward: float, shift: float | None) -> str:
    ids = tokenizer.encode(text)
    logprobs = [-1.0] * len(ids)
    train = None if shift is None else [-1.0 + shift * (i == 1) for i in range(len(ids))]
    facts: dict[str, Any] = {
        "step": step,
        "group": place // 2,
        "id": f"sum-{place // 2}",
        "source": "sums",
        "question": "كم تفاحة؟",
        "prompt_ids": [5, 6],
        "completion": place % 2,
        "outcome": "correct" if reward else "wrong",
        "reward": reward,
        "extracted": "8",
        "expected": "8",
        "reason": "" if reward else "not equal",
        "text": text,
        "finish_reason": "stop",
        "versions": [[step - 1, len(ids)]],
        "token_ids": ids,
        "advantage": reward - 0.5,
        "logprobs": logprobs,
        "train_logprobs": train,
        "masked": [1] if shift is not None and abs(shift) > 1 else [],
    }
    return json.dumps(facts, ensure_ascii=False)


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    directory = RunDir.create(tmp_path / "runs" / "demo")
    stage = directory.stage("rlvr")
    tokenizer.save(stage.checkpoint_dir)
    log = RolloutLog(stage.rollouts_dir)
    for step in (39, 40):
        shifts: list[float | None] = [0.0, 0.3, -2.0, None]
        rewards = [1.0, 0.0, 0.0, 1.0]
        texts = ["5 + 3 = 8", "5 + 3 = 9", ARABIC, "8"]
        log.write(step, [row(tokenizer, step, i, texts[i], rewards[i], shifts[i]) for i in range(4)])
    return directory.path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    logger = logging.getLogger("tafkir")
    before = list(logger.handlers), logger.propagate

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["tafkir", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(args, int(ended.value.code or 0), captured.out, captured.err)

    monkeypatch.chdir(tmp_path)
    yield call
    logger.handlers[:], logger.propagate = before


def shown_ids(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [f"{row['id']}#{row['completion']}" for row in json.loads(done.stdout)]


def test_which_rows_are_chosen(here: Cli, run: Path) -> None:
    path = str(run)
    # Of equal rewards the one with the larger mismatch is worse.
    assert shown_ids(here("rollouts", path, "--worst", "2", "--json")) == ["sum-1#0", "sum-0#1"]
    assert shown_ids(here("rollouts", path, "--best", "1", "--step", "40", "--json")) == ["sum-0#0"]
    assert shown_ids(here("rollouts", path, "--by", "mismatch", "--worst", "1", "--json")) == ["sum-1#0"]
    assert shown_ids(here("rollouts", path, "--by", "length", "--worst", "1", "--json")) == ["sum-1#0"]
    assert sorted(shown_ids(here("rollouts", path, "--problem", "sum-1", "--json"))) == ["sum-1#0", "sum-1#1"]
    assert len(shown_ids(here("rollouts", path, "--json"))) == 4
    rows = {f"{row['id']}#{row['completion']}": row for row in json.loads(here("rollouts", path, "--json").stdout)}
    assert {row["step"] for row in rows.values()} == {40}  # the newest
    assert rows["sum-1#0"]["abs_logprob_diff_max"] == 2.0 and rows["sum-1#1"]["abs_logprob_diff_mean"] is None


def test_the_page_names_everything_and_leaves_arabic_whole(here: Cli, run: Path) -> None:
    done = here("rollouts", str(run), "--step", "40", "--worst", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo · rlvr · step 40 · 4 of 4 completions\nk = p_train / p_sampling:")
    for part in (ARABIC, "كم تفاحة؟", "5 + 3 = 9", "why: not equal", "weights of step 39", "not learned from"):
        assert part in done.stdout, part
    assert "k = 0.135, dropped" in done.stdout and "1 dropped" in done.stdout and "k = 1.35" in done.stdout


def test_colours_are_blue_below_and_red_above_and_stronger_further_away() -> None:
    assert [style_of(x, False) for x in (None, 0.0, 0.01, -0.01)] == [""] * 4
    below = [style_of(-x, False) for x in (0.05, 0.2, 3.0)]
    above = [style_of(x, False) for x in (0.05, 0.2, 3.0)]
    assert len({*below, *above}) == 6
    assert style_of(3.0, True) == f"{above[2]} underline" and style_of(None, True) == "underline"
    spans = {legend().plain[span.start : span.end]: str(span.style) for span in legend().spans}
    assert spans["k < 0.61"] == below[2] and spans["k > 1.65"] == above[2] and spans["dropped"] == "underline"


def test_a_word_of_joined_letters_has_one_colour_and_cut_characters_none_of_their_own(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"8 {ARABIC} box")
    ratios = [0.0] * len(ids)
    ratios[4] = -0.9  # one byte in the middle of the first Arabic word
    pieces = whole_pieces(ids, ratios, [4], tokenizer.token_bytes)
    assert "".join(piece.text for piece in pieces) == f"8 {ARABIC} box"
    words = [piece for piece in pieces if piece.text.strip()]
    assert [piece.text for piece in words if not piece.text.isascii()] == ARABIC.split()
    coloured = [piece for piece in pieces if piece.log_ratio]
    assert [(piece.text, piece.log_ratio, piece.masked) for piece in coloured] == [(ARABIC.split()[0], -0.9, True)]
    half = whole_pieces(tokenizer.encode("ع")[:1], [0.5], [], tokenizer.token_bytes)
    assert [(piece.text, piece.log_ratio) for piece in half] == [("\ufffd", 0.5)]
    assert colour_text(whole_pieces(tokenizer.encode("a\x1b[2Jb"), [None] * 9, [], tokenizer.token_bytes)).plain == (
        "a\ufffd[2Jb"
    )


def test_ratios_are_unknown_where_a_side_is() -> None:
    assert log_ratios(None, [-1.0, -2.0]) == [None, None]
    assert log_ratios([-1.0, None, -3.0], [-1.5, -1.0, None]) == [0.5, None, None]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--step", "45"], "no rollouts of step 45 are kept; expected a step from 39 to 40.*--step 40"),
        (["--problem", "sum1"], "no problem 'sum1'; expected one of its 2 problems. Fix: did you mean sum-1"),
        (["--worst", "1", "--best", "1"], "--worst and --best exclude each other"),
        (["--stage", "sft"], "stage 'sft' samples nothing; expected rlhf or rlvr"),
        (["--stage", "rlhf"], "no rollouts of stage rlhf are kept.*keep_rollouts"),
    ],
)
def test_mistakes_are_answered_with_what_there_is(here: Cli, run: Path, args: list[str], message: str) -> None:
    done = here("rollouts", str(run), *args)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line


def test_a_run_without_any_says_which_key_keeps_them(here: Cli, tmp_path: Path) -> None:
    RunDir.create(tmp_path / "empty")
    done = here("rollouts", str(tmp_path / "empty"))
    assert done.returncode == 1 and "keep_rollouts" in done.stderr
