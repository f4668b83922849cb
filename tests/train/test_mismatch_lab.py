"""The mismatch laboratory, reduced: every combination, fair twins, formats that can be told apart, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import RecipeError
from tafkir.plan.estimate import estimate_stages
from tafkir.recipe.lab import MismatchLabConfig
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tafkir.tasks.reversal import Reversal
from tafkir.train.mismatch_lab import list_variants, steps_survived
from tafkir.train.rlvr import RlvrStep

TINY = (
    "model.hidden_size=32",
    "model.head_dim=16",
    "model.intermediate_size=32",
    "model.moe_intermediate_size=16",
    "model.num_experts=8",
    "lab.steps=2",
    "lab.seeds=1",
    "lab.digits=2",
    "lab.max_completion_tokens=4",
    "lab.warm_start_steps=40",
    "lab.warm_start_batch=32",
    "lab.warm_start_learning_rate=1e-2",
    "lab.prompts_per_step=4",
    "lab.group_size=3",
    "lab.save_every=1",
    "lab.rollouts=['float32','nvfp4_w4a4','noise']",
    "lab.noise=0.3",
    "lab.losses=['grpo','icepop']",
    "lab.skip=[]",
)


class Killed(BaseException):
    """Stands for the end of the process."""


def run_tiny(path: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    loaded = resolve_recipe(load_recipe(["mismatch-lab"], [*TINY, "report=", *overrides]))
    run = RunDir(path)
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["lab"]
    return result, run.stage("lab").path / "variants"


def rows_of(variants: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (variants / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return run_tiny(tmp_path_factory.mktemp("lab") / "unbroken")


def test_every_combination_is_trained(unbroken: tuple[dict[str, Any], Path]) -> None:
    result, variants = unbroken
    names = {
        f"{rollout}-{loss}-{replay}-seed0"
        for rollout in ("float32", "nvfp4_w4a4", "noise")
        for loss in ("grpo", "icepop")
        for replay in ("own", "replay")
        if (rollout, replay) != ("float32", "replay")
    }
    assert {folder.name for folder in variants.iterdir()} == names
    assert [(v["steps"], v["survived"], v["diverged"]) for v in result["variants"]] == [(2, 2, None)] * len(names)
    assert result["steps"] == 2 * len(names) and result["tokens"] > 0
    assert not list(variants.rglob("state")), "states of finished variants only take up room"
    for variant in result["variants"]:
        assert 0 <= variant["heldout_reward"] <= 1


def test_twins_begin_alike_and_formats_differ(unbroken: tuple[dict[str, Any], Path]) -> None:
    _, variants = unbroken
    first = {folder.name: rows_of(variants, folder.name)[0] for folder in variants.iterdir()}
    # Equal weights, problems and draws: a loss changes nothing before its first update.
    for rollout in ("float32", "nvfp4_w4a4", "noise"):
        rewards = {first[f"{rollout}-{loss}-own-seed0"]["rollout/reward_mean"] for loss in ("grpo", "icepop")}
        assert len(rewards) == 1
    gap = "mismatch/abs_logprob_diff_max"
    assert first["float32-grpo-own-seed0"][gap] < 1e-4
    assert first["nvfp4_w4a4-grpo-own-seed0"][gap] > 1e-3 < first["noise-grpo-own-seed0"][gap]
    assert first["noise-icepop-replay-seed0"]["mismatch/expert_agreement"] == 1
    assert first["noise-icepop-own-seed0"]["mismatch/expert_agreement"] < 1


def test_a_killed_lab_goes_on_where_it_was(
    unbroken: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = unbroken
    left = ("lab.rollouts=['noise']", "lab.losses=['icepop']")
    calls = 0
    learn = RlvrStep.__call__

    def dying(self: Any, step: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return learn(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(RlvrStep, "__call__", dying)
        with pytest.raises(Killed):
            run_tiny(tmp_path / "killed", *left)
    result, variants = run_tiny(tmp_path / "killed", *left)
    assert [v["steps"] for v in result["variants"]] == [2, 2]
    for folder in variants.iterdir():
        assert rows_of(variants, folder.name) == rows_of(expected, folder.name)


def test_the_shipped_laboratory_is_what_its_heading_says() -> None:
    recipe = resolve_recipe(load_recipe(["mismatch-lab"])).recipe
    assert isinstance(recipe.lab, MismatchLabConfig)
    variants = list_variants(recipe.lab)
    assert len({variant.name for variant in variants}) == len(variants) == 49
    assert f"{len(variants)} variants" in recipe.description
    # Every loss meets 4-bit weights and noise in every repeat; replay, and what hardly differs, is a glance.
    for rollout in ("nvfp4", "noise"):
        assert len([v for v in variants if v.rollout == rollout and not v.replay]) == 5 * recipe.lab.seeds
    assert {v.rollout for v in variants if v.replay} == {"nvfp4"}
    assert {v.loss for v in variants if v.rollout == "float32"} == {"grpo"}
    assert [v.seed for v in variants] == sorted(v.seed for v in variants), "repeats come one after the other"
    (estimate,) = [stage for stage in estimate_stages(recipe) if stage.kind == "lab"]
    assert 600 < estimate.seconds < 8 * 3600


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lab.losses=['grpo','grpo']"], "losses names something twice"),
        (["lab.rollout.precision=fp8"], "rollout is not a lab's to choose"),
        (["lab.acceptance.kind=none"], "acceptance is not a lab's to choose"),
        (["lab.kl.coef=0.1"], "without a reference policy"),
        (["lab.max_completion_tokens=2"], "max_completion_tokens must leave room"),
        (["lab.checkpoint_every=1"], "writes no checkpoint"),
        (["lab.method=other"], "got lab.method = other"),
        (["lab.digit=3"], "unknown key"),
        (["lab.replay=[]"], "lab.replay"),
        (["lab.skip=['fp4-*']"], "'fp4-\\*' is the name of no variant, such as 'float32-grpo-own-seed0'"),
        (["lab.skip=['*']"], "skip leaves no variant"),
    ],
)
def test_what_a_laboratory_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(["mismatch-lab"], overrides)


def test_a_vocabulary_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.vocab_size=256"):
        run_tiny(tmp_path / "small", "model.vocab_size=256")


def test_survival_ends_where_half_of_the_best_reward_is_lost() -> None:
    assert steps_survived([0.5] * 30) == 30
    assert steps_survived([0.5] * 5) == 5
    # The mean of ten falls below 0.25 when six of them are zero.
    assert steps_survived([0.5] * 20 + [0.0] * 10) == 25
    assert steps_survived([]) == 0


def test_the_task_rewards_prefixes_and_its_numbers_follow_from_seed_and_index() -> None:
    task = Reversal(4, seed=3)
    example = task.example("train", 7)
    assert example == Reversal(4, seed=3).example("train", 7) != task.example("train", 8)
    assert example.question == example.answer[::-1] + "=" and task.prompt(example)[0].content == example.question
    assert task.example("validation", 7) != example and len(task.examples("test")) == 200
    assert task.grade(example, example.answer).reward == 1
    wrong = task.grade(example, example.answer[:2] + "x")
    assert (wrong.reward, wrong.outcome) == (0.25, "wrong") and "2 of 4" in wrong.reason
    assert task.grade(example, example.answer + "0").reward == 0.5
    assert task.grade(example, example.answer, finished=False).outcome == "length"
    assert task.grade(example, "").reward == 0
