"""Mixed precision under a budget: losses against checkpoints on disk, budgets kept, and rules that reproduce it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tafkir.checkpoint import load_checkpoint
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.errors import RecipeError
from tafkir.quant.auto import Sensitivities, auto_quantize, measure_sensitivities
from tafkir.quant.convert import quantize_checkpoint
from tafkir.quant.policy import component_of, decide
from tafkir.quant.rules import exact_rules
from tafkir.quant.sensitivity import find_groups, fisher_losses, read_predictions
from tafkir.quant.texts import Passage, familiar_problems
from tafkir.quant.verify import audit_checkpoint, compare_logits
from tafkir.recipe.auto import AutoConfig, parse_auto
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.load import load_recipe
from tafkir.recipe.quantize import QuantizeConfig, RuleConfig
from tafkir.runlog.rundir import RunDir
from tests.conftest import Cli

BASE = find_checkpoint("base-tiny")


def config(**auto: object) -> QuantizeConfig:
    return QuantizeConfig(auto=AutoConfig.model_validate(auto))


@pytest.fixture(scope="module")
def texts() -> list[Passage]:
    # Questions count, too: their errors are large enough for gradients to estimate.
    return [Passage.whole(passage.ids) for passage in familiar_problems(BASE, 240, 7 * 10**9)]


@pytest.fixture(scope="module")
def measured(texts: list[Passage]) -> Sensitivities:
    asked = config(bits=6.0)
    assert asked.auto
    return measure_sensitivities(BASE, asked, asked.auto, texts)


def test_groups_hold_every_matrix_of_the_layers_once() -> None:
    decoder = load_checkpoint(BASE).decoder
    groups = find_groups(decoder)
    held = [name for group in groups for name in group.tensors]
    with_kinds = {name: component_of(name, 4) for name in (audit.name for audit in audit_checkpoint(BASE, BASE))}
    wanted = {"attention", "attention_out", "mlp", "experts", "shared_experts"}
    assert sorted(held) == sorted(name for name, part in with_kinds.items() if part in wanted)
    assert {group.kind for group in groups if group.layer == 3} == {
        "q/k/v", "o", "experts", "shared gate/up", "shared down"
    }  # fmt: skip
    assert len({group.name for group in groups}) == len(groups) == 19
    assert sum(group.numel for group in groups) == 2_727_936


def test_a_loss_is_that_of_the_checkpoint_on_disk(
    measured: Sensitivities, texts: list[Passage], tmp_path: Path
) -> None:
    """One group alone is quantized; weights and activations, as `verify` computes them."""
    before = {name: tensor.clone() for name, tensor in measured.decoder.state_dict().items()}
    for kind, format in (("experts", "nvfp4"), ("q/k/v", "fp8_block")):
        index = next(i for i, g in enumerate(measured.groups) if g.layer == 2 and g.kind == kind)
        rules = exact_rules({measured.groups[index].tensors: format}, measured.names)  # type: ignore[dict-item]
        mine = [RuleConfig(tensors=pattern, format=one) for pattern, one in rules]
        alone = QuantizeConfig(rules=(*mine, RuleConfig(tensors="*", format="keep")))
        quantize_checkpoint(BASE, tmp_path / kind.replace("/", ""), alone)
        found = compare_logits(BASE, tmp_path / kind.replace("/", ""), texts, served=True)
        assert measured.losses[index][format] == pytest.approx(found["kl_mean"], rel=1e-3)  # type: ignore[index]
    assert all(torch.equal(before[name], tensor) for name, tensor in measured.decoder.state_dict().items())
    assert not any(module._forward_pre_hooks for module in measured.decoder.modules())
    # Beside the model no more than one group in each format is in memory.
    largest = max(group.numel for group in measured.groups)
    for made in measured.weights.values():
        assert 0 < sum(tensor.numel() for tensor in made.made.values()) <= largest  # type: ignore[attr-defined]


def test_the_rules_reproduce_the_mixture(measured: Sensitivities, texts: list[Passage], tmp_path: Path) -> None:
    result = auto_quantize(BASE, config(bits=6.0), texts, measured=measured)
    assert 5.5 < result.bits <= 6.0 and result.bound <= result.predicted_kl
    assert {group.format for group in result.groups} >= {"nvfp4", "fp8_block"}
    keys = tomllib.loads(result.rules_file("base-tiny"))["quantize"]
    quantize_checkpoint(BASE, tmp_path / "out", QuantizeConfig.model_validate(keys))
    found = compare_logits(BASE, tmp_path / "out", texts, served=True)
    assert result.measured_kl == pytest.approx(found["kl_mean"], rel=1e-3)
    solutions = familiar_problems(BASE, 240, 7 * 10**9)
    found = compare_logits(BASE, tmp_path / "out", solutions, served=True)
    formats = [group.format for group in result.groups]
    kl = measured.measure_on(formats, solutions, read_predictions(measured.decoder, solutions))
    assert kl == pytest.approx(found["kl_mean"], rel=1e-2) and kl < result.measured_kl / 5
    assert found["tokens"] == sum(sum(passage.counted) for passage in solutions)
    audits = {audit.name: audit for audit in audit_checkpoint(BASE, tmp_path / "out")}
    stored = sum(audits[name].output_bytes for group in measured.groups for name in group.tensors)
    # Two numbers a matrix stand beside the codes.
    assert 0 <= stored - result.bits * measured.numel / 8 <= 8 * len(audits)
    by_group = dict(zip((group.name for group in measured.groups), result.groups, strict=True))
    for group in measured.groups:
        stored_as = {audits[name].format for name in group.tensors}
        assert stored_as == {by_group[group.name].format.replace("keep", "BF16")}
    assert json.loads(json.dumps(result.to_dict()))["groups"][0]["losses"]["keep"] == 0


def test_more_bits_lose_less_and_budgets_hold(measured: Sensitivities, texts: list[Passage], tmp_path: Path) -> None:
    results = [auto_quantize(BASE, config(bits=bits), texts, measured=measured) for bits in (4.5, 5.0, 16)]
    losses = [result.predicted_kl for result in results]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 and results[0].bits == 4.5
    assert {group.format for group in results[0].groups} == {"nvfp4"}
    kl = auto_quantize(BASE, config(kl=0.02), texts, measured=measured)
    assert 0.005 < kl.measured_kl <= 0.02 and kl.bits < 8.1
    size = auto_quantize(BASE, config(bytes=2_200_000), texts, measured=measured)
    written = quantize_checkpoint(BASE, tmp_path / "out", size.config)
    assert 2_100_000 < written.output_bytes <= 2_200_000


def test_gradients_estimate_what_is_measured(measured: Sensitivities, texts: list[Passage]) -> None:
    """Where errors are small and no router comes behind them, the estimate is that of a second-order expansion."""
    formats = [dict(losses) for losses in measured.losses]
    decoder, groups = measured.decoder, measured.groups
    weights = {format: dict(made) for format, made in measured.weights.items()}
    fisher = fisher_losses(decoder, groups, formats, weights, texts, measured.amax, draws=12)
    last = [i for i, group in enumerate(groups) if group.layer == 3 and "q/k/v" not in group.kind and group.kind != "o"]
    assert len(last) == 3
    for i in last:
        assert 0.5 < fisher[i]["fp8_block"] / measured.losses[i]["fp8_block"] < 2
    pairs = [(measured.losses[i][f], fisher[i][f]) for i in range(len(groups)) for f in formats[i]]
    x, y = (torch.tensor(side).log() for side in zip(*pairs, strict=True))
    assert float(torch.corrcoef(torch.stack([x, y]))[0, 1]) > 0.6
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(module._forward_hooks for module in decoder.modules())


def test_what_cannot_be_asked() -> None:
    assert parse_auto("bits=5.0") == {"bits": 5.0} and parse_auto("bytes = 4.2GB") == {"bytes": 4_200_000_000}
    assert parse_auto("kl=1%") == parse_auto("kl=0.01") == {"kl": 0.01}
    for text in ("bits=5%", "5", "kl=", "bytes=1.2.3", "bits=5,kl=1"):
        with pytest.raises(RecipeError, match=r"is no budget; expected bits=5\.0"):
            parse_auto(text)
    with pytest.raises(ValidationError, match="one of bits, bytes and kl"):
        AutoConfig(bits=5, kl=0.1)
    with pytest.raises(ValidationError, match="no place for int4"):
        config(bits=5.0, formats=("int4",))
    with pytest.raises(RecipeError, match=r"quantize\.auto: the formats are still to be chosen"):
        decide({"model.norm.weight": (4,)}, config(bits=5.0), 1)


def test_budgets_that_cannot_be_met_say_what_it_takes(measured: Sensitivities, texts: list[Passage]) -> None:
    with pytest.raises(RecipeError, match=r"too small for these formats; expected bits=4\.50"):
        auto_quantize(BASE, config(bits=4.0), texts, measured=measured)
    with pytest.raises(RecipeError, match="no mixture of these formats stays within 1e-12"):
        auto_quantize(BASE, config(kl=1e-12), texts, measured=measured)


def test_the_command(here: Cli, tmp_path: Path) -> None:
    settings = tmp_path / "small.toml"
    settings.write_text('[auto]\nbytes = 2_000_000\nsensitivity = "fisher"\ntokens = 100\nformats = ["nvfp4"]\n')
    done = here("quantize", "base-tiny", "one", "--config", str(settings), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "becomes  because" in done.stdout and not Path("one").exists()
    assert "<svg" in Path("one.auto.svg").read_text() and json.loads(Path("one.auto.json").read_text())["groups"]
    done = here("quantize", "base-tiny", "two", "--rules", "one.auto.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_bytes"] <= 2_000_000
    bad = here("quantize", "base-tiny", "two", "--rules", "one.auto.toml", "--auto", "bits=5")
    assert bad.returncode == 2 and "give one of them" in bad.stderr


RECIPE = """
name = "mixed"
threads = 1
kernels = "torch"
base = "base-tiny"

[quantize.auto]
bits = 6.0
sensitivity = "fisher"
tokens = 100
"""


def test_a_recipe_mixes_formats_too(tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text(RECIPE)
    loaded = load_recipe([str(tmp_path / "mixed.toml")])
    run = RunDir(tmp_path / "run")
    found = run_recipe(loaded, run, select_stages(loaded.recipe, only="quantize"))["quantize"]
    assert 5.5 < found["auto"]["bits"] <= 6.0 and 0 < found["logits"]["kl_mean"] < 0.3
    assert {"nvfp4", "fp8_block"} <= {row["format"] for row in found["parts"]}
    again = load_recipe(["eval", str(run.stage("quantize").path / "auto.toml")]).recipe.quantize
    assert again and again.auto is None and len(again.rules) == len(tomllib.loads(_rules(run))["quantize"]["rules"])


def _rules(run: RunDir) -> str:
    return (run.stage("quantize").path / "auto.toml").read_text()
