"""`tafkir eval --tasks`: nothing is asked twice, failures are no zeros, and every answer has a seed of its own."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tafkir.cli.evaluate import evaluate as evaluate_command
from tafkir.cli.regrade import regrade as regrade_command
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RecipeError, RolloutError, TafkirError
from tafkir.eval.answers import split_thinking
from tafkir.eval.checkpoint_answers import CheckpointAnswers
from tafkir.eval.endpoint import EndpointAnswers, EndpointOptions
from tafkir.eval.harness import Budget, EvalSettings, Evaluation, evaluate_models
from tafkir.eval.journal import JOURNAL_NAME
from tafkir.eval.regrade import regrade_samples
from tafkir.eval.samples import Sample, load_samples
from tafkir.eval.table import budget_curve, render_scores, score_samples
from tafkir.records import Example, Message, Split, Verdict
from tafkir.report.budgets import render_budget_curve
from tafkir.runlog.rundir import RunDir
from tafkir.tasks.catalog import TaskCard, TaskSampling, load_task
from tafkir.tasks.math import WordProblems
from tafkir.tasks.published.perplexity import TextTask
from tests.eval.chat_server import Body, ChatServer, completion, guess
from tests.eval.conftest import build_completer

QUICK = EndpointOptions(concurrency=4, timeout_s=5.0, max_retries=2, backoff_s=0.01)


class Sums:
    """A task of sums below eight; `broken` items make its scorer raise."""

    def __init__(self, count: int = 6, *, version: str = "1", broken: Sequence[str] = (), offset: int = 0) -> None:
        self.card = TaskCard(
            "sums", version, "Sums", "accuracy", "en", count, "MIT", "made up", True, "", TaskSampling(0.7, 0.9, 64, 3)
        )
        self.name, self.broken = "sums", broken
        self._examples = [
            Example(f"s{i}", "sums", "test", f"{i} + 1?", str((i + 1) % 8 + offset), difficulty=str(i % 2))
            for i in range(count)
        ]

    def examples(self, split: Split) -> Sequence[Example]:
        return self._examples if split == "test" else ()

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        if example.id in self.broken:
            raise ValueError("no such rule")
        return WordProblems().grade(example, text, finished=finished)


def run(server: ChatServer, path: Path, task: Any = None, budget: Budget | None = None, **settings: Any) -> Evaluation:
    model = EndpointAnswers(server.url, options=QUICK)
    return evaluate_models([model], [task or Sums()], EvalSettings(**settings), path / "samples.jsonl", budget=budget)


def content(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """All but what the clock says, in an order of its own."""
    rows = [{name: value for name, value in asdict(sample).items() if name != "latency_s"} for sample in samples]
    return sorted(rows, key=lambda row: str(row["key"]))


def test_every_answer_has_a_seed_of_its_own_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    with ChatServer() as server:
        first = run(server, tmp_path)
        assert len(first.samples) == first.wanted == first.asked == 18
        assert len({body["seed"] for body in server.bodies}) == 18
        assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies} == {(0.7, 0.9, 64)}
        assert [(sample.item, sample.repeat) for sample in first.samples[:7]] == [
            *((f"s{i}", 0) for i in range(6)), ("s0", 1)
        ]  # fmt: skip
        one = first.samples[1]
        assert one.text.startswith("\\boxed") and one.reasoning.isdigit() and one.difficulty == "1"
        again = run(server, tmp_path)
        assert again.asked == 0 and content(again.samples) == content(first.samples)
        # Fewer items draw the same: the seed belongs to item and repeat. Another seed, sampling or item draws anew.
        assert run(server, tmp_path, limit=2).asked == 0
        assert len(server.bodies) == 18
        assert run(server, tmp_path, limit=1, seed=1).asked == 3
        assert run(server, tmp_path, limit=1, max_tokens=32).asked == 3
        assert run(server, tmp_path, limit=1, temperature=0.0).asked == 1
    with pytest.raises(RecipeError, match="4 times the same answer"), ChatServer() as server:
        run(server, tmp_path, temperature=0.0, samples=4)


def test_what_was_answered_is_never_asked_again_after_a_kill(tmp_path: Path) -> None:
    generator = random.Random(4)
    command = [
        sys.executable, "-m", "tafkir.cli.main", "eval", "--tasks", "gsm8k", "--limit", "40", "--samples", "3",
        "--temperature", "0.7", "--concurrency", "4",
    ]  # fmt: skip
    kills = 2
    with ChatServer(delay_s=0.05) as server:
        killed = [*command, "--out", str(tmp_path / "killed"), server.url]
        for _ in range(kills):
            wanted = len(server.bodies) + generator.randint(5, 30)
            process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.bodies) < wanted and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.wait()
            recorded, before = {sample.seed for sample in load_samples(tmp_path / "killed")}, len(server.bodies)
        subprocess.run(killed, capture_output=True, check=True)
        assert recorded and not recorded & {body["seed"] for body in server.bodies[before:]}
        asked = Counter(body["seed"] for body in server.bodies)
        # Only what was on its way when a kill came is asked once more: by its own key, and counted.
        assert len(asked) == 120 and sum(asked.values()) - 120 <= kills * 4
        assert len({row["idempotency-key"] for row in server.headers}) == 120
        summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
        assert summary["resent"] <= 4 and not (tmp_path / "killed" / JOURNAL_NAME).exists()
        settings, path = EvalSettings(samples=3, limit=40, temperature=0.7), tmp_path / "whole" / "samples.jsonl"
        evaluate_models([EndpointAnswers(server.url, options=QUICK)], [load_task("gsm8k")], settings, path)
    assert content(load_samples(tmp_path / "killed")) == content(load_samples(tmp_path / "whole"))
    assert len((tmp_path / "killed" / "samples.jsonl").read_text().splitlines()) == 120


def test_an_answer_that_came_before_a_kill_is_not_asked_for_again(tmp_path: Path) -> None:
    """The scorer never ends while answers come; what they were is on disk all the same."""
    slow, killed = Sums(), threading.Event()
    slow.grade = lambda *_, **__: killed.wait() and Verdict("error", 0.0, None, "")  # type: ignore[method-assign]
    with ChatServer() as server:
        model = EndpointAnswers(server.url, options=QUICK)
        command = threading.Thread(
            target=lambda: evaluate_models([model], [slow], EvalSettings(), tmp_path / "samples.jsonl"), daemon=True
        )
        command.start()
        while len(server.bodies) < 18 or (tmp_path / JOURNAL_NAME).read_text().count("reply") < 18:
            time.sleep(0.01)
        asked = (tmp_path / JOURNAL_NAME).read_text()
        other = tmp_path / "other"
        other.mkdir()
        (other / JOURNAL_NAME).write_text(asked + '{"id": "half')
        done = run(server, other)
        assert len(server.bodies) == 18 and len(done.samples) == 18 and done.resent == 0
        (other / JOURNAL_NAME).write_text("".join(line + "\n" for line in asked.splitlines() if "reply" not in line))
        (other / "samples.jsonl").unlink()
        assert run(server, other).resent == 18 and done.samples[0].prompt_tokens == 5
        killed.set()
        command.join()


def troubles(number: int, body: Body) -> tuple[int, dict[str, str], bytes] | None:
    """Every item has its own trouble, by the number that its question starts with."""
    item = body["messages"][0]["content"][0]
    attempt = seen[item] = seen.get(item, 0) + 1
    if item == "0" and attempt == 1:
        return 429, {"Retry-After": "0.4"}, b'{"error": "slow down"}'
    if item == "1":
        return 200, {"content-type": "text/html"}, b"<html>Bad gateway</html>"
    if item == "2":
        return 200, {}, completion("", tokens=0)
    if item == "3":
        return 400, {}, b'{"error": {"message": "too long"}}'
    if item == "4":
        return 200, {}, completion(None, finish="length", tokens=64, reasoning_content="1 + 1 is")
    if item == "5":
        time.sleep(0.6)
    if item == "6":
        return None if attempt == 1 else (200, {}, completion("7", reasoning_content="<think> 6 and 1"))
    return 200, {}, completion("\\boxed{1}")


seen: dict[str, int] = {}


def test_the_troubles_of_an_endpoint_are_counted_and_shown_and_are_no_zeros(tmp_path: Path) -> None:
    seen.clear()
    path, options = tmp_path / "samples.jsonl", replace(QUICK, timeout_s=0.3, concurrency=7)
    with ChatServer(troubles) as server:
        model = EndpointAnswers(server.url, options=options)
        settings = EvalSettings(samples=1)
        began = time.monotonic()
        done = evaluate_models([model], [Sums(7)], settings, path)
        assert time.monotonic() - began > 0.4
        by_item = {sample.item: sample for sample in done.samples}
        assert {item: sample.outcome for item, sample in by_item.items()} == {
            "s0": "correct", "s1": "error", "s2": "error", "s3": "error", "s4": "length", "s5": "timeout",
            "s6": "correct",
        }  # fmt: skip
        for item, words in (("s1", "not JSON"), ("s2", "empty answer"), ("s3", "too long"), ("s5", "within 0.3 s")):
            assert words in by_item[item].reason
        assert by_item["s4"].reasoning == "1 + 1 is" and by_item["s6"].text == "7"
        assert seen == {"0": 2, "1": 3, "2": 3, "3": 1, "4": 1, "5": 2, "6": 2}
        (row,) = score_samples(done.samples)
        assert row["accuracy"]["value"] == pytest.approx(2 / 3) and row["failed"] == pytest.approx(4 / 7)
        assert "57.1%" in render_scores([row]) and "too long" in render_scores([row])
        # The next call asks for the failures alone.
        server.react = guess
        again = evaluate_models([EndpointAnswers(server.url, options=QUICK)], [Sums(7)], settings, path)
        assert again.asked == 4 and not any(sample.failed for sample in again.samples)
        server.react = lambda number, body: (401, {}, b'{"error": "no key"}')
        with pytest.raises(RolloutError, match="401"):
            run(server, tmp_path, seed=9)
    with pytest.raises(RolloutError, match="connection failed"):
        run(server, tmp_path)


def test_an_endpoint_that_dies_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with ChatServer() as server:
        model = EndpointAnswers(server.url, options=QUICK)

        def die(number: int, body: Body) -> Any:
            if number == 6:
                server.die()
            return guess(number, body) if number < 6 else None

        server.react = die
        with pytest.raises(RolloutError, match="is gone"):
            evaluate_models([model], [Sums()], EvalSettings(), tmp_path / "samples.jsonl")
    kept = load_samples(tmp_path)
    assert 0 < len(kept) < 18
    with ChatServer() as other:  # another port is the same model
        assert run(other, tmp_path).asked == 18 - len(kept)


def test_what_a_scorer_got_wrong_is_graded_again_without_asking(tmp_path: Path) -> None:
    with ChatServer() as server:
        first = run(server, tmp_path, Sums(broken=["s1"]))
        failed = [sample for sample in first.samples if sample.failed]
        assert {sample.reason for sample in failed} == {"the scorer raised ValueError: no such rule"} and len(
            failed
        ) == 3
        mended = run(server, tmp_path, Sums())
        assert mended.asked == 0 and not any(sample.failed for sample in mended.samples)
        newer = run(server, tmp_path, Sums(version="2", offset=8))
        assert newer.asked == 0 and {sample.task_version for sample in newer.samples} == {"2"}
        assert all(sample.outcome == "wrong" for sample in newer.samples)
        assert len(load_samples(tmp_path)) == 18
    would = regrade_samples(tmp_path, {"sums": Sums(version="3")}, write=False)
    done = regrade_samples(tmp_path, {"sums": Sums(version="3")})
    right = sum(sample.correct for sample in mended.samples)
    assert len(would.changed) == len(done.changed) == right > 0 and done.to_dict()["moves"] == {
        "wrong -> correct": right
    }
    assert content(load_samples(tmp_path)) == content([
        replace(sample, key=f"{sample.identity}-v3", task_version="3") for sample in mended.samples
    ])  # fmt: skip


def test_budgets_stop_and_the_next_call_goes_on(tmp_path: Path) -> None:
    with ChatServer() as server:
        for budget, words in (
            (Budget(max_tokens=100), "100 tokens"),
            (Budget(max_cost=1e-4, prices=(1.0, 2.0)), "budget of 0.0001"),
            (Budget(max_seconds=0.0), "0 s"),
        ):
            done = run(server, tmp_path, budget=budget)
            assert words in done.stopped and len(done.samples) < done.wanted == 18
        assert run(server, tmp_path).asked == 18 - len(done.samples)


def test_rounds_end_when_the_interval_is_narrow_enough(tmp_path: Path) -> None:
    with ChatServer() as server:
        wide = run(server, tmp_path / "wide", Sums(40), samples=6, until_settled=0.99)
        assert wide.settled == {("m", "sums"): 1} and wide.asked == wide.wanted == 40
        narrow = run(server, tmp_path / "narrow", Sums(40), samples=8, until_settled=0.15)
        rounds = narrow.settled[("m", "sums")]
        assert 1 < rounds < 8 and narrow.asked == 40 * rounds
        widths = [
            (found := score_samples(narrow.samples[: 40 * n])[0]["accuracy"])["high"] - found["low"]
            for n in range(1, rounds + 1)
        ]
        assert widths[-1] <= 0.15 < min(widths[:-1])


def test_the_curve_cuts_stored_text(tmp_path: Path) -> None:
    text = "\\boxed{1}" + "x" * 91
    with ChatServer(lambda number, body: (200, {}, completion(text, tokens=100))) as server:
        done = run(server, tmp_path, Sums(8), samples=1)
    curve = budget_curve(done.samples, {"sums": Sums(8)}, [8, 9, 100])
    assert [(row["budget"], row["accuracy"]["value"], row["cut"]) for row in curve] == [
        (8, 0.0, 1.0), (9, 1 / 8, 1.0), (100, 1 / 8, 0.0)
    ]  # fmt: skip
    assert "12.5" in render_budget_curve(curve)


def test_two_tries_count_once(tmp_path: Path) -> None:
    def react(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
        first = seen.setdefault(body["messages"][0]["content"], body["seed"]) == body["seed"]
        return 200, {}, completion("\\boxed{1}" if first else "\\boxed{2}")

    seen.clear()
    with ChatServer(react) as server:
        done = run(server, tmp_path, Sums(4), samples=2)
    rows = [score_samples(done.samples, {"sums": metric})[0]["accuracy"] for metric in ("accuracy", "pass@2")]
    assert [row["value"] for row in rows] == [1 / 4, 1 / 2]


def test_the_task_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    mine = tmp_path / "mine.py"
    mine.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    with ChatServer(lambda number, body: (200, {}, completion("هي القاهرة" if number % 2 else "لا أعرف"))) as server:
        done = run(server, tmp_path, load_task(str(mine)))
    assert sorted(sample.outcome for sample in done.samples) == ["correct", "correct", "wrong", "wrong"]


def test_thinking_is_split_off() -> None:
    assert split_thinking("<think>\na\n</think>\nb") == ("a", "b")
    assert split_thinking("a</think> b</think>c") == ("a</think> b", "c")
    assert split_thinking("<think>never ends") == ("never ends", "")
    assert split_thinking("plain") == ("", "plain")


def test_a_checkpoint_answers_and_scores_texts(tokenizer: Tokenizer, trained_run: Path, tmp_path: Path) -> None:
    policy, built = RunDir(trained_run).stage("sft").checkpoint_dir, []

    def build() -> Any:
        built.append(1)
        return build_completer(policy)

    def model(name: str = "tiny") -> CheckpointAnswers:
        return CheckpointAnswers(name, policy, context=60, build_completer=build)

    settings, path = EvalSettings(samples=2, max_tokens=8), tmp_path / "samples.jsonl"
    with ChatServer() as server:
        endpoint = EndpointAnswers(server.url, options=QUICK)
        done = evaluate_models([model(), endpoint], [Sums(4)], settings, path)
    assert Counter(sample.model for sample in done.samples) == {"tiny": 8, "m": 8}
    assert evaluate_models([model()], [Sums(4)], settings, path).asked == 0 and built == [1]
    long = Sums(1)
    long._examples = [replace(long._examples[0], question="1 + 1 " * 40)]
    (sample,) = evaluate_models([model()], [long], replace(settings, samples=1), path).samples
    assert sample.outcome == "error" and "the context 60" in sample.reason
    whole = TextTask(
        load_task("perplexity-shakespeare").card, [("short", "Mia has 12 apples."), ("long", "12-3=9 " * 30)]
    )
    done = evaluate_models([model()], [whole], settings, path)
    (row,) = score_samples(done.samples, {whole.name: "perplexity"})
    ids = [tokenizer.document_end_id, *tokenizer.encode("Mia has 12 apples.")]
    alone = build_completer(policy).score([ids])[0]
    assert float(done.samples[0].extracted or 0) == pytest.approx(float(alone.sum()), abs=1e-4)
    assert row["tokens"] == sum(len(tokenizer.encode(example.question)) for example in whole.examples("test"))
    nats = -sum(float(sample.extracted or 0) for sample in done.samples)
    assert row["perplexity"] == pytest.approx(math.exp(nats / row["tokens"])) and "bit/byte" in render_scores([row])
    with pytest.raises(RecipeError, match="one name"):
        evaluate_models([model(), model()], [Sums(4)], settings, path)
    with pytest.raises(DataError, match="same id"):
        twice = Sums(2)
        twice._examples *= 2
        evaluate_models([model()], [twice], settings, path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESAME", "open")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is not for the loopback
    with ChatServer() as server:
        url = server.url.removesuffix("#m")
        given: dict[str, Any] = {"tasks": "gsm8k", "limit": 3, "out": tmp_path / "out", "as_json": True}
        evaluate_command([f"a={url}"], **given, curve="10,99", api_key_env="SESAME", extra_body='{"top_k": 5}')
        shown = json.loads(capsys.readouterr().out)
        assert shown["scores"][0]["model"] == "a" and len(shown["curve"]) == 2 and shown["asked_now"] == 3
        assert server.bodies[0]["top_k"] == 5 and server.headers[0]["authorization"] == "Bearer open"
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["scores"] == shown["scores"]
        server.react = lambda number, body: (400, {}, b"{}")
        with pytest.raises(TafkirError, match="3 of 3 answers failed"):
            evaluate_command([url], **given, fail_on_error=True)
        with pytest.raises(RecipeError, match="no model 'other'; expected #m"):
            evaluate_command([f"{url}#other"], **given)
    capsys.readouterr()
    regrade_command(tmp_path / "out", as_json=True)
    assert json.loads(capsys.readouterr().out)["graded"] == 3
    evaluate_command(list_=True)
    assert "gsm8k" in capsys.readouterr().out
    for wrong, message in (
        ({"limit": 3}, "--limit belongs to --tasks"),
        ({"tasks": "gsm8k", "lengths": "9"}, "--lengths belongs without --tasks"),
        ({"tasks": "gsm8k", "max_cost": 1.0}, "add --price"),
        ({"tasks": "gsm8k", "extra_body": "[]"}, "no JSON object"),
        ({"tasks": "gsm8k", "data": ["aime=x"]}, "expected one of gsm8k"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate_command(["x"], **wrong)  # type: ignore[arg-type]
