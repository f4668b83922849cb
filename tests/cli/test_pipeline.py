"""How stages are strung together: skipped, resumed, redone. The stages here only write down that they ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import BackendUnavailable, CheckpointError, RecipeError, RunDirError
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.stage import StageContext, StageFunction
from tafkir.records import StageName
from tafkir.runlog.rundir import RunDir

# The stages of the smoke recipe.
CHAIN = ("tokenizer", "pretrain", "sft", "rlvr", "eval", "report")


class Killed(Exception):
    """Stands for the end of the process in the middle of a stage."""


class Bench:
    """A run directory with stages that record their calls; `die_in` ends one of them halfway."""

    def __init__(self, path: Path) -> None:
        self.run = RunDir(path / "run")
        self.calls: list[tuple[str, str | None]] = []
        self.die_in: str | None = None

    def __call__(self, *overrides: str, only: str | None = None, start: str | None = None) -> list[str]:
        """Run, and return the stages that did something."""
        self.calls.clear()
        loaded = resolve_recipe(load_recipe(["smoke"], overrides))
        selection = select_stages(loaded.recipe, only=only, start=start)
        run_recipe(loaded, self.run, selection, find_function=self.find)
        return [kind for kind, _ in self.calls]

    def find(self, kind: StageName) -> StageFunction:
        return self.stage

    def stage(self, context: StageContext) -> dict[str, Any]:
        kind = context.stage.kind
        self.calls.append((kind, context.previous.parent.name if context.previous else None))
        if kind == self.die_in:
            context.stage.write_json("half.json", 1)
            raise Killed
        context.stage.checkpoint_dir.mkdir(exist_ok=True)
        return {"seed": context.seed}

    def asides(self) -> list[str]:
        return sorted(path.name for path in self.run.stages_dir.glob("*.old-*"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_stages_run_in_order_and_each_gets_the_checkpoint_before(bench: Bench) -> None:
    assert bench() == list(CHAIN)
    assert [previous for _, previous in bench.calls] == [
        None,
        "01-tokenizer",
        "02-pretrain",
        "03-sft",
        "06-rlvr",
        "06-rlvr",
    ]
    result = bench.run.stage("sft").read_result()
    assert result is not None and result["finished"] is True and result["seed"] == 0
    assert load_recipe([bench.run.recipe_path]).recipe.name == "smoke"
    assert bench.run.env_path.exists() and bench.run.log_path.exists()


def test_a_finished_run_does_nothing(bench: Bench) -> None:
    bench()
    assert bench() == []
    assert bench.asides() == []


def test_a_killed_stage_goes_on_in_its_directory(bench: Bench) -> None:
    bench.die_in = "sft"
    with pytest.raises(Killed):
        bench()
    bench.die_in = None
    assert bench() == ["sft", "rlvr", "eval", "report"]
    assert bench.asides() == []
    assert bench.run.stage("sft").read_json("half.json") == 1


def test_changed_inputs_redo_the_stage_and_all_later_ones(bench: Bench) -> None:
    bench()
    assert bench("sft.steps=9") == ["sft", "rlvr", "eval", "report"]
    assert bench.asides() == ["03-sft.old-1", "06-rlvr.old-1", "11-eval.old-1", "14-report.old-1"]


def test_a_half_done_stage_with_changed_inputs_is_not_resumed(bench: Bench) -> None:
    bench.die_in = "sft"
    with pytest.raises(Killed):
        bench()
    bench.die_in = None
    assert bench("sft.steps=9")[0] == "sft"
    assert bench.asides() == ["03-sft.old-1"]
    assert not (bench.run.stage("sft").path / "half.json").exists()


def test_only_and_from_redo_finished_stages(bench: Bench) -> None:
    bench()
    assert bench(only="rlvr") == ["rlvr"]
    assert bench.asides() == ["06-rlvr.old-1"]
    assert bench(start="rlvr") == ["rlvr", "eval", "report"]
    assert bench() == []


def test_a_forced_run_that_was_killed_goes_on_with_the_same_command(bench: Bench) -> None:
    bench()
    bench.die_in = "rlvr"
    with pytest.raises(Killed):
        bench(start="sft")
    assert [kind for kind, _ in bench.calls] == ["sft", "rlvr"]
    bench.die_in = None
    assert bench(start="sft") == ["rlvr", "eval", "report"]
    assert bench(start="sft") == ["sft", "rlvr", "eval", "report"]


def test_only_with_another_setting(bench: Bench) -> None:
    bench()
    assert bench("rlvr.learning_rate=0.5", only="rlvr") == ["rlvr"]


def test_only_and_from_need_the_earlier_stages(bench: Bench) -> None:
    for choice in ({"only": "rlvr"}, {"start": "rlvr"}):
        with pytest.raises(RunDirError, match="stage tokenizer is not finished with these settings"):
            bench(**choice)
    bench()
    with pytest.raises(RunDirError, match=r"stage sft is not finished with these settings.*--from sft"):
        bench("sft.steps=9", only="rlvr")
    assert bench() == []


def test_a_choice_that_cannot_be_is_refused() -> None:
    recipe = load_recipe(["smoke"], ["report="]).recipe
    with pytest.raises(RecipeError, match="--only: the recipe has no stage 'report'; expected one of tokenizer"):
        select_stages(recipe, only="report")
    with pytest.raises(RecipeError, match="--from: the recipe has no stage 'x'"):
        select_stages(recipe, start="x")
    with pytest.raises(RecipeError, match="exclude each other"):
        select_stages(recipe, only="sft", start="sft")


def test_the_base_comes_first_and_a_missing_one_leaves_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    base = tmp_path / "base"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        bench("tokenizer=", f"base={base}")
    assert not bench.run.path.exists()
    base.mkdir()
    bench("tokenizer=", f"base={base}")
    assert bench.calls[0] == ("pretrain", tmp_path.name)


def test_a_tracker_that_is_not_installed_is_named_before_any_stage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tafkir.runlog.trackers.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"tensorboard is not installed.*pip install 'tafkir\[rl\]'"):
        bench('track=["tensorboard"]')
    assert not bench.calls


def test_two_runs_in_one_directory_exclude_each_other(bench: Bench) -> None:
    RunDir.create(bench.run.path)
    with bench.run.lock(), pytest.raises(RunDirError, match="is writing this run"):
        bench()


def test_the_same_run_directory_with_another_seed(bench: Bench) -> None:
    bench()
    assert bench("seed=1") == list(CHAIN)
