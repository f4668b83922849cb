"""Merging instead of decaying: the exact identity, coefficients by hand, and folders merged tensor by tensor."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.read import WeightFiles
from tafkir.cli.merge import Decay
from tafkir.errors import RecipeError, TafkirError
from tafkir.models.build import build_decoder
from tafkir.recipe.schema import DecayShape, OptimConfig
from tafkir.train.merge import decay_weights, merge_checkpoints, merge_coefficients, merge_tensors
from tafkir.train.optim import Muon
from tafkir.train.schedule import scheduled_share
from tests.train.conftest import CONFIG


@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=12).map(lambda w: sorted(w, reverse=True)),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50)
def test_the_merge_is_the_decayed_training_for_a_fixed_gradient_sequence(weights: list[float], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    theta = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    decayed = theta.clone()
    checkpoints = [theta]
    for weight in weights:
        update = torch.randn(7, 5, generator=draw, dtype=torch.float64)
        theta = theta - update
        decayed = decayed - weight * update
        checkpoints.append(theta)
    merged = merge_tensors(checkpoints, merge_coefficients(weights))
    assert merged.dtype == torch.float64
    assert (merged - decayed).abs().max() < 1e-12


def test_the_merge_of_a_constant_rate_is_the_run_with_the_schedule_of_the_same_shape() -> None:
    """A stable phase, then a linear decay; the schedule's shares are the decay weights, the gradients are fixed."""
    config = OptimConfig(schedule="wsd", decay_share=0.5, decay_shape="linear", min_lr_ratio=0.0, warmup_steps=0)
    shares = [scheduled_share(step, 12, config) for step in range(12)]
    ends = []
    for rates in (shares, [1.0] * 12):
        theta = torch.ones(3, dtype=torch.float64)
        kept = []
        for step, rate in enumerate(rates):
            if step >= 6:
                kept.append(theta)
            theta = theta - 0.1 * rate * torch.tensor([1.0, step, (-1.0) ** step], dtype=torch.float64)
        ends.append([*kept, theta])
    merged = merge_tensors(ends[1], merge_coefficients(shares[6:]))
    assert (merged - ends[0][-1]).abs().max() < 1e-12
    assert (ends[1][-1] - ends[0][-1]).abs().max() > 0.1


def test_coefficients_by_hand() -> None:
    assert merge_coefficients([0.75, 0.5, 0.25]) == [0.25] * 4
    assert merge_coefficients([1.0, 0.6, 0.6]) == pytest.approx([0.0, 0.4, 0.0, 0.6])
    assert decay_weights("linear", 4) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert merge_coefficients(decay_weights("linear", 4)) == pytest.approx([0.2] * 5)  # the plain mean
    # 1 - sqrt falls at once, so the first checkpoint counts most: 1 - w_1 = sqrt(1/4)
    assert merge_coefficients(decay_weights("1-sqrt", 3)) == pytest.approx(
        [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]
    )
    for shape in Decay:
        coefficients = merge_coefficients(decay_weights(shape.value, 9))
        assert sum(coefficients) == pytest.approx(1.0, abs=1e-12)
        assert min(coefficients) >= 0


def test_the_command_line_knows_every_decay() -> None:
    assert {shape.value for shape in Decay} == set(DecayShape.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.2], [-0.1]])
def test_what_is_no_decay_is_refused(weights: list[float]) -> None:
    with pytest.raises(RecipeError, match=r"not a decay; expected 1 >= w_1"):
        merge_coefficients(weights)


def test_low_precision_is_rounded_once() -> None:
    parts = [torch.full((1,), 256.0, dtype=torch.bfloat16), *[torch.full((1,), 257.0).bfloat16() + 2] * 2]
    # 256, 258, 258 and a mean of 257.33, which bfloat16 rounds to 258; a sum in bfloat16 would lose its small parts.
    exact = sum(float(part) for part in parts) / 3
    assert merge_tensors(parts, [1 / 3] * 3).item() == torch.tensor(exact).bfloat16().item()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    paths = []
    decoder = build_decoder(CONFIG, seed=0)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for value in decoder.state_dict().values():
                value.add_(torch.randn(value.shape, generator=draw) * 0.1)
        paths.append(tmp_path / f"step-{step}")
        save_checkpoint(paths[-1], decoder, extra={"steps": step})
        (paths[-1] / "tokenizer.json").write_text("{}")
    return paths


def test_merged_folders_load_as_the_weighted_sum(folders: list[Path], tmp_path: Path) -> None:
    states = [load_checkpoint(path).decoder.state_dict() for path in folders]
    manifest = merge_checkpoints(folders, tmp_path / "merged", "1-sqrt")
    loaded = load_checkpoint(tmp_path / "merged")  # checks every hash
    coefficients = [3**-0.5, (2 / 3) ** 0.5 - 3**-0.5, 1 - (2 / 3) ** 0.5]
    for name, value in loaded.decoder.state_dict().items():
        expected = sum(c * state[name].double() for c, state in zip(coefficients, states, strict=True))
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(value, expected.float()), name
    assert any("expert_bias" in name for name in states[0])
    assert loaded.manifest == manifest
    assert manifest.lineage["coefficients"] == pytest.approx(coefficients)
    assert manifest.lineage["last"] == {"steps": 2}
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert [json.loads((p / "config.json").read_text()) for p in (tmp_path / "merged", folders[0])] == [
        json.loads((folders[0] / "config.json").read_text())
    ] * 2


def test_equal_checkpoints_merge_to_themselves_bit_for_bit(folders: list[Path], tmp_path: Path) -> None:
    merge_checkpoints([folders[0]] * 4, tmp_path / "merged", "linear")
    first, merged = (folder / "model.safetensors" for folder in (folders[0], tmp_path / "merged"))
    assert first.read_bytes() == merged.read_bytes()


def test_one_tensor_at_a_time_is_in_memory(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = WeightFiles.read

    def counting(self: WeightFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        gc.collect(0)
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(WeightFiles, "read", counting)
    merge_checkpoints(folders, tmp_path / "merged")
    assert len(alive) > 60
    assert most <= 2  # the one just read, and the one whose sum is being made


def other_shape(folder: Path) -> None:
    save_checkpoint(folder, build_decoder(CONFIG.model_copy(update={"vocab_size": 48}), seed=0))


def other_dtype(folder: Path) -> None:
    save_checkpoint(folder, load_checkpoint(folder).decoder, dtype=torch.bfloat16)


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"other": 1}')


def flipped_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def fp8(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_shape, r"step-1.*another model than the last checkpoint"),
        (other_dtype, r"step-1.*BF16.*expected F32.*step-2"),
        (other_tokenizer, r"step-1.tokenizer.json: another tokenizer"),
        (flipped_bit, r"step-1.*does not hold the tensor"),
        (fp8, r"step-1.*FP8 weights cannot be merged.*before quantizing"),
        (shutil.rmtree, r"step-1"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_named(
    folders: list[Path], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folders[1])
    with pytest.raises(TafkirError, match=message):
        merge_checkpoints(folders, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_checkpoint_or_an_old_place_is_refused(folders: list[Path]) -> None:
    with pytest.raises(RecipeError, match="two or more"):
        merge_checkpoints(folders[:1], folders[0].with_name("merged"))
    with pytest.raises(RecipeError, match=r"step-0: the folder is there already.*--out"):
        merge_checkpoints(folders, folders[0])


def test_the_command_says_what_it_did(folders: list[Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tafkir.cli.main import app

    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["merge", *map(str, folders), "--out", str(out), "--decay", "linear"])
    assert done.exit_code == 0, done.output
    assert done.output.count("0.33333") == 3
    assert load_checkpoint(out).manifest is not None
    again = CliRunner().invoke(app, ["merge", *map(str, folders), "--out", str(out)])
    assert isinstance(again.exception, RecipeError)
    assert CliRunner().invoke(app, ["merge", "a", "b", "--out", "c", "--decay", "sqrt"]).exit_code == 2


def test_merging_needs_no_optimiser_of_its_own() -> None:
    """The identity holds for whatever made the updates: here Muon's, whose step does not scale with the gradient."""
    param = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([param], lr=0.1)
    kept = [param.detach().double()]
    for step in range(4):
        param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step + 1))
        optimizer.step()
        kept.append(param.detach().double())
    weights = decay_weights("cosine", 4)
    updates = [before - after for before, after in pairwise(kept)]
    expected = kept[0] - sum(w * u for w, u in zip(weights, updates, strict=True))
    assert (merge_tensors(kept, merge_coefficients(weights)) - expected).abs().max() < 1e-12
