"""Evaluations of two turns, of judged answers and of programs: what is asked, kept, and said of where programs ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafkir.cli.evaluate import evaluate as evaluate_command
from tafkir.eval.endpoint import EndpointAnswers, EndpointOptions
from tafkir.eval.harness import Budget, EvalSettings, Evaluation, evaluate_models
from tafkir.eval.samples import load_samples
from tafkir.tasks.backends import Backends, choose_backends
from tafkir.tasks.catalog import load_task
from tafkir.tasks.published.base import TURN
from tests.eval.chat_server import Body, ChatServer, completion

PROGRAM = "def remove_Occ(s, ch):\n    i, j = s.find(ch), s.rfind(ch)\n    return s[:i] + s[i + 1:j] + s[j + 1:]"


def talk(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
    """Judges where it is asked to, and else says which turn it is."""
    text = body["messages"][-1]["content"]
    if "impartial judge" in json.dumps(body["messages"]):
        return 200, {}, completion("Fine. [[8]]")
    return 200, {}, completion(f"<think>\n{number}\n</think>\nturn {len(body['messages']) // 2 + 1} of {text[:10]!r}")


def evaluate(server: ChatServer, path: Path, budget: Budget | None = None) -> Evaluation:
    model = EndpointAnswers(server.url, options=EndpointOptions(concurrency=2, timeout_s=5.0, max_retries=0))
    backends = Backends(judge=f"{server.url}#judge", judge_cache=path / "judged.jsonl")
    with choose_backends(backends):
        return evaluate_models(
            [model], [load_task("mt-bench")], EvalSettings(limit=3), path / "samples.jsonl", budget=budget
        )


def test_a_second_turn_follows_the_first_and_a_stopped_conversation_goes_on(tmp_path: Path) -> None:
    with ChatServer(talk) as server:
        stopped = evaluate(server, tmp_path, Budget(max_tokens=30))
        assert stopped.stopped and not any(sample.outcome == "graded" for sample in stopped.samples)
        began = [sample for sample in load_samples(tmp_path) if sample.finish_reason == "turn"]
        assert began and all(sample.failed and TURN not in sample.text for sample in began)
        done = evaluate(server, tmp_path)
    assert [(s.outcome, s.reward, s.finish_reason) for s in done.samples] == [("graded", 0.8, "stop")] * 3
    asked = [body["messages"] for body in server.bodies if "impartial" not in json.dumps(body["messages"])]
    assert sorted(map(len, asked)) == [1, 1, 1, 3, 3, 3], "no turn is asked for twice"
    second = next(messages for messages in asked if len(messages) == 3)
    assert (
        second[1]["role"] == "assistant" and second[1]["content"].startswith("turn 1") and second[2]["role"] == "user"
    )
    sample = done.samples[0]
    assert sample.text.count(TURN) == 1 and sample.tokens == 14 and sample.text.split(TURN)[1].startswith("turn 2")


def test_the_command_says_where_programs_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda number, body: (200, {}, completion(f"```python\n{PROGRAM}\n```"))) as server:
        given: dict[str, Any] = {"tasks": "mbpp", "out": tmp_path, "limit": 1, "sandbox": "rlimit", "unsafe": True}
        evaluate_command([server.url], **given)
        assert "Programs ran in the tier rlimit" in capsys.readouterr().out
    (sample,) = load_samples(tmp_path)
    assert (sample.outcome, sample.sandbox) == ("correct", "rlimit")
    assert json.loads((tmp_path / "summary.json").read_text())["sandbox"] == ["rlimit"]
