"""MT-Bench, HealthBench, Creative Writing, Omni-MATH and a judge on the loopback that keeps or breaks its format."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tafkir.errors import DataError, TafkirError
from tafkir.tasks.backends import Backends, choose_backends
from tafkir.tasks.catalog import load_task
from tafkir.tasks.published.judged import (
    TURN,
    JudgedTask,
    MalformedJudgementError,
    agreement,
    creative_games,
    creative_pair_prompt,
)


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint; `say` gives the judgement of a prompt."""

    say: Callable[[str], str]
    prompts: list[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = "\n".join(message["content"] for message in body["messages"])
        type(self).prompts.append(prompt)
        content = json.dumps({"choices": [{"message": {"content": type(self).say(prompt)}}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[type[Judge]]:
    Judge.prompts = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}/v1#judge"
    with choose_backends(Backends(judge=place, judge_cache=tmp_path / "judgements.jsonl")):
        yield Judge
    server.shutdown()
    server.server_close()


def load(name: str, data: Path | None = None) -> JudgedTask:
    task = load_task(name, data)
    assert isinstance(task, JudgedTask)
    return task


def test_mt_bench_rates_both_turns_and_asks_once(judge: type[Judge]) -> None:
    judge.say = lambda prompt: "Good. Rating: [[9]]" if "Reference" not in prompt else "Rating: [[4]] or rather [[5.5]]"
    task = load("mt-bench")
    examples = task.examples("test")
    assert len(examples) == 80
    writing, maths = examples[0], next(example for example in examples if example.subject == "math")
    second = task.next_prompt(writing, ["a"])
    assert second and [message.role for message in second] == ["user", "assistant", "user"]
    assert second[-1].content == writing.extra["turns"][1] and task.next_prompt(writing, ["a", "b"]) is None
    text = f"<think>\nhm\n</think>\nMy trip {{answer}}{TURN}A second one"
    verdict = task.grade(writing, text)
    assert (verdict.outcome, verdict.reward, verdict.extracted) == ("graded", 0.9, "turns: 9, 9")
    assert "My trip {answer}\n[The End" in judge.prompts[0] and "hm" not in judge.prompts[0]
    assert all(part in judge.prompts[1] for part in ("### User:", writing.extra["turns"][1], "A second one"))
    assert task.grade(maths, f"a{TURN}b").reward == 0.55
    assert maths.extra["references"][0][:40] in judge.prompts[2]
    assert task.grade(writing, text).reward == 0.9 and len(judge.prompts) == 4, "known judgements are not asked for"
    assert task.grade(writing, "one turn").outcome == "no_answer"
    assert task.grade(writing, text, finished=False).outcome == "length"
    assert task.grade(writing, f"a{TURN}<think>no end").outcome == "no_answer"


@pytest.mark.parametrize("words", ["Rating: 9", "[[11]]", "[[0]]", "[[nine]]", ""])
def test_a_judge_that_breaks_its_format_gives_no_zero(words: str, judge: type[Judge], tmp_path: Path) -> None:
    judge.say = lambda prompt: words
    task = load("mt-bench")
    verdict = task.grade(task.examples("test")[0], f"a{TURN}b")
    assert (verdict.outcome, verdict.failure) == ("unjudged", "judge_format")
    assert verdict.reason.startswith("the judge broke its format: no [[rating]]")
    judge.say = lambda prompt: "[[8]]"
    assert task.grade(task.examples("test")[0], f"a{TURN}b").reward == 0.8, "it is asked again"
    rows = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert [row["judgement"] for row in rows] == [words, None, "[[8]]", "[[8]]"]


HEALTH = {
    "prompt_id": "p1",
    "prompt": [{"role": "user", "content": "I have <<rubric_item>> a headache"}],
    "rubrics": [
        {"criterion": "Asks how long", "points": 6, "tags": []},
        {"criterion": "Advises water", "points": 4, "tags": []},
        {"criterion": "Frightens", "points": -8, "tags": []},
    ],
    "example_tags": ["theme:context_seeking"],
}


def test_healthbench_adds_the_points_of_met_criteria(judge: type[Judge], tmp_path: Path) -> None:
    def say(prompt: str) -> str:
        item = re.search(r"# Rubric item\n\[(-?\d+)\] (.*)", prompt)
        assert item is not None and "assistant: How long? Drink." in prompt
        met = item[1] in ("6", "-8")
        return f'```json\n{{"explanation": "x", "criteria_met": {str(met).lower()}}}\n```'

    judge.say = say
    (tmp_path / "healthbench.jsonl.gz").write_bytes(gzip.compress(json.dumps(HEALTH).encode()))
    task = load("healthbench", tmp_path)
    (example,) = task.examples("test")
    assert example.subject == "context_seeking" and task.prompt(example)[0].content.startswith("I have")
    verdict = task.grade(example, "How long? Drink.")
    assert (verdict.outcome, verdict.reward) == ("graded", -0.2)
    assert verdict.extracted == "-2 of 10 points, 2 of 3 criteria met"
    judge.say = lambda prompt: '{"criteria_met": "yes"}'
    assert task.grade(example, "Other words").outcome == "unjudged"


def test_omni_math_is_judged_by_equivalence(judge: type[Judge]) -> None:
    judge.say = lambda prompt: f"It is 4.\n**Judgement: {'TRUE' if 'box 4' in prompt else 'FALSE'}**"
    task = load("omni-math")
    example = task.examples("test")[0]
    assert task.grade(example, "box 4").reward == 1.0 and task.grade(example, "box 5").reward == 0.0
    assert example.answer in judge.prompts[0] and "{problem}" not in judge.prompts[0]
    judge.say = lambda prompt: "It seems right to me."
    assert task.grade(example, "6").outcome == "unjudged"


def test_creative_writing_reads_a_checkout(judge: type[Judge], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"git clone .*creative-writing-bench"):
        load("creative-writing-v3")
    folder = tmp_path / "data"
    folder.mkdir()
    prompt = {
        "writing_prompt": "Write. <SEED> 1000 words.",
        "seed_modifiers": ["Rain.", "Snow."],
        "category": "fiction",
    }
    (folder / "creative_writing_prompts_v3.json").write_text(json.dumps({"1": prompt}))
    (folder / "creative_writing_criteria.txt").write_text("Imagery\nCoherent\nPurple Prose\nMeandering\n")
    (folder / "negative_criteria.txt").write_text("Purple Prose\nMeandering\n")
    with pytest.raises(DataError, match=r"there is no creative_writing_judging_prompt.txt, pairwise_prompt.txt"):
        load("creative-writing-v3", tmp_path)
    (folder / "creative_writing_judging_prompt.txt").write_text(
        "{writing_prompt}|{test_model_response}|{creative_writing_criteria}"
    )
    (folder / "pairwise_prompt.txt").write_text("{writing_prompt}|{model_a_analysis}|{model_b_analysis}")
    judge.say = lambda _: (
        "[Analysis]\nIt is: 3 of 4.\n[Scores]\nImagery: 14\n**Coherent**: [16]\nPurple Prose: 5\nOther: 20"
    )
    task = load("creative-writing-v3", tmp_path)
    examples = task.examples("test")
    assert [example.question[7:12] for example in examples] == ["Rain.", "Snow.", "Rain."]
    verdict = task.grade(examples[0], "It rained {writing_prompt}.")
    assert verdict.reward == pytest.approx((14 + 16 + 15) / 3 / 20)
    assert judge.prompts[0].startswith("Write. <SEED> 1000 words.|It rained {writing_prompt}.|Imagery\n")
    judge.say = lambda _: "Imagery: 14"
    assert task.grade(examples[1], "Snow").outcome == "unjudged"


def test_pairs_of_texts_become_games() -> None:
    marks = (
        {"chain_of_thought_reasoning": "A0493 is better"} | {f"c{n}": "A0493++" for n in range(5)} | {"c9": "A0488++"}
    )
    assert creative_games(f"```json\n{json.dumps(marks)}\n```") == pytest.approx(10 / 12)
    for words in ("A0493", '["A0493+"]', json.dumps({"a": "A0493++"})):
        with pytest.raises(MalformedJudgementError):
            creative_games(words)
    assert creative_pair_prompt("{model_a_analysis}|{model_b_analysis}", "", "x" * 9000, "{model_a_analysis}") == (
        "x" * 4000 + "|{model_a_analysis}"
    )


def test_a_judge_agrees_with_people_as_often_as_they_do() -> None:
    people = {"1": ["A", "A", "B"], "2": ["tie"], "3": ["B", "B"], "9": []}
    own, theirs, items = agreement({"1": "A", "2": "tie", "3": "A", "9": "A", "x": "B"}, people)
    assert (own, theirs, items) == (pytest.approx((2 / 3 + 1 + 0) / 3), pytest.approx(2 / 4), 3)
    with pytest.raises(DataError, match="no item in common"):
        agreement({"1": "A"}, {"2": ["A"]})


def test_a_task_without_a_judge_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAFKIR_JUDGE", raising=False)
    with choose_backends(Backends()), pytest.raises(TafkirError, match=r"needs a judge.*--judge http"):
        load_task("mt-bench")
    with choose_backends(Backends(judge="localhost#m")), pytest.raises(TafkirError, match="'localhost#m'"):
        load_task("mt-bench")
