"""The audit of a quantized checkpoint: its figures against the tensors themselves, and what it cannot accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tafkir.checkpoint import load_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.attention import VarlenCausal
from tafkir.ops.nvfp4 import fake_quantize_nvfp4
from tafkir.quant.convert import quantize_checkpoint
from tafkir.quant.texts import Passage
from tafkir.quant.verify import audit_checkpoint, compare_logits, summarize_audit
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.quantize import QuantizeConfig, RuleConfig
from tests.conftest import Cli

NAME = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "out"
    kept = RuleConfig(tensors="*.0.mlp.*_proj.weight", format="fp8_block")
    config = QuantizeConfig(preset="all-linear", rules=(kept,))
    quantize_checkpoint("base-tiny", path, config)
    return path


def test_the_audit_says_what_is_there(quantized: Path) -> None:
    audits = {audit.name: audit for audit in audit_checkpoint("base-tiny", quantized)}
    weights = load_file(find_checkpoint("base-tiny") / "model.safetensors")
    assert audits.keys() == weights.keys()
    audit, x = audits[NAME], weights[NAME].float()
    y = fake_quantize_nvfp4(weights[NAME].clone()).float()
    exact = fake_quantize_nvfp4(x)
    assert audit.relative_mse == pytest.approx(float((exact - x).square().sum() / x.square().sum()), rel=1e-5)
    assert audit.cosine == pytest.approx(float(F.cosine_similarity(exact.flatten(), x.flatten(), dim=0)), rel=1e-5)
    assert audit.underflowed == pytest.approx(float(((y == 0) & (x != 0)).float().mean()), abs=1e-4)
    assert audit.saturated == 0 and (audit.component, audit.format) == ("experts", "nvfp4")
    assert audit.output_bytes == x.numel() // 2 + x.numel() // 16 + 8 and audit.source_bytes == 2 * x.numel()
    place, error = audit.worst_blocks[0]
    block = x.flatten()[place : place + 16]
    assert float((exact.flatten()[place : place + 16] - block).square().sum() / block.square().sum()) == pytest.approx(
        error, rel=1e-4
    )
    assert audits["model.norm.weight"].relative_mse == 0 and audits["model.norm.weight"].cosine == pytest.approx(1)
    summary = summarize_audit(list(audits.values()))
    parts = {(row["component"], row["format"]): row for row in summary["parts"]}
    assert parts["mlp", "fp8_block"]["relative_mse"] < 1e-3 < parts["experts", "nvfp4"]["relative_mse"] < 1.1e-2
    assert parts["experts", "nvfp4"]["ratio"] == pytest.approx(16 / 4.5, rel=0.01)
    assert parts["norm", "BF16"]["ratio"] == 1 and summary["ratio"] == pytest.approx(3.1, abs=0.1)
    assert summary["worst"][0]["relative_mse"] == max(a.relative_mse for a in audits.values())


def test_saturated_weights_are_counted(quantized: Path, tmp_path: Path) -> None:
    """Scales halved by hand: nearly every block then has weights beyond its end."""
    tensors = load_file(quantized / "model.safetensors")
    tensors[f"{NAME}_scale"] = (tensors[f"{NAME}_scale"].float() / 2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((quantized / "config.json").read_text())
    (audit,) = [a for a in audit_checkpoint("base-tiny", tmp_path) if a.name == NAME]
    assert audit.saturated > 0.05 and audit.relative_mse > 0.1


def test_logits_against_two_forwards_by_hand(quantized: Path) -> None:
    ids = [5, 9, 100, 7, 30, 31]
    found = compare_logits("base-tiny", quantized, [Passage.whole(part) for part in (ids, ids[:3], ids[:1])])
    assert found["tokens"] == 5 + 2
    same = compare_logits("base-tiny", "base-tiny", [Passage.whole(ids)])
    assert same["kl_mean"] == 0 and same["top1_agreement"] == 1
    assert same["perplexity_source"] == same["perplexity_quantized"]
    assert 0 < found["kl_mean"] < found["kl_max"] and found["perplexity_quantized"] != found["perplexity_source"]

    decoder = load_checkpoint(quantized).decoder
    with torch.no_grad():
        hidden = decoder(torch.tensor(ids), torch.arange(6), VarlenCausal([0, 6])).hidden_ND
        logs = F.log_softmax(hidden @ decoder.head_weight.T, -1)
    nll = -logs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()
    alone = compare_logits("base-tiny", quantized, [Passage.whole(ids)])
    assert alone["perplexity_quantized"] == pytest.approx(float(nll.exp()), rel=1e-4)
    end = compare_logits("base-tiny", quantized, [Passage(ids, [False] * 4 + [True] * 2)])
    nll = -logs[3:5].gather(1, torch.tensor(ids[4:])[:, None]).mean()
    assert end["tokens"] == 2 and end["perplexity_quantized"] == pytest.approx(float(nll.exp()), rel=1e-4)
    with pytest.raises(CheckpointError, match="no text"):
        compare_logits("base-tiny", quantized, [Passage.whole([1])])


def test_what_does_not_belong_together_is_refused(quantized: Path, tmp_path: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    config = (quantized / "config.json").read_text()
    for change, message in (
        ({"model.norm.weight": None}, r"model\.norm\.weight: only one of the two"),
        ({"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight: shape is \[7\]"),
        ({f"{NAME}_scale_2": torch.tensor(0.0)}, "zero or not finite"),
    ):
        bad = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(bad, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=message):
            audit_checkpoint("base-tiny", tmp_path)


def test_the_command(cli: Cli, quantized: Path) -> None:
    done = cli("verify", "base-tiny", str(quantized), "--logits", "--max-tokens", "300", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["logits"]["kl_mean"] < 1 and found["logits"]["top1_agreement"] > 0.7
    assert len(found["tensors"]) == sum(row["tensors"] for row in found["parts"])
