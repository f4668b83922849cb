"""Ratings by pairs of texts, and a judge beside people: both orders, the cache, judgements that break their form."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.errors import DataError
from tafkir.eval.pairs import judge_labels
from tafkir.tasks.backends import Backends, choose_backends, default_judge
from tests.eval.chat_server import Body, ChatServer, completion
from tests.eval.test_compare import sample, write

STRENGTH = {"good": 3, "fair": 2, "poor": 1}


def marks(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
    """Judges by the numbers in the two texts; it breaks its form at one prompt the first time that it sees it."""
    text = body["messages"][-1]["content"]
    first, second = map(int, re.findall(r"strength (\d)", text))
    if "prompt 2" in text and (first, second) == (3, 1) and text not in broken:
        broken.add(text)
        return 200, {}, completion("I like the first.")
    signs = [("A0493" if first > second else "A0488") + "++"] * 8 + ["A0493+", "A0488+"]
    return 200, {}, completion(json.dumps({f"c{n}": sign for n, sign in enumerate(signs)}))


broken: set[str] = set()


def run(*arguments: Any) -> Any:
    done = CliRunner().invoke(app, ["compare", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_models_are_rated_by_pairs_in_both_orders(tmp_path: Path) -> None:
    broken.clear()
    rows = [
        replace(sample(name, n, right=True, task="creative-writing-v3", question=f"prompt {n}", outcome="graded"),
                item=f"cw/{n}/{n % 3}", text=f"strength {strength}")
        for name, strength in STRENGTH.items() for n in range(6)
    ]  # fmt: skip
    results = write(tmp_path / "results" / "samples.jsonl", rows).parent
    checkout = tmp_path / "checkout" / "data"
    checkout.mkdir(parents=True)
    for name in ("creative_writing_judging_prompt.txt", "creative_writing_criteria.txt", "negative_criteria.txt"):
        (checkout / name).write_text("x")
    (checkout / "creative_writing_prompts_v3.json").write_text("{}")
    (checkout / "pairwise_prompt.txt").write_text("{writing_prompt}: {model_a_analysis} | {model_b_analysis}")
    with ChatServer(marks) as server:
        asking = (results, "--pairs", "--data", checkout.parent, "--judge", server.url)
        found = run(*asking, "--anchor", "fair")
        assert (found["games"], found["unjudged"], len(server.bodies)) == (17, 1, 36)
        again = run(*asking)
        assert (again["games"], again["unjudged"], len(server.bodies)) == (18, 0, 37), "only that one is asked again"
    good, fair, poor = found["models"]
    assert [row["name"] for row in (good, fair, poor)] == ["good", "fair", "poor"] and fair["elo"] == 1500
    assert good["glicko"] > fair["glicko"] > poor["glicko"] and good["deviation"] < 350
    # 17 of 18 points in each game: by hand, with half a game to either side, the rating of a pair alone
    share = (6 * 17 / 18 + 0.5) / 7
    assert again["models"][0]["won"] == pytest.approx(17 / 18)
    assert good["elo"] - fair["elo"] == pytest.approx(400 * math.log10(share / (1 - share)), rel=0.35)
    lines = CliRunner().invoke(app, ["compare", *map(str, asking)]).output
    assert "Elo" in lines and "18 games in both orders; 0 judgements" in lines
    alone = CliRunner().invoke(app, ["compare", str(results), "--pairs", "--judge", "http://127.0.0.1:1/v1#j"])
    assert "git clone https://github.com/EQ-bench/creative-writing-bench" in str(alone.exception)


def vote(question: int, winner: str, *, turn: int = 1, model: str = "x", text: str = "A1") -> dict[str, Any]:
    said = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{side} {text}"}] * 2 for side in "ab"]
    return {"question_id": question, "model_a": model, "model_b": "y", "winner": winner, "judge": "expert",
            "conversation_a": said[0], "conversation_b": said[1], "turn": turn}  # fmt: skip


def test_a_judge_stands_beside_people(tmp_path: Path) -> None:
    """By hand: a firm judge likes what begins with "a"; a vain one always the first, which is a tie."""
    votes = [
        vote(81, "model_a"), vote(81, "model_a"), vote(81, "model_b"),
        vote(82, "tie (inconsistent)", turn=2, text="vain"), vote(111, "model_b"), vote(112, "model_a", turn=2),
    ]  # fmt: skip
    path = tmp_path / "human.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in votes))

    def only(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][-1]["content"]
        mine, other = (re.search(rf"\b{side} (?:A1|vain)", text) for side in "ab")
        assert mine and other
        firm = "[[A]]" if mine.start() < other.start() else "[[B]]"
        return 200, {}, completion("[[A]]" if "vain" in text else f"So: {firm}")

    with ChatServer(only) as server:
        found = run(path, "--labels", "--judge", server.url)
        prompts = [json.dumps(body["messages"]) for body in server.bodies]
    # 81: two of three people, 82: the tie, 111: no, 112: yes
    assert found["all"]["judge"] == pytest.approx((2 / 3 + 1 + 0 + 1) / 4) and found["all"]["pairs"] == 4
    assert found["all"]["people"] == pytest.approx(1 / 3) and found["without_ties"]["pairs"] == 3
    assert len(prompts) == 8 and sum("Reference" in prompt for prompt in prompts) == 4, "maths has its reference"
    path.write_text(json.dumps({**votes[0], "winner": "neither"}))
    with choose_backends(Backends(judge="http://127.0.0.1:1/v1#j")), pytest.raises(DataError, match="not 'neither'"):
        judge_labels(path, default_judge())
    missing = CliRunner().invoke(app, ["compare", str(tmp_path / "no.parquet"), "--labels", "--judge", "http://h/v1#m"])
    assert "lmsys/mt_bench_human_judgments" in str(missing.exception)
