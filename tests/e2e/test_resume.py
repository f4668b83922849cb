"""Runs that are killed with SIGKILL and started again end, bit for bit, like a run that nobody disturbed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.e2e.conftest import Tafkir, copy_of, differing, listing, outcome

# What a run leaves is the same however often it was killed, but for these.
TIMES = {"wall_s", "cpu_s", "peak_rss_bytes", "html_bytes", "markdown_bytes"}

# Written by every command, whatever it finds.
TOUCHED = {"log.jsonl", "recipe.resolved.toml", ".lock"}

# Where a run is killed, one after the other: the audit event, its path, which one of those, and how much later.
KILLS = {
    "in the tokenizer, before its result": ("os.rename", r"01-tokenizer/result\.json", 1, 0.0),
    "in pretrain, between a metrics row and the state": ("os.rename", r"02-pretrain/state/step-00000005", 1, 0.0),
    "in pretrain, with the old state and the new one there": ("os.remove", r"02-pretrain/state/step-00000005", 1, 0.0),
    "in pretrain, its checkpoint written but not in place": ("os.rename", r"02-pretrain/checkpoint$", 1, 0.0),
    "in pretrain, between its checkpoint and its result": ("os.rename", r"02-pretrain/result\.json", 1, 0.0),
    "in sft, with the old state and the new one there": ("os.remove", r"03-sft/state/step-00000008", 1, 0.0),
    "in sft, while its checkpoint is being written": ("open", r"03-sft/\.checkpoint\.tmp/config\.json", 1, 0.0),
    "in rlvr, in the middle of the first step": ("open", r"06-rlvr/timings\.jsonl", 1, 0.02),
    "in rlvr, in the middle of a later step": ("os.rename", r"06-rlvr/state/step-00000002", 1, 0.02),
    "in rlvr, while it resumes": ("os.rename", r"06-rlvr/timings\.jsonl", 1, 0.0),
    "in eval, between two checkpoints": ("open", r"eval/wordmath-sft\.jsonl", 1, 0.0),
    "in eval, before its result": ("os.rename", r"11-eval/result\.json", 1, 0.0),
    "in the report, between its two files": ("os.rename", r"report\.md", 1, 0.0),
}


def whole(run: Path) -> None:
    """What can be seen of a run after a kill is complete: no file under its final name is half of one."""
    for path in run.glob("stages/*/result.json"):
        assert json.loads(path.read_text())["finished"] is True
    for folder in run.glob("stages/*/checkpoint"):
        if not folder.parent.name.endswith("tokenizer"):
            assert {"config.json", "model.safetensors", "tafkir.json", "tokenizer.json"} <= set(listing(folder))
    for path in run.glob("stages/*/state/step-*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        tensors = json.loads(path.read_bytes()[8 : 8 + header])
        end = max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
        assert path.stat().st_size == 8 + header + end


def results(run: Path) -> dict[str, object]:
    """The stages' results, without what depends on the clock."""
    return {path.parent.name: read_result(path) for path in run.glob("stages/??-*/result.json")}


def read_result(path: Path) -> dict[str, object]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES}


def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    for moment, (event, path, count, after_s) in KILLS.items():
        done = tafkir(*tiny, cwd=tmp_path, kill={"event": event, "path": path, "count": count, "after_s": after_s})
        assert done.code == -9, f"{moment}: the process was not killed\n{done.err}"
        stage = re.search(r"in (?:the )?(\w+)", moment)
        assert stage and f"{stage[1]}: finished" not in done.err, moment
        whole(run)
    done = tafkir(*tiny, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("already finished") == 5
    assert differing(outcome(run), outcome(reference)) == []
    assert results(run) == results(reference)
    assert listing(run) == listing(reference)


@pytest.mark.slow
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(
    cli: Cli, tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    done = cli(*tiny)
    assert done.returncode == 0, done.stderr
    again = outcome(tmp_path / "runs" / "tiny")
    assert differing(again, outcome(reference)) == []
    assert sum(name.endswith("model.safetensors") for name in again) == 3
    assert sum(name.endswith("metrics.jsonl") for name in again) == 3
    assert sum(name.startswith("eval/") for name in again) == 3
    assert tafkir(*tiny, "--set", "seed=1", "--name", "other", cwd=tmp_path).code == 0
    same = again.keys() - set(differing(again, outcome(tmp_path / "runs" / "other")))
    assert all("checkpoint/" in name and not name.endswith(("model.safetensors", "tafkir.json")) for name in same)


def test_every_stage_of_the_reference_learns_something(reference: Path) -> None:
    """Else equal bits would prove nothing about optimisers and rollouts."""
    for stage in ("02-pretrain", "03-sft", "06-rlvr"):
        rows = [json.loads(line) for line in (reference / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
        assert sum(row.get("train/grad_norm", 0.0) > 1e-3 for row in rows) > len(rows) / 2
    assert len({row["rollout/reward_mean"] for row in rows}) > 1
    before, after = (reference / "stages" / stage / "checkpoint/model.safetensors" for stage in ("03-sft", "06-rlvr"))
    assert before.read_bytes() != after.read_bytes()


def test_a_finished_run_is_left_alone_and_a_setting_redoes_what_depends_on_it(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name not in TOUCHED}
    done = tafkir(*tiny, cwd=tmp_path)
    assert done.code == 0 and done.err.count("already finished") == 6 and "starts" not in done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert listing(run) == listing(reference)

    done = tafkir(*tiny, "--set", "rlvr.learning_rate=5e-4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("already finished") == 3
    assert done.err.count("its inputs changed") == 3
    assert set(differing(outcome(run), outcome(reference))) == {
        "recipe.resolved.toml",
        "stages/06-rlvr/metrics.jsonl",
        "stages/06-rlvr/checkpoint/model.safetensors",
        "stages/06-rlvr/checkpoint/tafkir.json",
        "eval/wordmath-rlvr.jsonl",
    }
    old = run / "stages" / "06-rlvr.old-1" / "checkpoint" / "model.safetensors"
    assert old.read_bytes() == (reference / "stages/06-rlvr/checkpoint/model.safetensors").read_bytes()


def test_only_does_one_stage_again_and_from_all_later_ones(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    done = tafkir(*tiny, "--only", "rlvr", cwd=tmp_path)
    assert done.code == 0 and re.findall(r"(\w+): starts", done.err) == ["rlvr"]
    assert "rlvr: asked for again" in done.err
    done = tafkir(*tiny, "--from", "sft", cwd=tmp_path)
    assert done.code == 0 and re.findall(r"(\w+): starts", done.err) == ["sft", "rlvr", "eval", "report"]
    assert differing(outcome(run), outcome(reference)) == []
    assert sorted(path.name for path in run.glob("stages/*.old-*")) == [
        "03-sft.old-1",
        "06-rlvr.old-1",
        "06-rlvr.old-2",
        "11-eval.old-1",
        "14-report.old-1",
    ]
    refused = tafkir(*tiny, "--only", "rlvr", "--set", "sft.steps=9", cwd=tmp_path)
    assert refused.code == 1 and "stage sft is not finished with these settings" in refused.error
    assert differing(outcome(run), outcome(reference)) == []
