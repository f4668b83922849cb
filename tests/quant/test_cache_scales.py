"""Scales of the cache in a checkpoint: the engine reads them, both layouts carry them, damaged ones are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tafkir.checkpoint.cache_scales import read_cache_scales
from tafkir.checkpoint.load import load_checkpoint
from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError
from tafkir.quant.calibrated import quantize_calibrated
from tafkir.quant.convert import quantize_checkpoint
from tafkir.quant.relayout import relayout_checkpoint
from tafkir.quant.verify import audit_cache, audit_checkpoint
from tafkir.recipe.quantize import CalibrationConfig, QuantizeConfig
from tafkir.records import Request, SamplingParams
from tafkir.serve.loading import build_engine
from tests.quant.peer_sources import write_source

IDS = list(range(3, 35))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source, and two copies for an NVFP4 cache: calibrated, and not."""
    path = tmp_path_factory.mktemp("cache")
    write_source("qwen3", path / "source")
    config = QuantizeConfig(preset="all-linear", kv_cache="nvfp4", calibration=CalibrationConfig())
    quantize_calibrated(path / "source", path / "made", config, [IDS])
    quantize_checkpoint(path / "source", path / "cast", config.model_copy(update={"calibration": None}))
    return path


def answer(engine: Engine) -> tuple[float, ...]:
    (done,) = engine.complete([Request("a", tuple(IDS), SamplingParams(temperature=0.0, max_tokens=6, seed=0))])
    return done.logprobs


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_the_engine_reads_them(folder: Path, format: Any) -> None:
    stored = read_cache_scales(folder / "made", 2)
    assert stored is not None and max(map(max, stored)) < 0.1 and read_cache_scales(folder / "cast", 2) is None
    tokenizer: Any = SimpleNamespace(end_ids=(0,))
    for paged in (False, True):
        made, cast = (
            answer(build_engine(folder / name, tokenizer, None, max_context=64, kv_cache=format, paged=paged))
            for name in ("made", "cast")
        )
        # Codes of NVFP4 reach 6 x 448 times their scale, FP8's 448 times; either covers the largest magnitude seen.
        factors = [(k / 6, v / 6) if format == "nvfp4" else (k, v) for k, v in stored]
        decoder = load_checkpoint(folder / "made").decoder
        expected = answer(Engine(decoder, eos_ids=(0,), kv_cache=format, kv_scales=factors))
        assert made == pytest.approx(expected, abs=1e-5) and cast != pytest.approx(expected, abs=1e-4)


def test_both_layouts_carry_them(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "fp8"
    shutil.copytree(folder / "made", made)
    for file in ("config.json", "hf_quant_config.json"):  # compressed-tensors has no word for an NVFP4 cache
        text = (made / file).read_text().replace('"kv_cache_scheme": "NVFP4"', '"kv_cache_scheme": "FP8"')
        (made / file).write_text(text.replace('"kv_cache_quant_algo": "NVFP4"', '"kv_cache_quant_algo": "FP8"'))
    relayout_checkpoint(made, tmp_path / "ct", "compressed-tensors")
    relayout_checkpoint(tmp_path / "ct", tmp_path / "back", "modelopt")
    theirs = load_file(tmp_path / "ct" / "model.safetensors")
    assert theirs["model.layers.1.self_attn.v_scale"].shape == (1,) and not any("v_proj.v_scale" in n for n in theirs)
    for path in ("ct", "back"):
        assert read_cache_scales(tmp_path / path, 2) == read_cache_scales(made, 2)
    assert load_file(made / "model.safetensors").keys() == load_file(tmp_path / "back" / "model.safetensors").keys()


def change(folder: Path, path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder / "made", path)
    (path / "manifest.json").unlink(missing_ok=True)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_damaged_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.k_scale"
    zero = change(folder, tmp_path / "zero", lambda tensors: tensors.update({name: torch.tensor(0.0)}))
    alone = change(folder, tmp_path / "alone", lambda tensors: tensors.pop(name))
    for path, said in ((zero, "the scale of the cache is 0"), (alone, "layer 1 has a scale .* no k_scale")):
        for reader in (audit_cache, lambda path: audit_checkpoint(folder / "source", path)):
            with pytest.raises(CheckpointError, match=said):
                reader(path)
        with pytest.raises(CheckpointError, match=said):
            read_cache_scales(path, 2)
    some = change(
        folder,
        tmp_path / "some",
        lambda tensors: [tensors.pop(f"{name[:-14]}{part}_proj.{part}_scale") for part in "kv"],
    )
    for reader in (audit_cache, lambda path: read_cache_scales(path, 2)):
        with pytest.raises(CheckpointError, match="layer 1 has no scale of its cache"):
            reader(some)
    audit = audit_cache(folder / "made")
    assert audit["format"] == "nvfp4" and audit["layers"] == 2 and audit["k_scale"][0] <= audit["k_scale"][1] < 0.1
    assert audit_cache(folder / "cast") == {"format": "nvfp4", "layers": 0, "k_scale": None, "v_scale": None}
