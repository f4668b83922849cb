"""Stages that learn from a mixture of tasks: streams, the curriculum, the pass-rate filter, and whole small runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RecipeError
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.show import dump_toml
from tafkir.recipe.tasks import LEVELS, CurriculumConfig, PassRateConfig, TaskConfig, TaskKind
from tafkir.records import Example, Verdict
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import RunDir
from tafkir.tasks.math import WordProblems
from tafkir.tasks.mixture import KINDS, MixtureStream, TaskMixture, kind_of
from tafkir.tasks.sandbox import Sandbox
from tafkir.train.curriculum import Curriculum
from tafkir.train.pass_rate import KeptPrompts
from tests.e2e.conftest import rows_of_sums, write_jsonl

TASKS = 'rlvr.tasks=[{kind="countdown", weight=3.0, difficulty=[1, 2]}, {kind="word_problems"}]'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Make 24 from 3 8. <think>"], 300)


def test_every_kind_of_the_recipe_has_a_task_with_its_levels() -> None:
    assert set(get_args(TaskKind)) == set(LEVELS) == {*KINDS, "code", "word_problems"}
    for name, kind in KINDS.items():
        for level in range(1, LEVELS[name] + 1):  # type: ignore[index]
            assert kind.make(1, level).question


def test_a_mixture_draws_by_weight_and_grades_by_kind(tokenizer: Tokenizer) -> None:
    configs = [TaskConfig(kind="countdown", weight=3.0, difficulty=(1, 3)), TaskConfig(kind="maze", difficulty=(2,))]
    mixture = TaskMixture(configs)
    stream = MixtureStream(mixture, tokenizer, per_step=50, seed=4)
    drawn = [example for step in range(4) for example, _ in stream.batch_at(step)]
    sources = Counter(example.source for example in drawn)
    assert set(sources) == {"countdown/1", "countdown/3", "maze/2"}
    assert 30 <= sources["maze/2"] <= 70 and 50 <= sources["countdown/1"] <= 100
    for example, prompt in stream.batch_at(2)[:10]:
        assert mixture.grade(example, f"\\boxed{{{example.answer}}}").correct
        assert not mixture.grade(example, "\\boxed{1}").correct
        ids, mask = stream.solved(example)
        assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert mixture.grade(example, tokenizer.decode(ids[len(prompt) :])).correct
    assert stream.batch_at(3) == MixtureStream(mixture, tokenizer, per_step=50, seed=4).batch_at(3)
    assert [stream.solved(example) for example, _ in stream.batch_at(1)] == stream.solved_batch_at(1)


def test_word_problems_keep_their_place_in_a_mixture(tokenizer: Tokenizer) -> None:
    mixture = TaskMixture([TaskConfig(kind="word_problems"), TaskConfig(kind="grids")], WordProblems())
    word = Example("w", "gsm8k", "train", "2+3?", "5")
    stream = MixtureStream(mixture, tokenizer, per_step=20, seed=0, word_problem=lambda at: (word, [at]))
    kinds = Counter(kind_of(example) for example, _ in stream.batch_at(0))
    assert set(kinds) == {"word_problems", "grids"}
    assert mixture.grade(word, "\\boxed{5}").correct and mixture.prompt(word)[0].content == "2+3?"


def test_code_says_in_the_recipe_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Sandbox, "__init__", lambda self, tier, limits, **_: seen.append((tier, limits.timeout_s)))
    TaskMixture([TaskConfig(kind="code")])
    TaskMixture([TaskConfig(kind="code", sandbox="rlimit", timeout_s=2.0)])
    assert seen == [("bwrap", 5.0), ("rlimit", 2.0)]


def test_a_level_rises_when_it_is_passed_and_the_state_brings_it_back() -> None:
    config = CurriculumConfig(threshold=0.75, window=2, review_share=0.25)
    curriculum = Curriculum({"maze": (1, 3, 4)}, config)
    steps = [[True, False], [True, True], [True, True], [], [True], [True], [True], [False]]
    levels = []
    for passed in steps:
        curriculum.record("maze", passed)
        levels.append(curriculum.current("maze"))
    assert levels == [1, 3, 3, 3, 4, 4, 4, 4]
    drawn = Counter(curriculum.level("maze", seed) for seed in range(2000))
    assert 0.7 < drawn[4] / 2000 < 0.8 and drawn[1] > 180 and drawn[3] > 180

    halfway = Curriculum({"maze": (1, 3, 4)}, config)
    for passed in steps[:5]:
        halfway.record("maze", passed)
    resumed = Curriculum({"maze": (1, 3, 4)}, config)
    resumed.load_state(json.loads(json.dumps(halfway.state())))
    for passed in steps[5:]:
        resumed.record("maze", passed)
    assert resumed.state() == curriculum.state()


def test_only_problems_inside_the_band_stay_and_the_rates_are_measured_once(tmp_path: Path) -> None:
    examples = [(Example(str(i), "s", "train", "q", "a"), [i]) for i in range(5)]
    measured: list[int] = []

    def measure(pool: Any) -> list[float]:
        measured.append(len(pool))
        return [0.0, 0.25, 0.5, 0.75, 1.0]

    config = PassRateConfig(pool=5, low=0.25, high=0.75)
    for _ in range(2):
        kept = KeptPrompts(lambda i: examples[i], measure, config, tmp_path, per_step=3, seed=0)
        assert kept.kept == [1, 2, 3]
        assert sorted(ids[0] for _, ids in kept.batch_at(0)) == [1, 2, 3]
    assert measured == [5]
    narrow = PassRateConfig(pool=5, low=0.9, high=0.95)
    with pytest.raises(DataError, match=r"no problem is left: of 5, 1 are never solved and 1 always.*0\.9 to 0\.95"):
        KeptPrompts(lambda i: examples[i], measure, narrow, tmp_path, per_step=3, seed=0)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ('rlvr.tasks=[{kind="sudoko"}]', "'countdown'"),
        ('rlvr.tasks=[{kind="sudoku", difficulty=[7]}]', "sudoku has levels 1 to 6, not 7"),
        ('rlvr.tasks=[{kind="sudoku", difficulty=[2, 1]}]', "in rising order"),
        ('rlvr.tasks=[{kind="maze"}, {kind="maze"}]', "maze stands there twice"),
        ('rlvr.tasks=[{kind="maze", sandbox="rlimit"}]', "maze runs no programs"),
        ('rlvr.tasks=[{kind="maze", wieght=1.0}]', "did you mean rlvr.tasks.weight?"),
        ("rlvr.tasks=[{weight=1.0}]", "rlvr.tasks.kind: missing key"),
        ("rlvr.pass_rate={low=0.9, high=0.1}", "low=0.9 is above high=0.1"),
    ],
)
def test_a_wrong_task_table_is_explained(override: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["smoke"], [override])
    assert reason in str(caught.value)


def test_tasks_are_shown_as_a_recipe_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text(
        '[[rlvr.tasks]]\nkind = "maze"\ndifficulty = [1, 2]\n\n[[rlvr.tasks]]\nkind = "code"\nweight = 2.0\n'
    )
    loaded = load_recipe(["smoke", path], ["rlvr.curriculum.window=3"])
    again = tmp_path / "again.toml"
    again.write_text(dump_toml(loaded.recipe))
    assert load_recipe([again]).recipe == loaded.recipe
    assert loaded.recipe.rlvr is not None and [task.kind for task in loaded.recipe.rlvr.tasks] == ["maze", "code"]


def test_the_reward_file_is_part_of_what_the_stage_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def reward(example, text): return 1.0\n")
    recipe = load_recipe(["smoke"], [f"rlvr.reward_file={json.dumps(str(path))}"]).recipe
    before = fingerprint_stages(recipe, None)
    path.write_text("def reward(example, text): return 2.0\n")
    after = fingerprint_stages(recipe, None)
    assert before["sft"] == after["sft"] and before["rlvr"] != after["rlvr"]


Run = Callable[..., RunDir]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the rlvr stage of a small recipe; the stages before it are made once."""
    folder = tmp_path_factory.mktemp("tasks")
    sums = f"data.sources=[{str(write_jsonl(folder / 'sums.jsonl', rows_of_sums()))!r}]"
    common = [sums, "threads=1", "pretrain=", "eval=", "report=", "sft.story_share=0"]
    common += ['sft.tasks=[{kind="countdown", difficulty=[1]}, {kind="word_problems"}]', "sft.validate_every=3"]
    common += ["rlvr.steps=4", "rlvr.prompts_per_step=4", "rlvr.temperature=0.7", "rlvr.save_every=2"]

    def run(name: str, *overrides: str) -> RunDir:
        loaded = resolve_recipe(load_recipe(["smoke"], [*common, *overrides]))
        directory = RunDir(folder / name)
        run_recipe(loaded, directory, select_stages(loaded.recipe))
        return directory

    yield run


def test_sft_learns_from_solved_tasks_and_rlvr_counts_by_kind(start: Run) -> None:
    run = start("mixed", TASKS)
    rows = list(read_jsonl(run.stage("rlvr").metrics_path))
    assert len(rows) == 4
    names = {name for row in rows for name in row if name.startswith("tasks/")}
    assert names == {
        f"tasks/{kind}/{what}" for kind in ("countdown", "word_problems") for what in ("accuracy", "level_mean")
    }
    sft = list(read_jsonl(run.stage("sft").metrics_path))
    assert sft[-1]["validation/loss"] > 0


def test_a_curriculum_goes_on_bit_for_bit_after_a_kill(start: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is taken for right, so that levels rise; the run is stopped in its fourth step."""
    monkeypatch.setattr(TaskMixture, "grade", _all_right)
    overrides = ('rlvr.tasks=[{kind="countdown", difficulty=[1, 2, 3, 4]}]', "rlvr.curriculum.window=1")
    unbroken = start("unbroken", *overrides)
    rows = list(read_jsonl(unbroken.stage("rlvr").metrics_path))
    assert [row["tasks/countdown/curriculum_level"] for row in rows] == [1, 2, 3, 4]

    calls = 0

    def interrupted(self: Curriculum, kind: str, seed: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 14:  # in the fourth step, after the state of the second
            raise KeyboardInterrupt
        return level(self, kind, seed)

    level = Curriculum.level
    monkeypatch.setattr(Curriculum, "level", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start("killed", *overrides)
    resumed = start("killed", *overrides)
    assert calls == 14 + 8
    assert resumed.stage("rlvr").metrics_path.read_bytes() == unbroken.stage("rlvr").metrics_path.read_bytes()


def _all_right(self: TaskMixture, example: Example, text: str, *, finished: bool = True) -> Verdict:
    return Verdict("correct", float(len(text) % 2), text, example.answer)


def test_a_users_reward_trains_and_its_failures_are_in_the_metrics(start: Run, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def reward(example, text):\n    return len(text) / 10 if len(text) % 2 else float('nan')\n")
    run = start("own", f"rlvr.reward_file={json.dumps(str(path))}", "rlvr.reward_timeout_s=9.0")
    rows = list(read_jsonl(run.stage("rlvr").metrics_path))
    assert sum(row["reward/not_finite"] for row in rows) > 0
    assert all(row["reward/raised"] == 0 for row in rows)
    assert any(row["rollout/reward_mean"] > 0 for row in rows)


def test_problems_are_chosen_by_pass_rate(start: Run) -> None:
    run = start("filtered", TASKS, "rlvr.pass_rate={pool=6, samples=2, low=0.0, high=1.0}")
    rates = json.loads((run.stage("rlvr").path / "pass_rates.json").read_text())["pass_rates"]
    assert len(rates) == 6 and set(rates) <= {0.0, 0.5, 1.0}
    with pytest.raises(DataError, match="no problem is left: of 6, 6 are never solved"):
        start("none", 'rlvr.tasks=[{kind="sudoku", difficulty=[3]}]', "rlvr.pass_rate={pool=6, samples=2}")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("rlvr.curriculum.window=1",), "a curriculum needs tasks"),
        ((TASKS, "rlvr.curriculum.window=1", "rlvr.pass_rate.pool=4"), "by pass rate or by a curriculum"),
        ((TASKS, "rlvr.curriculum.window=1", "rlvr.long_tail.staleness=1"), "needs the rollouts of the step before"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(start: Run, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        start("refused", *overrides)


def test_eval_scores_the_tasks_level_by_level(start: Run) -> None:
    run = start(
        "eval",
        "rlvr.steps=1",
        "eval.max_problems=3",
        "eval.samples=1",
        "eval.max_tokens=8",
        'eval.tasks=[{kind="countdown", difficulty=[1, 2]}, {kind="instructions", difficulty=[2]}]',
    )
    result = run.stage("eval").read_result()
    assert result is not None and result["task"] == "tasks" and result["baselines"] == {}
    assert result["sources"] == {"countdown/1": 3, "countdown/2": 3, "instructions/2": 3}
    assert set(result["stages"]["rlvr"]) == {"all", *result["sources"]}
