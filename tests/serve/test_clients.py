"""Other people's clients against a live server: those that TAFKIR_CLIENTS (folders of programs, as in PATH) has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.attention import VarlenCausal
from tafkir.recipe.bundled import find_checkpoint
from tafkir.serve.app import build_app
from tests.serve.conftest import Server, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TAFKIR_CLIENTS" not in os.environ, reason="TAFKIR_CLIENTS names no folders of clients"),
]

ITEMS = [(3, 5), (7, 2), (12, 9), (4, 4)]
CHOICE = """task: apples
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
INSPECT = """from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def apples():
    samples = [Sample(input=f"Ali has {i} apples and buys 5 more. How many?", target=str(i + 5)) for i in (3, 4)]
    return Task(dataset=samples, solver=generate(), scorer=includes())
"""


@pytest.fixture(scope="module")
def live() -> Iterator[Server]:
    server, uvicorn_server, thread = start(build_app("base-tiny", num_threads=1))
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


def client(name: str, *arguments: str, folder: Path, **env: str) -> str:
    """Run a client to its end; what it wrote."""
    program = shutil.which(name, path=os.environ.get("TAFKIR_CLIENTS", ""))
    if program is None:
        pytest.skip(f"no {name} in the folders of TAFKIR_CLIENTS")
    env = {**os.environ, "OPENAI_API_KEY": "x", "HF_HOME": str(folder / "hf"), **env}
    done = subprocess.run([program, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_lm_eval_sees_the_model_s_own_likelihoods(live: Server, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": f"Ali has {a} apples and buys {b} more. How many?", "choices": [f" {a + b}", f" {a * b}"], "gold": 0}
        for a, b in ITEMS
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "apples.yaml").write_text(CHOICE.format(data=tmp_path / "data.jsonl"))
    path = find_checkpoint("base-tiny")
    arguments = f"model=base-tiny,base_url={live.url}/v1/completions,tokenizer={path},max_length=511,num_concurrent=4"
    client(
        "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--include_path", str(tmp_path),
        "--tasks", "apples", "--log_samples", "--output_path", "out", folder=tmp_path, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    (found,) = tmp_path.rglob("samples_*.jsonl")
    tokenizer, decoder = Tokenizer.load(path), load_checkpoint(path).decoder

    def likelihood(question: str, answer: str) -> tuple[float, bool]:
        """Of the answer after the question, by one forward pass: its log-probability, and whether greedy gives it."""
        start, ids = len(tokenizer.encode(question)), torch.tensor(tokenizer.encode(question + answer))
        with torch.no_grad():
            hidden = decoder(ids, torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
            logprobs = torch.log_softmax(decoder.logits(hidden).float(), -1)[start - 1 : -1]
        chosen = logprobs.gather(1, ids[start:, None])
        return float(chosen.sum()), bool((logprobs.argmax(1) == ids[start:]).all())

    samples = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(samples) == len(rows)
    for sample in samples:
        for answer, ((theirs, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            ours, is_greedy = likelihood(sample["doc"]["q"], answer)
            assert float(theirs) == pytest.approx(ours, abs=1e-4)
            assert str(greedy) == str(is_greedy)


def test_guidellm_runs_to_its_end(live: Server, tmp_path: Path) -> None:
    path = str(find_checkpoint("base-tiny"))
    shown = client(
        "guidellm", "run", "--backend", f"kind=openai_http,target={live.url},model=base-tiny",
        "--tokenizer", f"kind=hf_auto,model={path}", "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12",
        folder=tmp_path, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert "concurrent" in shown


def test_aiperf_runs_to_its_end(live: Server, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").symlink_to(find_checkpoint("base-tiny"))
    client(
        "aiperf", "profile", "--model", "base-tiny", "--url", live.url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", "tokenizer", "--concurrency", "4", "--request-count", "12",
        "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16", "--ui", "simple", folder=tmp_path,
    )  # fmt: skip
    (found,) = tmp_path.rglob("profile_export_aiperf.json")
    assert json.loads(found.read_text())["request_count"]["avg"] == 12


def test_inspect_scores_a_task(live: Server, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(INSPECT)
    shown = client(
        "inspect", "eval", "task.py", "--model", "openai-api/tafkir/base-tiny", "--max-tokens", "64", "--display",
        "plain", folder=tmp_path, TAFKIR_API_KEY="x", TAFKIR_BASE_URL=f"{live.url}/v1",
    )  # fmt: skip
    assert "accuracy" in shown


def test_evalplus_writes_programs(live: Server, tmp_path: Path) -> None:
    problem = {
        "task_id": "HumanEval/0", "prompt": "def add(a, b):\n    \"\"\"The sum.\"\"\"\n", "entry_point": "add",
        "canonical_solution": "    return a + b\n", "test": "", "contract": "", "base_input": [[1, 2]],
        "plus_input": [[3, 4]], "atol": 0,
    }  # fmt: skip
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    client(
        "evalplus.codegen", "--model", "base-tiny", "--dataset", "humaneval", "--backend", "openai", "--base_url",
        f"{live.url}/v1", "--greedy", "--root", "out", folder=tmp_path,
        HUMANEVAL_OVERRIDE_PATH=str(tmp_path / "problems.jsonl"),
    )  # fmt: skip
    (found,) = (path for path in tmp_path.rglob("*.jsonl") if "base-tiny" in path.name and "raw" in path.name)
    assert json.loads(found.read_text())["task_id"] == "HumanEval/0"
