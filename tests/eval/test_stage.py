"""The eval stage and the comparison of runs, on real checkpoints with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tafkir.errors import CheckpointError, DataError, RecipeError, RunDirError
from tafkir.eval.compare import Comparison, compare_sides
from tafkir.eval.metrics import paired_difference
from tafkir.eval.pooling import pool_runs
from tafkir.eval.records import load_records, write_records
from tafkir.eval.sides import load_sides
from tafkir.eval.stage import run_eval
from tafkir.eval.summary import problem_scores
from tafkir.recipe.stage import StageContext
from tafkir.runlog.rundir import RunDir

Context = Callable[..., StageContext]


def _evaluate(ctx: StageContext) -> RunDir:
    ctx.stage.make()
    ctx.stage.write_result({"finished": True, **run_eval(ctx)})
    return ctx.run


def test_the_result_is_whole_and_fits_json(eval_context: Context) -> None:
    ctx = eval_context()
    result = json.loads(json.dumps(run_eval(ctx), allow_nan=False))
    assert list(result["stages"]) == ["sft", "rlvr"]
    assert result["num_problems"] == 5 and result["sources"] == {"own": 5}
    assert set(result["baselines"]) == {"best_operator", "sum_of_numbers"}
    # Every answer is the difference of the two numbers, which one operator gets right.
    assert result["baselines"]["best_operator"]["all"]["value"] == 1.0
    assert result["baselines"]["sum_of_numbers"]["all"]["value"] == 0.0
    pairs = {(row["before"], row["after"], row["metric"]) for row in result["differences"]}
    assert ("sft", "rlvr", "average") in pairs and ("sum_of_numbers", "rlvr", "greedy") in pairs
    assert result["contamination"]["removed"] == 0 and result["contamination"]["num_train"] == 30
    assert result["contamination"]["counts"]["own"]["test"] == 10
    assert result["tokens"] > 0 and result["wall_s"] > 0 and result["cpu_s"] > 0 and result["peak_rss_bytes"] > 1e6
    for name in result["records"].values():
        assert len(load_records(ctx.run.path / name)) == 15


def test_a_second_evaluation_takes_what_is_there(eval_context: Context) -> None:
    ctx = eval_context()
    first = run_eval(ctx)
    files = {path.name: path.read_bytes() for path in ctx.run.eval_dir.iterdir()}

    def refuse(checkpoint: Path) -> object:
        class Refuses:
            def complete(self, requests: object) -> object:
                raise AssertionError("asked again")

        return Refuses()

    second = run_eval(eval_context(build_completer=refuse))
    clock = ("wall_s", "cpu_s", "peak_rss_bytes")
    assert {k: v for k, v in first.items() if k not in clock} == {k: v for k, v in second.items() if k not in clock}
    assert files == {path.name: path.read_bytes() for path in ctx.run.eval_dir.iterdir()}


def test_new_weights_are_asked_anew(eval_context: Context) -> None:
    ctx = eval_context()
    run_eval(ctx)
    sft, rlvr = (ctx.run.stage(kind).checkpoint_dir for kind in ("sft", "rlvr"))
    old = load_records(ctx.run.eval_dir / "wordmath-sft.jsonl")
    shutil.rmtree(sft)
    shutil.copytree(rlvr, sft)
    run_eval(ctx)
    new = load_records(ctx.run.eval_dir / "wordmath-sft.jsonl")
    assert not {r.key for r in old} & {r.key for r in new}
    assert [r.text for r in new] == [r.text for r in load_records(ctx.run.eval_dir / "wordmath-rlvr.jsonl")]


def test_stages_that_the_recipe_lacks_are_not_scored(eval_context: Context) -> None:
    ctx = eval_context(edit=lambda text: text.replace("[rlvr]\n", ""))
    assert list(run_eval(ctx)["stages"]) == ["sft"]


def test_without_a_training_stage_the_base_is_scored(eval_context: Context) -> None:
    ctx = eval_context(edit=lambda text: text.replace("[rlvr]\n", "").replace("[sft]\n", ""))
    assert list(run_eval(ctx)["stages"]) == ["base"]


def test_nothing_to_score_is_an_error(eval_context: Context) -> None:
    def only_pretrain(text: str) -> str:
        return text.replace("[rlvr]\n", "").replace("[sft]\n", "[pretrain]\n")

    with pytest.raises(RecipeError, match="none of these stages is in the recipe"):
        run_eval(eval_context(edit=only_pretrain))


def test_a_missing_checkpoint_is_named(eval_context: Context) -> None:
    ctx = eval_context()
    shutil.rmtree(ctx.run.stage("rlvr").checkpoint_dir)
    with pytest.raises(CheckpointError, match=r"stage rlvr has no checkpoint.*--from rlvr"):
        run_eval(ctx)


def test_an_empty_part_is_named(eval_context: Context) -> None:
    with pytest.raises(DataError, match=r'no problem is in the validation part.*expected rows with split "validation"'):
        run_eval(eval_context(edit=lambda text: text + 'split = "validation"\n'))


# ---- compare -----------------------------------------------------------------------------------------------------


def _improve(run: RunDir, stage: str, ids: set[str]) -> None:
    """Make a stage's answers to some problems correct, as a better checkpoint would."""
    from dataclasses import replace

    path = run.eval_dir / f"wordmath-{stage}.jsonl"
    records = load_records(path)
    write_records(path, [replace(r, outcome="correct") if r.example_id in ids else r for r in records])


def _compare(*runs: Path, stage: str | None = None) -> Comparison:
    return compare_sides(load_sides(runs), tasks=[stage] if stage else None)


def test_two_runs_compare_problem_by_problem(eval_context: Context) -> None:
    a, b = _evaluate(eval_context("a")), _evaluate(eval_context("b"))
    ids = sorted({r.example_id for r in load_records(a.eval_dir / "wordmath-rlvr.jsonl")})
    _improve(b, "rlvr", set(ids[:4]))
    comparison = _compare(a.path, b.path)
    rows = {row["task"]: row for row in comparison.pairs[0]["tasks"]}
    assert list(rows) == ["sft, greedy", "sft, sampled", "rlvr, greedy", "rlvr, sampled"]
    same = rows["sft, sampled"]["judgement"]
    assert same["difference"]["value"] == 0 and same["verdict"] == "undecided"
    better = rows["rlvr, sampled"]
    sides = [problem_scores(load_records(run.eval_dir / "wordmath-rlvr.jsonl"), "average") for run in (a, b)]
    assert better["judgement"]["difference"]["value"] == pytest.approx(paired_difference(*sides).value)
    assert better["gained"] == 4 and better["judgement"]["verdict"] == "better"
    assert comparison.notes == []
    assert json.dumps(comparison.to_dict(), allow_nan=False)
    assert any(line.startswith("rlvr, sampled") and "better" in line for line in comparison.lines())
    only = _compare(a.path, b.path, stage="rlvr").pairs[0]["tasks"]
    assert [row["task"] for row in only] == ["rlvr, greedy", "rlvr, sampled"]


def test_other_settings_are_noted(eval_context: Context) -> None:
    a = _evaluate(eval_context("a"))
    b = _evaluate(eval_context("b", edit=lambda text: text.replace("max_tokens = 12", "max_tokens = 14")))
    assert _compare(a.path, b.path).notes == ["max_tokens differs: 12 against 14."]


def test_runs_that_cannot_be_compared_are_one_line(eval_context: Context) -> None:
    a = _evaluate(eval_context("a"))
    unfinished = eval_context("b").run
    with pytest.raises(RunDirError, match=r"no finished evaluation.*--only eval"):
        _compare(a.path, unfinished.path)
    with pytest.raises(RunDirError, match="no such run directory"):
        _compare(a.path, a.path / "nowhere")
    with pytest.raises(DataError, match="the same model is given twice"):
        _compare(a.path, a.path)
    fewer = _evaluate(eval_context("c", edit=lambda text: text.replace("max_problems = 5", "max_problems = 3")))
    with pytest.raises(DataError, match=r"2 items were answered on one side only.*--common"):
        _compare(a.path, fewer.path)
    with pytest.raises(RunDirError, match="no evaluated task in common named pretrain"):
        _compare(a.path, fewer.path, stage="pretrain")


def test_seeds_pool(eval_context: Context) -> None:
    runs = [_evaluate(eval_context(f"s{seed}", seed=seed)) for seed in range(3)]
    ids = sorted({r.example_id for r in load_records(runs[0].eval_dir / "wordmath-rlvr.jsonl")})
    for run, count in zip(runs, (2, 3, 4), strict=True):
        _improve(run, "rlvr", set(ids[:count]))
    pooled = pool_runs([run.path for run in runs])
    difference = pooled.differences["greedy", "all"]
    assert len(difference.by_run) == 3
    assert difference.pooled.value == pytest.approx(sum(difference.by_run) / 3)
    assert difference.across_runs is not None and difference.pooled.num_problems == 5
    assert any("by run:" in line and "[seeds]" in line for line in pooled.lines())
    assert json.dumps(pooled.to_dict(), allow_nan=False)


def test_pooling_needs_both_stages(eval_context: Context) -> None:
    run = _evaluate(eval_context())
    with pytest.raises(RunDirError, match="stage pretrain was not evaluated"):
        pool_runs([run.path], before="pretrain")
    with pytest.raises(RunDirError, match="no run to pool"):
        pool_runs([])
