"""Canaries stay green on the weights of their baseline, turn red on changed ones, and cost users nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError
from tafkir.serve.app import build_app
from tafkir.serve.canaries import LIMITS, Baseline, Canaries, Canary, Reading, drift_of, light_of, read_canaries
from tests.conftest import Cli
from tests.serve.conftest import Server, start

QUESTIONS = [
    Canary("sum", "What is 48 plus 24?", "72"),
    Canary("apples", "Ali has 3 apples and buys 5 more. How many?", "8"),
    Canary("ar", "كم يساوي ثمانية وأربعون زائد أربعة وعشرون؟", "اثنان وسبعون"),
]


@pytest.fixture(scope="module")
def noisy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise of half of each matrix's own spread."""
    decoder = load_checkpoint(checkpoint).decoder
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() / 2)
    path = tmp_path_factory.mktemp("canaries") / "noisy"
    save_checkpoint(path, decoder, tokenizer=Tokenizer.load(checkpoint))
    return path


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    app = build_app(checkpoint, max_batch=4, num_threads=1)
    server, uvicorn_server, thread = start(app)
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


def read(server: Server) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {
        (sample.name, sample.labels.get("signal", "")): sample.value for family in families for sample in family.samples
    }


def wait_for_rounds(server: Server, count: int) -> dict[tuple[str, str], float]:
    deadline = time.monotonic() + 60
    while (found := read(server))["tafkir:canary_rounds_total", ""] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_same_weights_stay_green_and_changed_ones_turn_red(server: Server, noisy: Path, tmp_path: Path) -> None:
    live = server.app.state.live
    recorder = Canaries(live, QUESTIONS, max_tokens=16)
    recorder.as_baseline({canary.id: reading for canary, reading in recorder.round()}).save(tmp_path / "baseline.json")
    baseline = Baseline.load(tmp_path / "baseline.json", QUESTIONS)
    assert baseline.fingerprint == live.served.fingerprint and baseline.max_tokens == 16
    asking = Canaries(live, QUESTIONS, baseline, share=1.0)
    asking.start()
    body = {"prompt": "What is", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    texts = {httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2)}
    same = wait_for_rounds(server, 2)
    assert len(texts) == 1
    assert {signal: same["tafkir:canary_light", signal] for signal in LIMITS} == dict.fromkeys(LIMITS, 0)
    assert abs(same["tafkir:canary_drift", "logprob"]) < 1e-5
    assert same["vllm:time_to_first_token_seconds_count", ""] == 2, "canaries are no users"
    live.replace(noisy)
    changed = wait_for_rounds(server, int(read(server)["tafkir:canary_rounds_total", ""]) + 2)
    asking.stop()
    assert max(changed["tafkir:canary_light", signal] for signal in LIMITS) == 2
    assert changed["tafkir:canary_light", "logprob"] >= 1
    assert time.time() - changed["tafkir:canary_last_round_timestamp_seconds", ""] < 60


def test_the_command_records_and_checks(here: Cli, checkpoint: Path, noisy: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = [json.dumps(asdict(canary), ensure_ascii=False) for canary in QUESTIONS]
    questions.write_text("\n".join(lines), encoding="utf-8")
    asked = ["--canaries", str(questions)]
    told = here("canary", "record", str(checkpoint), "--out", "baseline.json", *asked, "--max-tokens", "8")
    assert (told.returncode, "3 canaries" in told.stdout) == (0, True)
    red = here("canary", "check", str(noisy), "--baseline", "baseline.json", *asked, "--json")
    assert red.returncode == 3 and "red" in json.loads(red.stdout)["lights"].values()


def reading(logprob: float = -1.0, script: str = "LATIN", **other: int | bool) -> Reading:
    values: dict[str, object] = {"correct": True, "length": 10, "truncated": False, "refused": False, **other}
    return Reading(logprob=logprob, script=script, **values)  # type: ignore[arg-type]


def test_drift_and_lights() -> None:
    then = {"a": reading(), "b": reading()}
    now = {"a": reading(-1.6, "ARABIC", length=5, refused=True), "b": reading(correct=False, truncated=True)}
    drift = drift_of(now, then)
    expected = {"logprob": -0.3, "correct": -0.5, "length": -0.25, "truncated": 0.5, "refused": 0.5, "script": 0.5}
    assert drift == pytest.approx(expected)
    lights = [light_of(signal, value, LIMITS) for signal, value in drift.items()]
    assert lights == [2, 2, 1, 2, 2, 2]
    assert light_of("correct", 0.5, LIMITS) == 0, "a gain is no alarm"
    assert light_of("logprob", float("nan"), LIMITS) == 2


def test_files(tmp_path: Path) -> None:
    shipped = read_canaries(None)
    assert len(shipped) >= 10 and {"ar-add", "add"} <= {canary.id for canary in shipped}
    path = tmp_path / "c.jsonl"
    line = '{"id": "a", "prompt": "b", "answer": "c"}\n'
    for text, words in (
        ("\n", "no canary"),
        (line * 2, "comes twice"),
        ("{}\n", "no canary"),
        ('{"id": "a", "prompt": "b", "answer": 3}\n', "no canary"),
        ('{"id": "a", "prompt": "b", "answer": "c", "more": "d"}\n', "no canary"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_canaries(path)
    path.write_text(line)
    canaries = read_canaries(path)
    with pytest.raises(DataError, match="no baseline"):
        Baseline.load(path, canaries)
    Baseline("other", "m", None, 4, LIMITS, {"a": reading()}).save(tmp_path / "baseline.json")
    with pytest.raises(DataError, match="of other canaries"):
        Baseline.load(tmp_path / "baseline.json", canaries)
