"""YaRN finds a needle beyond the trained context where the unstretched model does not, without further training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.needle import (
    DEPTHS,
    FACTOR,
    Setup,
    document_of,
    found,
    haystacks_of,
    main,
    train,
    training_documents,
    with_yarn,
)
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder

SETUP = Setup(
    context=48,
    hidden_size=32,
    num_hidden_layers=1,
    num_experts=0,
    steps=130,
    tokens_per_step=1024,
    learning_rate=8e-3,
)


@pytest.fixture(scope="module")
def trained() -> Decoder:
    decoder = build_decoder(SETUP.model, seed=0)
    train(decoder, SETUP, 0, longest=SETUP.context, steps=SETUP.steps)
    return decoder


def share_found(decoder: Decoder, length: int) -> float:
    haystacks = [haystack for depth in DEPTHS for haystack in haystacks_of(length, depth, 20)]
    return sum(found(decoder, haystacks)) / len(haystacks)


def test_the_stretched_context_works_and_the_unstretched_one_does_not(trained: Decoder) -> None:
    longest, stretched = FACTOR * SETUP.context, with_yarn(trained, SETUP)
    assert share_found(trained, SETUP.context) >= 0.9
    assert share_found(stretched, SETUP.context) >= 0.9
    assert share_found(stretched, longest) >= 0.8
    assert share_found(trained, longest) <= 0.4


def test_training_is_a_function_of_the_seed() -> None:
    losses = []
    for seed in (3, 3, 4):
        decoder = build_decoder(SETUP.model, seed)
        losses.append(train(decoder, SETUP, seed, longest=SETUP.context, steps=4))
    assert losses[0] == losses[1] != losses[2]


def test_no_held_out_haystack_is_trained_on() -> None:
    held_out = {
        tuple(document_of(haystack)[0]) for depth in DEPTHS for haystack in haystacks_of(SETUP.context, depth, 20)
    }
    documents = [
        tuple(ids)
        for step in range(SETUP.steps)
        for ids, _ in training_documents(0, step, SETUP.context, SETUP.tokens_per_step)
    ]
    assert len(held_out) == 20 * len(DEPTHS) and SETUP.context in set(map(len, documents))
    assert held_out.isdisjoint(documents)


def test_the_benchmark_writes_table_result_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the bench extra")
    out, picture = tmp_path / "result.json", tmp_path / "needle.png"
    arguments = ["--seeds", "2", "--samples", "2", "--steps", "2", "--finetune-steps", "1", "--context", "16"]
    main([*arguments, "--out", str(out), "--picture", str(picture)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert set(result["arms"]) == {
        "unstretched", "unstretched, then trained", "yarn", "yarn, then trained"
    }  # fmt: skip
    assert {(cell["length"], cell["depth"]) for cell in result["arms"]["yarn"]["cells"]} == {
        (length, depth) for length in (16, 32, 64, 128) for depth in DEPTHS
    }
    assert result["yarn_minus_unstretched"]["64"]["across_runs"]["num_problems"] == 2
    assert len(result["variants"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
