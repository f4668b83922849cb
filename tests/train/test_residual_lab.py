"""The residual laboratory: fair twins, gains as defined, and a run that goes on where it was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.packing import pack_documents
from tafkir.errors import RecipeError
from tafkir.models.build import build_decoder
from tafkir.models.residual import HyperConnection, ManifoldConnection, observe_res_maps
from tafkir.plan.estimate import estimate_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tafkir.train import residual_lab
from tafkir.train.language import DocumentBatch, language_loss, language_step
from tafkir.train.loop import StepOutput, Trainer
from tafkir.train.residual_lab import gain_metrics, list_variants

TINY = (
    "model.hidden_size=16",
    "model.head_dim=8",
    "model.intermediate_size=24",
    "lab.depths=[2,1]",
    "lab.steps=4",
    "lab.sequence_length=16",
    "lab.batch_sequences=2",
    "lab.validation_sequences=4",
    "lab.warmup_steps=1",
    "lab.save_every=2",
    "lab.log_every=1",
    "lab.validate_every=2",
)


class Killed(BaseException):
    """Stands for the end of the process."""


def run_tiny(path: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    """The lab's result and the folder of its variants."""
    loaded = resolve_recipe(load_recipe(["mhc-lab"], [*TINY, "report=", *overrides]))
    run = RunDir(path)
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["lab"]
    return result, run.stage("lab").path / "variants"


def rows_of(variants: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (variants / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return run_tiny(tmp_path_factory.mktemp("lab") / "unbroken")


def test_every_kind_is_trained_at_every_depth(unbroken: tuple[dict[str, Any], Path]) -> None:
    result, variants = unbroken
    done = [(variant["depth"], variant["kind"], variant["steps"]) for variant in result["variants"]]
    assert done == [(depth, kind, 4) for depth in (1, 2) for kind in ("plain", "hc", "mhc")]
    assert result["steps"] == 24 and result["tokens"] == 24 * 2 * 16
    assert all(variant["diverged"] is None and variant["cpu_s"] > 0 for variant in result["variants"])
    for variant in result["variants"]:
        rows = rows_of(variants, f"{variant['kind']}-{variant['depth']:03d}-seed0")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        measured = [row for row in rows if "validation/loss" in row]
        assert [row["step"] for row in measured] == [2, 4]
        if variant["kind"] == "plain":
            assert not any(name.startswith("gain/") for row in rows for name in row)
        else:
            assert all(len(row["gain/composed_forward"]) == 2 * variant["depth"] for row in measured)
    assert not list(variants.rglob("state")), "states of finished variants only take up room"


def test_twins_share_weights_and_data(tmp_path: Path) -> None:
    """Without phi, fresh HC and mHC are the plain model: their first losses agree as far as rounding lets them."""
    _, variants = run_tiny(
        tmp_path / "twins", "model.residual.phi_std=0", "lab.steps=1", "lab.depths=[2]", "lab.seeds=2"
    )
    first = {
        seed: [rows_of(variants, f"{kind}-002-seed{seed}")[0]["train/loss"] for kind in ("plain", "hc", "mhc")]
        for seed in (0, 1)
    }
    for losses in first.values():
        assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)
    assert abs(first[0][0] - first[1][0]) > 1e-4, "another seed is another model on other text"


def test_a_killed_lab_skips_what_is_finished_and_goes_on_within_a_variant(
    unbroken: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = language_step
    started: list[str] = []

    def dying(trainer: Trainer, documents: DocumentBatch, *, label: str) -> Callable[[int], StepOutput]:
        started.append(label)
        step = real(trainer, documents, label=label)

        def train(number: int) -> StepOutput:
            if number == 3 and len(started) == 3:
                raise Killed
            return step(number)

        return train

    monkeypatch.setattr(residual_lab, "language_step", dying)
    with pytest.raises(Killed):
        run_tiny(tmp_path / "killed")
    variants = tmp_path / "killed" / "stages" / "12-lab" / "variants"
    finished = {path: path.stat().st_mtime_ns for path in variants.glob("*/*") if "mhc" not in str(path)}
    assert len(started) == 3 and [path.name for path in variants.glob("mhc-001-seed0/state/*")]
    result, _ = run_tiny(tmp_path / "killed")
    assert started[3:] == [f"lab {name}-seed0" for name in ("mhc-001", "plain-002", "hc-002", "mhc-002")]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    _, expected = unbroken
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in variants.iterdir()) == names and len(result["variants"]) == 6
    for name in names:
        assert (variants / name / "metrics.jsonl").read_bytes() == (expected / name / "metrics.jsonl").read_bytes()


def test_a_variant_that_diverges_is_a_finding(tmp_path: Path) -> None:
    result, _ = run_tiny(
        tmp_path / "wild", "lab.learning_rate=1e30", 'lab.kinds=["plain","mhc"]', "lab.depths=[1]", "lab.steps=6"
    )
    assert [variant["kind"] for variant in result["variants"]] == ["plain", "mhc"]
    for variant in result["variants"]:
        assert variant["diverged"] and variant["steps"] < 6
        assert variant["tokens"] == variant["steps"] * 32


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_gains_against_numpy(kind: str) -> None:
    recipe = load_recipe(["mhc-lab"], TINY).recipe
    assert recipe.lab is not None
    variant = next(v for v in list_variants(recipe.lab) if (v.kind, v.depth) == (kind, 2))
    decoder = build_decoder(variant.shape(recipe.model), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, HyperConnection | ManifoldConnection):
                module.bias.add_(0.7 * torch.randn(module.bias.shape, generator=generator))
                module.alpha.fill_(1.0)
    documents = [(list(range(40, 60)), None), (list(range(90, 103)), None)]
    metrics = gain_metrics(decoder, documents)
    with observe_res_maps(decoder) as seen, torch.no_grad():
        language_loss(decoder, pack_documents(documents))
    maps = np.stack([res.double().numpy() for res in seen])  # sublayers, tokens, n, n
    products = [maps[-1]]
    for res in maps[-2::-1]:
        products.insert(0, products[0] @ res)
    for name, stack in (("single", maps), ("composed", np.stack(products))):
        rows = np.abs(stack.sum(-1)).max(-1).mean(-1)
        columns = np.abs(stack.sum(-2)).max(-1).mean(-1)
        np.testing.assert_allclose(metrics[f"gain/{name}_forward"], rows, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"gain/{name}_backward"], columns, rtol=1e-5)
        assert metrics[f"gain/{name}"] == pytest.approx(max(rows.max(), columns.max()), rel=1e-5)
    sums = np.abs(np.stack(products).sum(-2))
    logs = np.abs(np.log(np.concatenate([sums.max(-1).mean(-1), sums.min(-1).mean(-1)])))
    assert metrics["gain/log_column"] == pytest.approx(logs.max(), rel=1e-4, abs=1e-6)
    if kind == "mhc":
        np.testing.assert_allclose(metrics["gain/single_forward"], 1.0, atol=1e-5)


def test_small_gains_compound_with_depth_in_hc() -> None:
    """H_res = 1.1 I in each of 2 L sublayers: 1.1^(2 L) from end to end."""
    recipe = load_recipe(["mhc-lab"], [*TINY, "model.residual.phi_std=0", "lab.depths=[1,3]"]).recipe
    assert recipe.lab is not None
    for variant in [v for v in list_variants(recipe.lab) if v.kind == "hc"]:
        decoder = build_decoder(variant.shape(recipe.model), 0)
        with torch.no_grad():
            for module in decoder.modules():
                if isinstance(module, HyperConnection):
                    module.bias[8:] *= 1.1
        metrics = gain_metrics(decoder, [(list(range(50, 60)), None)])
        assert metrics["gain/single"] == pytest.approx(1.1)
        assert metrics["gain/composed"] == pytest.approx(1.1 ** (2 * variant.depth))
        assert metrics["gain/log_column"] == pytest.approx(2 * variant.depth * math.log(1.1), rel=1e-5)


def test_the_estimate_counts_every_variant() -> None:
    def seconds(*overrides: str) -> float:
        (estimate,) = estimate_stages(load_recipe(["mhc-lab"], ["report=", *overrides]).recipe)
        assert estimate.kind == "lab" and estimate.memory_bytes > 0
        return estimate.seconds

    assert seconds("lab.seeds=2") == pytest.approx(2 * seconds())
    assert seconds("lab.steps=400") == pytest.approx(400 / load_recipe(["mhc-lab"]).recipe.lab.steps * seconds())  # type: ignore[union-attr]
    alone = [seconds(f'lab.kinds=["{kind}"]') for kind in ("plain", "hc", "mhc")]
    assert sum(alone) == pytest.approx(seconds()) and alone[0] < alone[1] and alone[0] < alone[2]
    assert seconds("lab.depths=[4]") < seconds("lab.depths=[8]") < seconds("lab.depths=[4,8]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=255", r"model\.vocab_size=255 does not hold the bytes.*set it to 256"),
        ("lab.depths=[4,4]", "depths names something twice"),
        ('lab.kinds=["mhc","mhc"]', "kinds names something twice"),
        ("lab.ema.decay=0.9", "a lab writes no checkpoint"),
        ("lab.checkpoint_every=1", "a lab writes no checkpoint"),
        ('lab.checkpoint_dtype="bfloat16"', "a lab writes no checkpoint"),
        ('lab.kinds=["deepseek_v4"]', "lab.kinds"),
        ('lab.method="sorcery"', "lab.method"),
        ("lab.sequence_length=1", "lab.sequence_length"),
        ("lab.seeds=0", "lab.seeds"),
    ],
)
def test_bad_labs_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["mhc-lab"], [override])


def test_a_lab_beside_a_chain_still_needs_a_tokenizer() -> None:
    with pytest.raises(RecipeError, match="neither a base nor a \\[tokenizer\\]"):
        load_recipe(["mhc-lab"], ["pretrain.steps=2"])
