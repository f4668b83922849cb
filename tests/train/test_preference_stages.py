"""Whole stages on a tiny model: reward, dpo and rlhf after sft; resumed, joint, judged, stopped, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint, load_reward_model
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import RecipeError, TrainingError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tafkir.train import preference_stages, rlvr
from tests.e2e.conftest import rows_of_sums, write_jsonl

SHORT = (
    "threads=1",
    "kernels=torch",
    "data.max_steps=2",
    "pretrain.steps=2",
    "pretrain.story_share=0",
    "sft.steps=6",
    "sft.batch_problems=4",
    "sft.story_share=0",
    "sft.checkpoint_every=2",
    "sft.select.problems=4",
    "sft.select.max_tokens=8",
    "eval=",
    "report=",
)
ONLY = ("tokenizer=", "pretrain=", "sft=", "rlvr=")
RLHF = (
    "rlhf.steps=3",
    "rlhf.prompts_per_step=4",
    "rlhf.group_size=2",
    "rlhf.max_completion_tokens=6",
    "rlhf.log_every=1",
    "rlhf.save_every=1",
    "rlhf.drop_zero_variance=false",
    "rlhf.guard.kl_budget=1000",
    "rlhf.learning_rate=3e-3",
    "rlhf.warmup_steps=0",
)


def run(folder: Path, *overrides: str) -> tuple[RunDir, dict[Any, dict[str, Any]]]:
    loaded = resolve_recipe(load_recipe(["smoke"], [*SHORT, *overrides]))
    directory = RunDir(folder)
    return directory, run_recipe(loaded, directory, select_stages(loaded.recipe))


def rows(directory: RunDir, kind: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in directory.stage(kind).metrics_path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.sources=[{str(write_jsonl(tmp_path_factory.mktemp('s') / 'sums.jsonl', rows_of_sums()))!r}]"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The preferred side says the thing's name, in English or Arabic; the other says nothing to the point."""
    names = ("pens", "cups", "أقلام", "كتب", "hats", "keys")
    made = [
        {"prompt": f"{i}. What is it? {name}", "chosen": f"It is {name}.", "rejected": "No idea at all, sorry."}
        for i in range(6)
        for name in names
    ]
    path = write_jsonl(tmp_path_factory.mktemp("p") / "pairs.jsonl", made)
    return f"preferences.sources=[{str(path)!r}]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, sums: str) -> tuple[str, dict[Any, dict[str, Any]]]:
    directory, results = run(tmp_path_factory.mktemp("base") / "r", sums, "rlvr=")
    return f"base={json.dumps(str(directory.stage('sft').checkpoint_dir))}", results


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory, sums: str, pairs: str, base: tuple[str, Any]
) -> tuple[RunDir, dict[Any, dict[str, Any]], tuple[str, ...]]:
    """reward, dpo and rlhf on the base."""
    settings = (
        sums,
        pairs,
        base[0],
        *ONLY,
        "preferences.max_length=120",
        "reward.steps=30",
        "reward.batch_pairs=8",
        "reward.learning_rate=1e-2",
        "reward.warmup_steps=2",
        "reward.judge_share=0.4",
        "reward.center_coef=0.01",
        "dpo.steps=6",
        "dpo.batch_pairs=8",
        "dpo.warmup_steps=1",
        "dpo.learning_rate=3e-3",
        "dpo.log_every=1",
        "rlhf.guard.judge=true",
        "rlhf.guard.tolerance=100",
        *RLHF,
    )
    directory, results = run(tmp_path_factory.mktemp("chain") / "r", *settings)
    return directory, results, settings


def test_sft_goes_on_with_the_checkpoint_that_was_chosen(base: tuple[str, dict[Any, dict[str, Any]]]) -> None:
    select = base[1]["sft"]["select"]
    assert [row["step"] for row in select["candidates"]] == [2, 4, 6]
    folder = Path(json.loads(base[0].removeprefix("base=")))
    chosen = folder.parent / "checkpoints" / f"step-{select['step']:08d}"
    assert (folder / "model.safetensors").read_bytes() == (chosen / "model.safetensors").read_bytes()
    assert all(0 < row["entropy"] < 7 and row["low"] <= row["score"] <= row["high"] for row in select["candidates"])


def test_the_reward_model_learns_what_is_preferred_and_says_how_well(chain: Any) -> None:
    directory, results, _ = chain
    told = results["reward"]
    heldout = told["heldout"]
    assert heldout["accuracy"]["value"] > 0.8 and heldout["accuracy"]["low"] > 0.4
    assert told["judge"]["heldout"]["num_pairs"] == heldout["num_pairs"]
    assert told["train_pairs"] + told["judge"]["train_pairs"] == told["pairs"]["train"]
    assert 0 <= told["judge"]["agreement"]["value"] <= 1
    written = [json.loads(line) for line in (directory.stage("reward").path / "heldout.jsonl").read_text().splitlines()]
    assert len(written) == heldout["num_pairs"] and {"chosen_reward", "rejected_tokens"} <= written[0].keys()
    losses = [row["train/loss"] for row in rows(directory, "reward")]
    assert losses[-1] < losses[0]
    found = load_reward_model(directory.stage("reward").checkpoint_dir)
    assert found.reward_std == told["reward_std"] and found.tokenizer_path is not None


def test_the_policy_goes_past_the_reward_model(chain: Any, base: tuple[str, Any]) -> None:
    directory, results, _ = chain
    dpo = rows(directory, "dpo")
    assert dpo[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3), "the first step is at the reference"
    assert dpo[-1]["train/loss"] < dpo[0]["train/loss"] and results["dpo"]["heldout"]["accuracy"]["value"] > 0.5
    before = load_checkpoint(directory.stage("dpo").checkpoint_dir).decoder.state_dict()
    after = load_checkpoint(directory.stage("rlhf").checkpoint_dir).decoder.state_dict()
    assert before.keys() == after.keys() and "score.weight" not in after
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_rlhf_reports_rewards_the_judge_and_its_distance(chain: Any) -> None:
    directory, results, _ = chain
    told = rows(directory, "rlhf")
    assert abs(told[0]["rlhf/kl"]) < 1e-3 < told[-1]["rlhf/kl"]
    assert all({"rlhf/reward", "rlhf/judge_reward", "rlhf/length", "rlhf/empty"} <= row.keys() for row in told)
    assert all(abs(row["rlhf/reward"]) <= 5 and row["rlhf/ungraded"] == 0 for row in told)
    assert results["rlhf"]["guard"] == {"stopped": "", "rate": 1.0, "trips": []}


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "rlhf"])
def test_a_killed_stage_goes_on_to_the_same_bits(
    kind: Any, chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _, settings = chain
    target = preference_stages.dpo_step if kind == "dpo" else rlvr.RlvrStep.__call__
    with monkeypatch.context() as patch:
        if kind == "dpo":
            patch.setattr(preference_stages, "dpo_step", lambda *args: _dying(target(*args), 4))
        else:
            patch.setattr(rlvr.RlvrStep, "__call__", lambda self, step: _dying(lambda n: target(self, n), 2)(step))
        with pytest.raises(_Killed):
            run(tmp_path / "r", *settings, f"{kind}.save_every=1")
    again, _ = run(tmp_path / "r", *settings, f"{kind}.save_every=1")
    for stage in ("reward", "dpo", "rlhf"):
        whole, resumed = (each.stage(stage) for each in (directory, again))
        assert whole.metrics_path.read_bytes() == resumed.metrics_path.read_bytes(), stage
        weights = (each.checkpoint_dir / "model.safetensors" for each in (whole, resumed))
        assert len({path.read_bytes() for path in weights}) == 1, stage


def _dying(step: Any, last: int) -> Any:
    def take(n: int) -> Any:
        if n == last:
            raise _Killed
        return step(n)

    return take


def test_a_stopped_stage_keeps_the_weights_of_its_last_step(
    chain: Any, sums: str, pairs: str, base: tuple[str, Any], tmp_path: Path
) -> None:
    settings = [text for text in chain[2] if not text.startswith("dpo.")]
    strict = ("rlhf.guard.kl_budget=1e-9", "rlhf.guard.window=1")
    directory, results = run(tmp_path / "r", *settings, *strict)
    guard = results["rlhf"]["guard"]
    assert "nats a completion" in guard["stopped"] and len(guard["trips"]) == 1
    told = rows(directory, "rlhf")
    stopped = guard["trips"][0]["step"]
    assert stopped < 3 and [row.get("rlhf/stopped") for row in told][stopped - 1 :] == [1.0] * (4 - stopped)
    assert "train/loss" not in told[-1]


class Judge(BaseHTTPRequestHandler):
    """Prefers longer answers; every third call fails."""

    calls = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][1]["content"]
        Judge.calls += 1
        if "<answer_a>" in asked:
            first, _, second = asked.rpartition("<answer_a>\n")[2].partition("\n</answer_a>\n<answer_b>\n")
            said = "Winner: " + ("A" if len(first) > len(second.removesuffix("\n</answer_b>")) else "B")
        else:
            answer = asked.rpartition("<answer>\n")[2].removesuffix("\n</answer>")
            said = f"Score: {min(10, len(answer))}"
        words = {"choices": [{"message": {"content": said}}], "usage": {"total_tokens": 5}}
        body = json.dumps(words).encode()
        self.send_response(503 if Judge.calls % 3 == 0 else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def judge_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_a_joint_stage_with_a_judge_behind_http(
    sums: str, pairs: str, base: tuple[str, Any], tmp_path: Path, judge_url: str
) -> None:
    settings = (sums, pairs, base[0], *ONLY, "preferences.max_length=120", *RLHF, "rlhf.verifiable_share=0.5")
    judge = (f"rlhf.judge.url={judge_url}", "rlhf.judge.model=m", "rlhf.judge.backoff_s=0", "rlhf.judge.concurrency=1")
    directory, results = run(tmp_path / "r", *settings, "rlhf.grader=judge", *judge)
    counts = results["rlhf"]["judge"]
    assert counts["answers"] == 3 * 2 * 2 and counts["failures"] == 0
    assert counts["tokens"] == 5 * (counts["calls"] - counts["retries"])
    assert (directory.stage("rlhf").path / "judgements.jsonl").is_file()
    told = rows(directory, "rlhf")
    assert all(0 <= row["rlhf/reward"] <= 1 and "rlhf/verifiable_accuracy" in row for row in told)


def test_kto_and_then_a_judge_that_compares_answers(
    sums: str, pairs: str, base: tuple[str, Any], tmp_path: Path, judge_url: str
) -> None:
    dpo = ("dpo.steps=3", "dpo.loss=kto", "dpo.batch_pairs=8", "dpo.warmup_steps=1", "dpo.log_every=1")
    settings = (sums, pairs, base[0], *ONLY, "preferences.max_length=120", *dpo, *RLHF, "rlhf.grader=judge")
    judge = (f"rlhf.judge.url={judge_url}", "rlhf.judge.model=m", "rlhf.judge.backoff_s=0", "rlhf.judge.mode=pairwise")
    directory, results = run(tmp_path / "r", *settings, *judge, "rlhf.judge.opponents=1", "rlhf.judge.concurrency=1")
    told = rows(directory, "dpo")
    assert told[0]["train/loss"] == pytest.approx(0.5, abs=1e-3) and told[0]["dpo/divergence"] == pytest.approx(0.0)
    assert results["dpo"]["loss"] == "kto" and 0 < results["dpo"]["heldout"]["loss"] < 1
    counts = results["rlhf"]["judge"]
    assert counts["answers"] == 3 * 4 * 2 and counts["failures"] == 0
    assert 0 <= counts["inconsistent"] <= counts["comparisons"] and counts["comparisons"] > 0
    assert all(row["rlhf/reward"] == 0.5 for row in rows(directory, "rlhf"))


def test_a_judge_that_is_spent_ends_the_stage_with_the_reason(
    sums: str, pairs: str, base: tuple[str, Any], tmp_path: Path, judge_url: str
) -> None:
    settings = (sums, pairs, base[0], *ONLY, "preferences.max_length=120", *RLHF, "rlhf.grader=judge")
    judge = (f"rlhf.judge.url={judge_url}", "rlhf.judge.model=m", "rlhf.judge.backoff_s=0", "rlhf.judge.max_calls=3")
    with pytest.raises(TrainingError, match=r"rlhf step 1: .* could not be graded.*budget of 3 calls is spent"):
        run(tmp_path / "r", *settings, *judge)


REFUSED = {
    "there is no reward model.*rlhf.grader|rlhf.grader.*there is no reward model": ("rlhf.steps=1",),
    "there is no judge to watch": ("reward.steps=1", "rlhf.steps=1", "rlhf.guard.judge=true"),
    "exceeds the model's context": ("dpo.steps=1", "preferences.max_length=100000"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_by_name(why: str, sums: str, base: tuple[str, Any], tmp_path: Path) -> None:
    made_up = ("preferences.sources=[]", "preferences.made_up=12", "preferences.max_length=200")
    with pytest.raises(RecipeError, match=why):
        run(tmp_path / "r", sums, base[0], *ONLY, *made_up, *REFUSED[why])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (("rlhf.grader=judge",), "needs a .rlhf.judge. table"),
        (("preferences.sources=[]",), "there would be no pair"),
        (("rlhf.max_resamples=1",), "max_resamples is for verifiable rewards"),
        (("sft.select.problems=1", "sft.checkpoint_every=0"), "checkpoint_every"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_anything_runs(wrong: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load_recipe(["smoke"], list(wrong))
