"""`tafkir generate`: OpenAI's batch format, the same answers as the server's, nothing lost or done twice by a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tafkir.errors import DataError
from tafkir.serve.offline import finished_ids, read_batch
from tests.conftest import Cli
from tests.serve.test_api import MESSAGES, MODEL


def line(i: int, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "seed": i, **body}
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.slow
def test_a_batch_that_is_killed_goes_on(
    tmp_path: Path, checkpoint: Path, cli_env: dict[str, str], here: Cli, client: openai.OpenAI
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(i, max_tokens=60, ignore_eos=True) for i in range(20)]
    lines[7] = line(7, temperature=-1)
    lines[8] = {**lines[8], "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 3}}
    source.write_text("".join(json.dumps(each) + "\n" for each in lines))
    words = [
        "generate", str(checkpoint), "--input", str(source), "--output", str(output), "--max-batch", "2",
        "--threads", "1", "--json",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tafkir.cli.main", *words]
    deadline = time.monotonic() + 120
    with subprocess.Popen(command, env=cli_env, stdout=subprocess.DEVNULL) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = output.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 20
    output.write_bytes(kept + b'{"id": "batch_req_torn", "cust')
    done = here(*words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert output.read_bytes().startswith(kept), "what was answered stays as it was"
    answers = [json.loads(each) for each in output.read_text().splitlines()]
    assert sorted(each["custom_id"] for each in answers) == sorted(each["custom_id"] for each in lines)
    assert (
        summary["resumed"] == kept.count(b"\n") and summary["resumed"] + summary["succeeded"] + summary["failed"] == 20
    )
    by_id = {each["custom_id"]: each for each in answers}
    assert by_id["r7"]["response"]["status_code"] == 400 and "temperature" in by_id["r7"]["error"]["message"]
    assert by_id["r8"]["response"]["body"]["object"] == "text_completion"
    for i in (0, 19):
        served = client.chat.completions.create(**{k: v for k, v in lines[i]["body"].items() if k != "ignore_eos"},
                                                extra_body={"ignore_eos": True})  # fmt: skip
        found = by_id[f"r{i}"]["response"]["body"]["choices"][0]["message"]["content"]
        assert found == served.choices[0].message.content
    assert json.loads(here(*words).stdout)["resumed"] == 20, "a batch that is done needs no model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no request"),
        ('{"custom_id": "a", "url": "/v1/chat/completions"}', "no request"),
        ('{"url": "/v1/chat/completions", "body": {}}', "custom_id"),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "POST"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "/v1/embeddings"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "streams"),
        ("", "empty"),
    ],
)
def test_files_that_are_no_batch(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_batch(path)


def test_ids_and_outputs_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps(line(1)) + "\n") * 2)
    with pytest.raises(DataError, match=r"in.jsonl:2: .*comes twice"):
        read_batch(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_batch(tmp_path / "none")
    path.write_text('{"custom_id": "other"}\n')
    with pytest.raises(DataError, match="not in the batch"):
        finished_ids(path, ["r1"])
    path.write_text("notes\n")
    with pytest.raises(DataError, match="no answer of a batch"):
        finished_ids(path, ["r1"])
    assert path.read_text() == "notes\n"
