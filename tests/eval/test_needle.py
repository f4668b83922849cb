"""Needles by length and depth: scores, intervals, what does not fit, and docs/long-context.md as it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import CapacityError, DataError
from tafkir.eval.needle import NeedleSettings, evaluate_needles, render_needles
from tafkir.eval.records import load_records
from tafkir.intervals import wilson
from tafkir.models.build import build_decoder
from tafkir.records import Request
from tests.conftest import ROOT, Cli
from tests.eval.conftest import CONFIG, Scripted

SETTINGS = NeedleSettings(lengths=(80, 160), depths=(0.0, 1.0), samples=3, num_needles=2, max_tokens=16)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_checkpoint(tmp_path / "model", build_decoder(CONFIG, 3), tokenizer=tokenizer)
    return tmp_path / "model"


def last_number(tokenizer: Tokenizer) -> Callable[[Request], str]:
    """A reader who remembers only the end of a text: its last number, whoever is asked for."""

    def answer(request: Request) -> str:
        text = tokenizer.decode(list(request.prompt_ids)).partition("What number")[0]
        return re.findall(r"\d+", text)[-1]

    return answer


def scored(checkpoint: Path, completer: Any, path: Path, settings: NeedleSettings = SETTINGS) -> dict[str, Any]:
    return evaluate_needles(checkpoint, settings, context=512, build_completer=lambda _: completer, path=path)


def test_scores_come_by_length_and_depth(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = scored(checkpoint, Scripted(tokenizer, last_number(tokenizer)), tmp_path / "needle.jsonl")
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [
        (80, 0.0),
        (80, 1.0),
        (160, 0.0),
        (160, 1.0),
    ]
    for cell in result["cells"]:
        # At the end of the text the needle is the last number; at its beginning another one is.
        right = 3 if cell["depth"] == 1.0 else 0
        expected = wilson(right, 3)
        assert (cell["value"], cell["low"], cell["high"]) == (right / 3, expected.low, expected.high)
        assert cell["outcomes"] == ({"correct": 3} if right else {"wrong": 3})
    for row in result["lengths"]:
        assert (row["value"], row["num_problems"]) == (0.5, 6)
    assert (result["all"]["value"], result["all"]["num_problems"]) == (0.5, 12)
    assert result["settings"]["lengths"] == (80, 160) and result["context"] == 512
    table = render_needles(result).splitlines()
    assert table[0].split() == ["tokens", "found", "at", "0", "%", "at", "100", "%"]
    assert table[1].split() == ["80", "50.0", "%", "[", "18.8,", "81.2]", "0", "100"]
    assert {record.reason.partition(" of ")[0] for record in load_records(tmp_path / "needle.jsonl")} >= {"the number"}


def test_a_killed_evaluation_goes_on(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    answer, path = last_number(tokenizer), tmp_path / "needle.jsonl"
    settings = NeedleSettings((80,), (0.0, 0.5, 1.0), samples=100, num_needles=2, max_tokens=16)  # several batches
    with pytest.raises(KeyboardInterrupt):
        scored(checkpoint, Scripted(tokenizer, answer, fail_after=290), path, settings)
    before = path.read_bytes()
    again = Scripted(tokenizer, answer)
    result = scored(checkpoint, again, path, settings)
    assert before and path.read_bytes().startswith(before) and len(again.seen) < 300
    assert result == scored(checkpoint, Scripted(tokenizer, answer), tmp_path / "unbroken.jsonl", settings)


def test_lengths_reach_up_to_the_context(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    completer = Scripted(tokenizer, lambda _: "1")
    settings = NeedleSettings(depths=(0.5,), samples=2, max_tokens=16)
    lengths = scored(checkpoint, completer, tmp_path / "needle.jsonl", settings)["settings"]["lengths"]
    assert len(lengths) == 4 and lengths[0] == lengths[-1] // 8
    prompts = [len(request.prompt_ids) for request in completer.seen]
    assert 480 <= max(prompts) + 16 <= 512


@pytest.mark.parametrize(
    ("settings", "context", "error", "message"),
    [
        (NeedleSettings((500,), samples=1), 512, CapacityError, r"a haystack of 500 tokens takes 5\d\d with its"),
        (NeedleSettings((), samples=1, max_tokens=60), 64, CapacityError, "a context of 64 has no room"),
        (NeedleSettings((100,), (1.5,), samples=1), 512, DataError, "depth 1.5"),
        (NeedleSettings((4,), samples=1), 512, DataError, "do not fit"),
        (NeedleSettings((100,), ()), 512, DataError, "no haystack to ask about"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_are_read(
    checkpoint: Path,
    tmp_path: Path,
    settings: NeedleSettings,
    context: int,
    error: type[Exception],
    message: str,
) -> None:
    def build(batch: int) -> Any:
        raise AssertionError("the weights were read")

    with pytest.raises(error, match=message):
        evaluate_needles(checkpoint, settings, context=context, build_completer=build, path=tmp_path / "needle.jsonl")


def test_the_page_stretches_a_checkpoint_and_finds_out_what_it_sees(
    here: Cli, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    plain = build_decoder(CONFIG, 3)
    save_checkpoint("my-checkpoint", plain, tokenizer=tokenizer)
    page = (ROOT / "docs" / "long-context.md").read_text(encoding="utf-8")
    (stretch,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(stretch, "long-context.md", "exec"), {})
    long = load_checkpoint("my-long-checkpoint")
    assert long.config.max_position_embeddings == 131_072
    assert long.config.rope_scaling is not None and long.config.rope_scaling.factor == 4
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, long.decoder.state_dict()[name])

    (command,) = re.findall(r"^tafkir (eval .*)$", page, flags=re.MULTILINE)
    smaller = command.replace("8192,32768,131000", "150,600 --samples 2")
    assert smaller != command
    done = here(*shlex.split(smaller))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["tokens", "150", "600", "Answers:"]
    answers = load_records(tmp_path / "runs" / "needle-my-long-checkpoint" / "eval" / "needle.jsonl")
    assert len(answers) == 20 and {answer.source for answer in answers} == {"150", "600"}

    as_json = here(*shlex.split(smaller), "--json", "--depths", "0.5,1", "--needles", "1", "--name", "other")
    result = json.loads(as_json.stdout)
    assert result["run"] == "runs/other" and result["settings"]["num_needles"] == 1
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(150, 0.5), (150, 1), (600, 0.5), (600, 1)]
    assert all({"value", "low", "high", "num_problems", "outcomes"} <= cell.keys() for cell in result["cells"])
    stored = json.loads((tmp_path / "runs" / "other" / "eval" / "needle.json").read_text())
    assert {"run": "runs/other", **stored} == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "100"), "error: eval: --lengths belongs to --task needle. Fix: add --task needle"),
        (("--task", "needle", "--set", "seed=1"), "error: eval: --set belongs to --task problems."),
        (("--task", "needle", "--lengths", "1e3"), "error: --lengths: '1e3' is no list of numbers; expected"),
        (("--task", "needle", "--depths", "0;1"), "error: --depths: '0;1' is no list of numbers; expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    here: Cli, checkpoint: Path, options: tuple[str, ...], message: str
) -> None:
    done = here("eval", str(checkpoint), *options)
    assert done.returncode == 2 and done.stderr.startswith(message)
