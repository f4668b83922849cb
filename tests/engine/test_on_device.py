"""Decoders on their way to a device: the numbers of the weights as they are stored, under torch and under Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.checkpoint import save_checkpoint
from tafkir.checkpoint.packed import load_packed
from tafkir.engine.paged_engine import PagedEngine
from tafkir.errors import BackendUnavailable
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.on_device import has_static_steps, move_to_device
from tafkir.ops import native
from tafkir.ops.device import device_kernels
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.records import Request, SamplingParams
from tafkir.serve.loading import build_engine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts and a dense layer in NVFP4; embeddings and head in bfloat16."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=64,
        moe_intermediate_size=16, num_experts=8, max_position_embeddings=64,
    )  # fmt: skip
    decoder = build_decoder(config, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    place = tmp_path_factory.mktemp("on_device")
    save_checkpoint(place / "whole", decoder, dtype=torch.bfloat16)
    quantize_checkpoint(place / "whole", place / "coded", QuantizeConfig(preset="all-linear"))
    return place / "coded"


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    """The processor's own kernels would take over what a device has to do itself."""
    before = native.kernels_in_use()
    native.select_kernels("torch")
    yield
    native.select_kernels(before)


def logits_of(decoder: Decoder) -> Tensor:
    ids = torch.arange(5, 25)
    with torch.inference_mode():
        hidden = decoder(ids, torch.arange(20), VarlenCausal([0, 13, 20])).hidden_ND
        return decoder.logits(hidden)


def kinds(decoder: Decoder) -> set[str]:
    return {type(module).__name__ for module in decoder.modules()}


def test_by_torch(folder: Path, latent_decoder: Decoder) -> None:
    """All matrices expanded; a decoder that is not packed keeps its values, and its numbers."""
    packed = load_packed(folder).decoder
    moved = move_to_device(packed, CPU, dtype=torch.float32, kernels="torch")
    assert type(moved) is Decoder
    assert not any(name.startswith(("Packed", "Nvfp4")) for name in kinds(moved))
    assert not has_static_steps(moved)
    torch.testing.assert_close(logits_of(moved), logits_of(packed), rtol=0, atol=2e-5)
    expected = logits_of(latent_decoder)
    assert torch.equal(logits_of(move_to_device(latent_decoder, CPU, dtype=torch.float32)), expected)
    half = move_to_device(load_packed(folder).decoder, CPU)
    assert half.head_weight.dtype == half.embed_tokens.weight.dtype == torch.bfloat16
    assert half.routers[0].weight.dtype == torch.float32
    assert float((logits_of(half) - logits_of(packed)).abs().max()) < 0.1 * float(logits_of(packed).abs().max())


def test_by_triton(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes stay; whole requests through an engine with static steps and attention over blocks: the same tokens."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the triton package is not installed here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tafkir.ops.triton.paged_attention import paged_attention

    packed = load_packed(folder).decoder
    moved = move_to_device(packed, CPU, dtype=torch.float32, kernels="triton")
    assert {"Nvfp4Linear", "Nvfp4Experts"} <= kinds(moved)
    assert has_static_steps(moved)
    asked = [
        Request(str(i), tuple(range(4 + i, 9 + 3 * i)), SamplingParams(max_tokens=4, temperature=i % 2, seed=i))
        for i in range(2)
    ]
    engine = PagedEngine(moved, eos_ids=(), max_batch=4, static_steps=True)
    engine._cache.kernel = paged_attention
    found = {done.request_id: done for done in engine.complete(asked)}
    for done in PagedEngine(packed, eos_ids=(), max_batch=4).complete(asked):
        assert found[done.request_id].token_ids == done.token_ids
        assert found[done.request_id].logprobs == pytest.approx(done.logprobs, abs=2e-5)


def test_refusals_and_what_serves_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="INT8 copy of the output head"):
        move_to_device(load_packed(folder, int8_head=True).decoder, CPU)
    with pytest.raises(BackendUnavailable, match="cpu has no NVFP4 products"):
        move_to_device(load_packed(folder).decoder, CPU, scaled_products=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="torch finds no cuda device"):
        build_engine(folder, None, None, device="cuda")  # type: ignore[arg-type]  # nobody asks for the tokenizer
    cuda, found = torch.device("cuda"), {"triton": object()}

    def look(name: str) -> Any:
        return found.get(name)

    monkeypatch.setattr(importlib.util, "find_spec", look)
    monkeypatch.setenv("TAFKIR_KERNELS", "auto")
    assert (device_kernels(cuda), device_kernels(CPU)) == ("triton", "torch")
    found.clear()
    assert device_kernels(cuda) == "torch"
    monkeypatch.setenv("TAFKIR_KERNELS", "native")
    with pytest.raises(BackendUnavailable, match="triton package is not installed"):
        device_kernels(cuda)
    found["triton"] = object()
    monkeypatch.setenv("TAFKIR_KERNELS", "torch")
    assert device_kernels(cuda) == "torch"
