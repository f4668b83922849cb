"""A realistic run directory, made of numbers instead of training: what a report is tried on."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tafkir.eval.metrics import accuracy
from tafkir.eval.records import EvalRecord, write_records
from tafkir.eval.summary import difference_table, score_table, sources_of
from tafkir.recipe.load import load_recipe
from tafkir.recipe.stage import StageContext
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.rundir import RunDir

MakeRun = Callable[..., RunDir]

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ARABIC = "لدى سلمى ٤٨ تفاحة، أعطت نصفها لأختها ثم اشترت ٦ تفاحات. كم تفاحة لديها الآن؟"

RECIPE = """\
name = "wordmath-tiny"
description = "Demo: base-tiny, then chains of thought and reinforcement learning; about 15 minutes on two cores"
seed = 0
threads = 2
base = "base-tiny"

[model]
vocab_size = 2048
hidden_size = 128
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
intermediate_size = 256
moe_intermediate_size = 64
num_experts = 32
num_experts_per_tok = 2

[data]
sources = ["gsm8k", "svamp"]

[pretrain]
steps = 400
learning_rate = 5e-4
max_grad_norm = 1.0

[sft]
steps = 300
learning_rate = 5e-4
max_grad_norm = 1.0

[rlvr]
steps = 60
learning_rate = 1e-4
max_grad_norm = 1.0

[eval]
samples = 4

[report]
sample_chains = 10
"""
ENVIRONMENT = {
    "tafkir": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "tokenizers": "0.22.1",
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "cpu": "Example CPU @ 2.60GHz",
    "cores_logical": 2,
    "cores_physical": 2,
    "memory_bytes": 24_900_000_000,
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "command": ["tafkir", "run", "recipes/wordmath-tiny.toml"],
}
NAMES = ("Mia", "Omar", "Lena", "Yusuf", "Ada", "Tariq", "Nora", "Sam")
THINGS = ("pencils", "apples", "stickers", "coins", "cards", "shells")


def _shares(generator: random.Random, size: int, spread: float) -> list[float]:
    raw = [math.exp(generator.gauss(0, spread)) for _ in range(size)]
    return [round(value / sum(raw), 6) for value in raw]


def _router(generator: random.Random, spread: float) -> dict[str, Any]:
    loads = {f"router/load/{layer}": _shares(generator, 32, spread * (1 + layer / 3)) for layer in range(3)}
    entropy = sum(-sum(p * math.log(p) for p in load) / math.log(32) for load in loads.values()) / 3
    return {"router/load_entropy": entropy, "router/load_max": max(32 * max(load) for load in loads.values()), **loads}


def _language_rows(steps: int, start: float, end: float, seed: int) -> tuple[list[Any], list[Any]]:
    generator = random.Random(seed)
    metrics, timings = [], []
    for step in range(10, steps + 1, 5):
        level = end + (start - end) * math.exp(-4 * step / steps)
        row: dict[str, Any] = {
            "train/loss": level * math.exp(generator.gauss(0, 0.02)),
            "train/grad_norm": 0.5 * math.exp(generator.gauss(0, 0.25)) + 2.5 * math.exp(-step / 15),
            "train/learning_rate": 5e-4 * min(1, step / 50),
            "train/tokens": 5000,
            **_router(generator, 0.9 * math.exp(-2 * step / steps) + 0.15),
        }
        if step % 50 == 0:
            row["validation/loss"] = level * 1.05 + 0.02
        metrics.append((step, row))
        timings.append((step, _times(generator, step, 0.41, 14_200)))
    return metrics, timings


def _times(generator: random.Random, step: int, seconds: float, rate: float) -> dict[str, Any]:
    jitter = math.exp(generator.gauss(0, 0.05))
    return {
        "time/step_s": seconds * jitter,
        "time/cpu_s": 2 * seconds * jitter,
        "time/tokens_per_s": rate / jitter,
        "memory/peak_rss_bytes": 1.1e9 + 2e8 * (1 - math.exp(-step / 40)),
    }


def _rlvr_rows(steps: int, rise: float) -> tuple[list[Any], list[Any]]:
    generator = random.Random(5)
    metrics, timings = [], []
    for step in range(1, steps + 1):
        share = 0.36 + rise * (1 - math.exp(-2.2 * step / steps)) + generator.gauss(0, 0.022)
        mean = 2.4e-7 * math.exp(generator.gauss(0, 0.2))
        row = {
            "rollout/reward_mean": share,
            "rollout/accuracy": share,
            "rollout/length_mean": 33 + 2 * math.sin(step / 9) + generator.gauss(0, 0.6),
            "rollout/truncated": max(0.0, 0.03 * math.exp(-step / 20) + generator.gauss(0, 0.003)),
            "rollout/unanswered": max(0.0, 0.05 * math.exp(-step / 20) + generator.gauss(0, 0.004)),
            "rollout/zero_variance_groups": min(1.0, 0.33 + 0.1 * step / steps + generator.gauss(0, 0.04)),
            "train/loss": generator.gauss(0, 0.01),
            "train/grad_norm": 0.4 * math.exp(generator.gauss(0, 0.2)),
            "train/learning_rate": 1e-4,
            "train/entropy": 0.31 - 0.11 * step / steps + generator.gauss(0, 0.008),
            "mismatch/abs_logprob_diff_mean": mean,
            "mismatch/abs_logprob_diff_max": mean * 60 * math.exp(generator.gauss(0, 0.4)),
            "mismatch/masked_fraction": 0.0,
            "mismatch/masked_sequences": 0.0,
            "mismatch/kl": 1e-13,
            "mismatch/ess": 1.0,
            **_router(generator, 0.2),
        }
        metrics.append((step, row))
        timings.append((step, {**_times(generator, step, 3.4, 5200), "time/rollout_s": 1.7}))
    return metrics, timings


def _answer(generator: random.Random, index: int, skill: float, repeat: int, problem: dict[str, Any]) -> EvalRecord:
    a, b, c = problem["numbers"]
    roll = generator.random()
    right = a - b + c
    if roll < skill:
        text = f"<think>\n{a}-{b}={a - b}\n{a - b}+{c}={right}\n</think>\n\\boxed{{{right}}}"
        outcome, given, reason, finish = "correct", str(right), "", "stop"
    elif roll < 0.92:
        wrong = right + generator.randint(1, 9)
        text = f"<think>\n{a}-{b}={a - b}\n{a - b}+{c}={wrong}\n</think>\n\\boxed{{{wrong}}}"
        outcome, given, reason, finish = "wrong", str(wrong), f"answered {wrong}", "stop"
    elif roll < 0.97:
        text = "<think>\n" + "\n".join(f"{a}+{i}={a + i}" for i in range(8))
        outcome, given, reason, finish = "length", None, "the length limit cut the answer off", "length"
    else:
        text = f"<think>\n{HOSTILE}\n</think>\nI do not know"
        outcome, given, reason, finish = "no_answer", None, "no \\boxed{} and no closing number", "stop"
    return EvalRecord(
        key=f"{index:06d}{repeat:02d}",
        example_id=problem["id"],
        source=problem["source"],
        repeat=repeat,
        question=problem["question"],
        text=text,
        outcome=outcome,  # type: ignore[arg-type]
        reward=float(outcome == "correct"),
        extracted=given,
        expected=str(right),
        reason=reason,
        tokens=len(text) // 2,
        finish_reason=finish,  # type: ignore[arg-type]
    )


def _problems(count: int) -> list[dict[str, Any]]:
    generator = random.Random(9)
    problems = []
    for i in range(count):
        source = "gsm8k" if i % 3 else "svamp"
        a, b, c = generator.randint(20, 90), generator.randint(2, 19), generator.randint(2, 40)
        name, thing = generator.choice(NAMES), generator.choice(THINGS)
        question = (
            f"{name} has {a} {thing}. {name} gives {b} of them to a friend and then finds {c} more in a box under "
            f"the bed. How many {thing} does {name} have now?"
        )
        if i % 5 == 1:
            question = ARABIC
        if i % 17 == 2:
            question = f"{HOSTILE} How many are left of {a}, less {b}, plus {c}?"
        problems.append(
            {
                "id": f"{source}/test/{i}",
                "source": source,
                "question": question,
                "numbers": (a, b, c),
                "ease": generator.betavariate(1.2, 1.4) if source == "svamp" else generator.betavariate(0.7, 1.9),
            }
        )
    return problems


def _write_eval(run: RunDir, gain: float, stages: tuple[str, ...]) -> dict[str, Any]:
    generator = random.Random(4)
    problems = _problems(300)
    answers: dict[str, list[EvalRecord]] = {}
    for kind in stages:
        lift = gain if kind == "rlvr" else -0.15 if kind == "pretrain" else 0.0
        answers[kind] = [
            _answer(generator, i, min(0.97, max(0.0, problem["ease"] + lift)), repeat, problem)
            for i, problem in enumerate(problems)
            for repeat in range(5)
        ]
        write_records(run.eval_dir / f"word_problems-{kind}.jsonl", answers[kind])
    last = answers[stages[-1]]
    baselines = {}
    for name, chance in (("best_operator", 0.17), ("sum_of_numbers", 0.06)):
        hits = {problem["id"]: generator.random() < chance for problem in problems}
        baselines[name] = {
            source: accuracy([hits[p["id"]] for p in problems if source in ("all", p["source"])]).to_dict()
            for source in ("all", *sources_of(last))
        }
    differences = []
    for before, after in pairwise(stages):
        differences += difference_table(answers[before], answers[after], (before, after))
    return {
        "task": "word_problems",
        "split": "test",
        "samples": 4,
        "temperature": 1.0,
        "max_tokens": 128,
        "num_problems": len(problems),
        "sources": sources_of(last),
        "stages": {kind: score_table(rows) for kind, rows in answers.items()},
        "baselines": baselines,
        "differences": differences,
        "records": {kind: f"eval/word_problems-{kind}.jsonl" for kind in stages},
        "contamination": {
            "ngram": 13,
            "num_train": 6894,
            "num_heldout": 1660,
            "removed": 2,
            "remaining": 0,
            "removed_examples": [
                {"train_id": "gsm8k/train/17", "heldout_id": "gsm8k/test/88", "text": "a box holds 0 rows of 0"},
                {"train_id": "svamp/train/3", "heldout_id": "svamp/test/9", "text": HOSTILE},
            ],
            "counts": {
                "gsm8k": {"train": 6394, "validation": 500, "test": 660},
                "svamp": {"train": 500, "validation": 200, "test": 300},
            },
        },
    }


def _write_stage(run: RunDir, kind: str, metrics: list[Any], timings: list[Any], result: dict[str, Any]) -> None:
    stage = run.stage(kind)  # type: ignore[arg-type]
    stage.make()
    for path, rows in ((stage.metrics_path, metrics), (stage.timings_path, timings)):
        if rows:
            with JsonlWriter(path) as writer:
                for step, row in rows:
                    writer.write(step, row)
    stage.write_result({"stage": kind, "finished": True, "fingerprint": "ab" * 32, **result})


def make_run(
    path: Path, *, gain: float = 0.08, stages: tuple[str, ...] = ("pretrain", "sft", "rlvr"), evaluate: bool = True
) -> RunDir:
    """Write a finished run; `gain` is what RLVR adds to the chance of a right answer."""
    run = RunDir.create(path)
    run.recipe_path.write_text(RECIPE, encoding="utf-8")
    run.env_path.write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    cost = {"cpu_s": 300.0, "peak_rss_bytes": 1_290_000_000}
    if "pretrain" in stages:
        rows = _language_rows(400, 6.9, 1.9, 1)
        _write_stage(run, "pretrain", *rows, {"wall_s": 171.2, "tokens": 2_211_840, "steps": 400, **cost})
    if "sft" in stages:
        rows = _language_rows(300, 1.6, 0.42, 2)
        _write_stage(run, "sft", *rows, {"wall_s": 132.9, "tokens": 1_658_880, "steps": 300, **cost})
    if "rlvr" in stages:
        rows = _rlvr_rows(60, 2 * gain)
        _write_stage(run, "rlvr", *rows, {"wall_s": 204.6, "tokens": 1_060_000, "steps": 60, **cost})
    if evaluate:
        kinds = tuple(kind for kind in ("sft", "rlvr") if kind in stages)
        result = _write_eval(run, gain, kinds)
        _write_stage(run, "eval", [], [], {**result, "wall_s": 88.0, "tokens": 120_000, **cost})
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run that no test changes."""
    return make_run(tmp_path_factory.mktemp("runs") / "wordmath-tiny")


@pytest.fixture(name="make_run")
def make_run_fixture(tmp_path: Path, finished_run: RunDir) -> MakeRun:
    """`make_run(gain=..., stages=..., evaluate=...)` in a fresh directory that the test may change."""

    def build(**options: Any) -> RunDir:
        path = tmp_path / "wordmath-tiny"
        if options:
            return make_run(path, **options)
        shutil.copytree(finished_run.path, path)
        return RunDir.open(path)

    return build


@pytest.fixture(scope="session")
def hostile() -> str:
    """What a model may write to run code in the reader's browser; some chains and questions hold it."""
    return HOSTILE


@pytest.fixture(scope="session")
def arabic() -> str:
    """An Arabic question; every fifth problem asks it."""
    return ARABIC


@pytest.fixture(scope="session")
def context_of() -> Callable[[RunDir], StageContext]:
    """Makes the context in which the pipeline calls the report stage."""

    def build(run: RunDir) -> StageContext:
        recipe = load_recipe([run.recipe_path]).recipe
        return StageContext(recipe, run, run.stage("report"), None, recipe.seed)

    return build
