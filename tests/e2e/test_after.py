"""What people do with a run besides waiting for it: interrupt it, chat with it, evaluate and compare it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.e2e.conftest import Tafkir


def test_an_interrupted_run_says_how_to_go_on(tafkir: Tafkir, tiny: tuple[str, ...], tmp_path: Path) -> None:
    interrupt = {"event": "os.rename", "path": "02-pretrain/state/", "count": 1, "after_s": 0.01, "signal": 2}
    done = tafkir(*tiny, cwd=tmp_path, kill=interrupt)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "error: interrupted. Fix: the same command goes on where it stopped"
    assert "Traceback" not in done.err and "pretrain: finished" not in done.err


def test_chat_takes_a_run_and_answers_each_line_of_a_pipe(tafkir: Tafkir, reference: Path) -> None:
    ask = ("chat", reference, "--max-tokens", "8")
    done = tafkir(*ask, stdin="What is 3 + 4?\n\nTom has 2 pens.\n")
    assert done.code == 0, done.err
    assert done.out.strip()
    refused = tafkir(*ask, stdin="pens " * 2000)
    assert refused.code == 1 and "the prompt has" in refused.error


def test_chat_with_what_is_not_a_checkpoint_is_one_line(tafkir: Tafkir, tmp_path: Path) -> None:
    for name, message in (("absent", "no such checkpoint"), (tmp_path, "no tokenizer")):
        assert message in tafkir("chat", name).error


def test_eval_scores_one_checkpoint_and_compare_reads_the_runs(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    checkpoint = reference / "stages" / "03-sft" / "checkpoint"
    few = ("--set", "eval.max_problems=4", "--set", "eval.max_tokens=4", "--set", "threads=1")
    done = tafkir("eval", checkpoint, *tiny[-2:], *few, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "(4 problems)" in done.out and "baseline sum_of_numbers" in done.out
    assert (tmp_path / "runs" / "eval-tiny-sft" / "report.html").exists()
    other = shutil.copytree(reference, tmp_path / "other")
    (compared,) = json.loads(tafkir("compare", reference, other, "--json").out)["pairs"]
    assert {row["task"].partition(",")[0] for row in compared["tasks"]} >= {"sft", "rlvr"}
    assert {row["judgement"]["verdict"] for row in compared["tasks"]} <= {"equivalent", "undecided"}
    assert "pooled over 2 runs" in tafkir("compare", "--pool", reference, reference).out
    refused = tafkir("compare", reference)
    assert refused.code == 2 and refused.err.startswith("error: compare: 1 model given")
