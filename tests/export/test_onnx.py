"""Exported graphs equal torch, whatever the network, the batch and the weights' format; others are refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.cli.main import app
from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.export import trm_graph
from tafkir.export.check import OnnxSolver, draw_questions
from tafkir.export.onnx_files import export_trm, make_files
from tafkir.export.trm_graph import build_step, with_format
from tafkir.export.weights import decoded
from tafkir.models.solving import solve_puzzles
from tafkir.models.trm import Trm
from tests.export.conftest import VARIANTS, small_checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_network_equals_torch(variant: str, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path, variant)
    made = make_files(checkpoint)
    assert made.parity.max_error < 5e-6 and made.parity.puzzles == 24
    questions = draw_questions(checkpoint.puzzles, 5, seed=1)
    ours = solve_puzzles(checkpoint.model, questions)
    theirs = OnnxSolver(made.files["solve.onnx"]).solve(questions, 3)
    assert (theirs.answers == ours.answers).all()
    assert np.abs(theirs.q_halt - ours.q_halt).max() < 1e-5


def test_a_solve_ends_when_every_puzzle_has_halted_once(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path)
    whole = OnnxSolver(make_files(checkpoint).files["solve.onnx"])
    questions = draw_questions(checkpoint.puzzles, 4, seed=2)
    q = whole.solve(questions, 6).q_halt
    assert q.shape == (6, 4)
    for threshold in (float(np.sort(q.max(0))[0]) - 1e-3, float(q.min()) - 1, math.inf):
        first = [next((k for k, value in enumerate(column) if value > threshold), 5) for column in q.T]
        assert len(whole.solve(questions, 6, threshold).q_halt) == max(first) + 1


def test_puzzles_have_vectors_of_their_own(tmp_path: Path) -> None:
    import onnxruntime

    checkpoint = small_checkpoint(tmp_path, "prefix", num_puzzle_ids=3)
    assert make_files(checkpoint).parity.holds
    session = onnxruntime.InferenceSession(build_step(checkpoint.model, "float32").SerializeToString())
    tokens = torch.from_numpy(draw_questions(checkpoint.puzzles, 3))
    ids = torch.tensor([2, 0, 2])
    state = checkpoint.model.start(3)
    with torch.no_grad():
        ours = checkpoint.model(state, tokens.long(), ids)
    inputs = {"tokens": tokens.int().numpy(), "puzzle_ids": ids.int().numpy()}
    theirs = session.run(None, inputs | {"y": state.y.numpy().copy(), "z": state.z.numpy().copy()})
    assert np.abs(theirs[2] - ours.logits.numpy()).max() < 1e-5


@pytest.mark.parametrize(("format", "smaller"), [("float16", 1.2), ("int8", 1.3), ("fp4", 1.3)])
def test_formats_are_unpacked_to_what_they_stand_for(format: str, smaller: float, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path, "attention")
    plain, made = make_files(checkpoint), make_files(checkpoint, format)  # type: ignore[arg-type]
    assert made.parity.max_error < 5e-6
    assert len(plain.files["step.onnx"]) > smaller * len(made.files["step.onnx"])
    questions = draw_questions(checkpoint.puzzles, 3)
    exact = OnnxSolver(plain.files["solve.onnx"]).solve(questions, 4)
    rounded = OnnxSolver(made.files["solve.onnx"]).solve(questions, 4)
    assert np.abs(exact.q_halt - rounded.q_halt).max() > 1e-5, "the rounding is there"


def test_decoded_matrices_by_hand() -> None:
    weight = torch.tensor([[254.0, 1.0, -3.0], [0.0, 0.0, 0.0]])
    assert decoded(weight, "int8").tolist() == [[254.0, 0.0, -4.0], [0.0, 0.0, 0.0]], "steps of 2, ties to even"
    # Of 2688 the global scale is 1 and the block's 448: steps of 448 times 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    assert decoded(torch.tensor([[2688.0, 500.0, -100.0]]), "fp4").tolist() == [[2688.0, 448.0, 0.0]]
    assert decoded(torch.tensor([[1 / 3]]), "float16").item() == float(np.float16(1 / 3))


def test_the_folder_says_what_a_host_needs(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path, loss="softmax", seed=3)
    export_trm(checkpoint, tmp_path / "out", "int8")
    info = json.loads((tmp_path / "out" / "model.json").read_text(encoding="utf-8"))
    assert info["weights"] == "int8" and info["confidence"] == "softmax" and info["made_from"]["seed"] == 3
    assert info["puzzles"]["symbols"] == list(checkpoint.puzzles.symbols) and info["max_supervision_steps"] == 3
    assert info["y_init"] == checkpoint.model.y_init.tolist() and info["positions"] == 16
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "solve.onnx", "step.onnx"]
    for name, known in info["files"].items():
        graph = onnx.load(tmp_path / "out" / name)
        assert known["bytes"] == (tmp_path / "out" / name).stat().st_size
        assert {node.domain for node in graph.graph.node} == {""}, "no operator of one runtime alone"


def test_a_graph_that_differs_is_refused(
    solver: TrmCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Trm, format: str) -> Trm:
        copy = with_format(model, format)  # type: ignore[arg-type]
        with torch.no_grad():
            copy.lm_head.weight.mul_(1.01)
        return copy

    monkeypatch.setattr(trm_graph, "with_format", other)
    with pytest.raises(CheckpointError, match=r"differs from torch by \d.*expected at most 1e-04"):
        export_trm(solver, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(solver: TrmCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    done = runner.invoke(app, ["trm", "export", str(solver.path), str(out), "--weights", "fp4"])
    assert done.exit_code == 0 and "equals torch to" in done.stdout and "step.onnx" in done.stdout
    as_json = runner.invoke(app, ["trm", "export", str(solver.path), str(out), "--json"])
    assert json.loads(as_json.stdout)["max_error"] < 1e-5
    assert runner.invoke(app, ["trm", "export", str(solver.path), str(out), "--weights", "int3"]).exit_code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = runner.invoke(app, ["trm", "export", str(solver.path), str(out)])
    assert isinstance(missing.exception, BackendUnavailable)
    assert "pip install 'tafkir[trm-web]'" in str(missing.exception)
