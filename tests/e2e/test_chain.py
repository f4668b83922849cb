"""The whole chain once through: what a run directory holds, and that a step is the same however it is cut up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tafkir.data.sources import read_source
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.records import STAGES
from tests.e2e.conftest import Tafkir, copy_of, listing

# The stages of the smoke recipe by the numbers of their folders.
NOT_THERE = ("reward", "dpo", "rlhf", "qat", "mtp", "quantize", "lab", "trm")
NUMBERED = [(number, kind) for number, kind in enumerate(STAGES, start=1) if kind not in NOT_THERE]
TRAINED = {"02-pretrain": 6, "03-sft": 6, "06-rlvr": 3}
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = [
    "config.json",
    "configuration_bailing_moe_v2.py",
    "generation_config.json",
    "model.safetensors",
    "tafkir.json",
]


@pytest.fixture(scope="module")
def smoke(tafkir: Tafkir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe once through, on the problems that ship with the package."""
    place = tmp_path_factory.mktemp("smoke")
    done = tafkir("run", "smoke", cwd=place)
    assert done.code == 0, done.err
    return place / "runs" / "smoke"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result_of(run: Path, stage: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "stages" / stage / "result.json").read_text())
    return result


def test_the_run_directory_is_laid_out_as_designed(smoke: Path) -> None:
    wanted = [".lock", "recipe.resolved.toml", "env.json", "log.jsonl", "report.html", "report.md", "stages", "eval"]
    wanted += ["eval/wordmath-sft.jsonl", "eval/wordmath-rlvr.jsonl"]
    for number, kind in NUMBERED:
        stage = f"stages/{number:02d}-{kind}"
        wanted += [stage, f"{stage}/inputs.json", f"{stage}/result.json"]
        if kind not in ("eval", "report"):
            files = TOKENIZER if kind == "tokenizer" else TOKENIZER + WEIGHTS
            wanted += [f"{stage}/checkpoint", *(f"{stage}/checkpoint/{name}" for name in files)]
    for stage, steps in TRAINED.items():
        wanted += [f"stages/{stage}/{name}" for name in ("metrics.jsonl", "timings.jsonl", "state")]
        wanted += [f"stages/{stage}/state/step-{steps:08d}.safetensors"]
    rollouts = "stages/06-rlvr/rollouts"
    wanted += [rollouts, *(f"{rollouts}/step-{step:08d}.jsonl.gz" for step in range(1, TRAINED["06-rlvr"] + 1))]
    assert listing(smoke) == sorted(wanted)


def test_the_saved_recipe_is_the_run(smoke: Path, tafkir: Tafkir) -> None:
    saved = load_recipe([smoke / "recipe.resolved.toml"]).recipe
    assert saved == resolve_recipe(load_recipe(["smoke"])).recipe
    done = tafkir("run", smoke / "recipe.resolved.toml", "--json", cwd=smoke.parents[1])
    assert done.code == 0 and done.err.count("already finished") == len(NUMBERED)
    told = json.loads(done.out)
    assert told["run"] == "runs/smoke"
    assert told["stages"] == {kind: result_of(smoke, f"{i:02d}-{kind}") for i, kind in NUMBERED}


def test_the_log_and_the_environment_say_what_happened_where(smoke: Path) -> None:
    messages = [row["message"] for row in rows_of(smoke / "log.jsonl") if row["level"] == "INFO"]
    for _, kind in NUMBERED:
        assert f"{kind}: starts" in messages
        assert any(message.startswith(f"{kind}: finished in ") for message in messages)
    env = json.loads((smoke / "env.json").read_text())
    assert env["command"][1:] == ["run", "smoke"]
    assert all(env[key] for key in ("tafkir", "python", "torch", "tokenizers", "cpu", "cores_logical", "memory_bytes"))


def test_every_result_says_what_the_stage_did(smoke: Path) -> None:
    results = {stage.name: result_of(smoke, stage.name) for stage in (smoke / "stages").iterdir()}
    for name, result in results.items():
        assert result["stage"] == name[3:] and result["finished"] is True
        inputs = json.loads((smoke / "stages" / name / "inputs.json").read_text())
        assert result["fingerprint"] == inputs["fingerprint"] and len(result["fingerprint"]) == 64
    assert len({result["fingerprint"] for result in results.values()}) == len(NUMBERED)
    assert results["01-tokenizer"]["vocab_size"] == 512
    for stage, steps in TRAINED.items():
        result = results[stage]
        assert result["steps"] == steps and result["tokens"] > 0
        assert result["cpu_s"] > 0 and result["wall_s"] > 0 and 50 << 20 < result["peak_rss_bytes"] < 3 << 30
        assert result["train_problems"] == {"svamp": {"train": 600, "validation": 100, "test": 300}}
        if stage != "06-rlvr":
            assert result["tokens"] == sum(
                row["train/tokens"] for row in rows_of(smoke / f"stages/{stage}/metrics.jsonl")
            )


def test_metrics_have_a_row_for_every_step_and_nothing_of_the_clock(smoke: Path) -> None:
    for stage, steps in TRAINED.items():
        rows = rows_of(smoke / "stages" / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert not any(name.startswith(("time/", "memory/")) for row in rows for name in row)
        timings = rows_of(smoke / "stages" / stage / "timings.jsonl")
        assert [row["step"] for row in timings] == list(range(1, steps + 1))
        assert all(row["time/step_s"] > 0 and row["memory/peak_rss_bytes"] > 0 for row in timings)
    first, *_, last = rows_of(smoke / "stages" / "02-pretrain" / "metrics.jsonl")
    assert abs(first["train/loss"] - math.log(512)) < 0.1, "fresh weights guess every token alike"
    assert last["train/loss"] < first["train/loss"] and "validation/loss" in last
    assert sum(first["router/load/0"]) == pytest.approx(1, abs=1e-4)


def test_each_checkpoint_knows_where_it_comes_from(smoke: Path) -> None:
    for stage, steps in TRAINED.items():
        folder = smoke / "stages" / stage / "checkpoint"
        manifest = json.loads((folder / "tafkir.json").read_text())
        assert manifest["lineage"] == {"recipe": "smoke", "stage": stage[3:], "steps": steps, "seed": 0}
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == manifest["tensors"].keys()
        biases = {name for name in tensors if name.endswith("expert_bias")}
        assert manifest["num_parameters"] == sum(tensors[name].size for name in tensors.keys() - biases)


def test_the_evaluation_asked_held_out_problems_only(smoke: Path) -> None:
    problems, _ = read_source("svamp")
    test_part = [problem for problem in problems if problem.split == "test"]
    for name in ("sft", "rlvr"):
        rows = rows_of(smoke / "eval" / f"wordmath-{name}.jsonl")
        assert [(row["example_id"], row["repeat"]) for row in rows] == [
            (problem.id, repeat) for problem in test_part[:8] for repeat in range(3)
        ]
        assert {row["expected"] for row in rows} == {problem.answer for problem in test_part[:8]}
    result = result_of(smoke, "11-eval")
    assert list(result["stages"]) == ["sft", "rlvr"]
    assert set(result["baselines"]) == {"best_operator", "sum_of_numbers"}
    assert result["contamination"]["remaining"] == 0
    assert result["contamination"]["num_train"] + result["contamination"]["removed"] == 600


def test_the_report_names_every_stage_and_what_kept_the_test_apart(smoke: Path) -> None:
    page, text = (smoke / "report.html").read_text(), (smoke / "report.md").read_text()
    for name in ("Tokenizer", "Pre-training", "SFT", "RLVR", "Evaluation"):
        assert name in page and f"\n| {name} | finished |" in text
    for written in (page, text):
        assert "400 held-out problems was looked up in the 600 training problems" in written
        assert "A second pass over the 600 that remain finds none." in written
        assert "95 %" in written
    assert result_of(smoke, "14-report")["notes"] == []
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


# ---- a step, however it is cut up --------------------------------------------------------------------------------


def first_step(run: Path, stage: str) -> dict[str, Any]:
    return rows_of(run / "stages" / stage / "metrics.jsonl")[0]


@pytest.mark.parametrize("pieces", [3, 8])
def test_a_pretraining_step_is_the_same_in_one_piece_and_in_many(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path, pieces: int
) -> None:
    settings = [f"pretrain.micro_batches={pieces}", "pretrain.steps=1", "sft=", "rlvr=", "eval=", "report="]
    done = tafkir(*tiny, *(word for setting in settings for word in ("--set", setting)), cwd=tmp_path)
    assert done.code == 0, done.err
    whole, cut = first_step(reference, "02-pretrain"), first_step(tmp_path / "runs" / "tiny", "02-pretrain")
    assert cut["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-6)
    assert cut["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-5)
    assert cut["train/tokens"] == whole["train/tokens"] and cut["router/load/0"] == whole["router/load/0"]


def test_a_reinforcement_step_is_the_same_in_one_piece_and_in_many(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    seen = []
    for pieces in (1, 4):
        settings = [f"rlvr.micro_batches={pieces}", "rlvr.steps=1", "rlvr.updates_per_rollout=1"]
        words = (word for setting in settings for word in ("--set", setting))
        done = tafkir(*tiny, "--only", "rlvr", *words, cwd=tmp_path)
        assert done.code == 0, done.err
        seen.append(first_step(run, "06-rlvr"))
    whole, cut = seen
    assert whole["train/grad_norm"] > 1e-3
    assert cut["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-5)
    assert cut["train/loss"] == pytest.approx(whole["train/loss"], abs=1e-6)
    for name in whole:
        if name.startswith(("rollout/", "router/")):
            assert cut[name] == pytest.approx(whole[name], abs=1e-9), name
