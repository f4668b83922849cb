"""docs/long-context.md as it stands: stretch a checkpoint, then look for needles in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.eval.records import load_records
from tafkir.models.build import build_decoder
from tests.conftest import ROOT
from tests.eval.conftest import CONFIG


def test_the_page_stretches_a_checkpoint_and_finds_out_what_it_sees(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = build_decoder(CONFIG, 3)
    save_checkpoint("my-checkpoint", plain, tokenizer=tokenizer)
    page = (ROOT / "docs" / "long-context.md").read_text(encoding="utf-8")
    stretch, ask = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(stretch, "long-context.md", "exec"), {})
    long = load_checkpoint("my-long-checkpoint")
    assert long.config.max_position_embeddings == 131_072
    assert long.config.rope_scaling is not None and long.config.rope_scaling.factor == 4
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, long.decoder.state_dict()[name])

    smaller = ask.replace("[8_192, 32_768, 131_000], samples=20", "[150, 600], samples=2")
    assert smaller != ask
    exec(compile(smaller, "long-context.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("    150 tokens, depth 0%: ")
    answers = load_records(Path("needle.jsonl"))
    assert len(answers) == 20 and {answer.source for answer in answers} == {"150", "600"}
