"""Training for quantization: what is learnt, with which gradients, and that other training is told of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tafkir.data.packing import Document, pack_documents
from tafkir.errors import RecipeError
from tafkir.models.build import build_decoder
from tafkir.ops.loss import IGNORE_INDEX, distillation_loss_reference
from tafkir.quant.fake import fake_quantize
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.qat import QatConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.train.language import language_step
from tafkir.train.mtp import run_decoder
from tafkir.train.qat import QuantizedTrainer, distill_step, divergence
from tests.quant.test_fake import LING, decoder_of

QUICK = QatConfig(learning_rate=1e-3, warmup_steps=1, steps=30, weight_decay=0.0)
FORMATS = QuantizeConfig(preset="all-linear")


def documents(step: int) -> list[Document]:
    """Any token ids: what is learnt is the teacher, not the text."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randint(4, 300, (12,), generator=generator).tolist(), [False] * 4 + [True] * 8) for _ in range(8)]


def test_gradients_are_those_of_the_quantized_model_and_the_update_goes_to_its_own_weights() -> None:
    decoder = decoder_of(LING)
    teacher = copy.deepcopy(decoder)
    trainer = QuantizedTrainer(decoder, QUICK, fake_quantize(decoder, FORMATS, torch.float32))
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    trainer.set_step(5)
    trainer.enter()
    # A decoder whose own weights are the quantized ones has, at them, the same gradients.
    plain = decoder_of(LING)
    plain.load_state_dict(decoder.state_dict())
    fake_quantize(plain, FORMATS)
    seen = {}
    norm = trainer.update

    def update(loads: list[torch.Tensor], *, where: str) -> float:
        seen.update({name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None})
        return norm(loads, where=where)

    trainer.update = update  # type: ignore[method-assign]
    found = distill_step(trainer, teacher, documents, label="qat")(0)
    piece = pack_documents(documents(0))
    wanted = piece.labels_N != IGNORE_INDEX
    hidden, target = (run_decoder(model, piece).hidden_ND[wanted] for model in (plain, teacher))
    loss = distillation_loss_reference(hidden, target.detach(), teacher.head_weight) / int(wanted.sum())
    loss.backward()
    assert found.metrics["train/kl"] == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and name in seen and name != "embed_tokens.weight":
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-6)
    moved = [name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])]
    assert "layers.0.attention.qkv_proj.weight" in moved and "layers.1.mlp.experts.down_proj" in moved
    for name, parameter in decoder.named_parameters():
        assert float((parameter - before[name]).abs().max()) <= 2e-3


def test_distillation_wins_back_what_quantization_costs() -> None:
    decoder = decoder_of(LING)
    teacher = copy.deepcopy(decoder).requires_grad_(False)
    decoder.embed_tokens.requires_grad_(False)
    config = QUICK.model_copy(update={"learning_rate": 3e-4})
    trainer = QuantizedTrainer(decoder, config, fake_quantize(decoder, FORMATS, torch.float32))
    with trainer.quantized():
        before = divergence(decoder, teacher, documents(0))
    step = distill_step(trainer, teacher, lambda number: documents(0), label="qat")
    for number in range(30):
        trainer.set_step(number)
        trainer.enter()
        step(number)
    with trainer.quantized():
        after = divergence(decoder, teacher, documents(0))
    assert 0 < after < 0.6 * before
    assert divergence(teacher, teacher, documents(0)) == pytest.approx(0, abs=1e-6)


def test_text_is_learnt_by_the_code_of_the_other_stages() -> None:
    decoder = decoder_of(LING)
    trainer = QuantizedTrainer(decoder, QUICK, fake_quantize(decoder, FORMATS, torch.float32))
    step = language_step(trainer, lambda number: documents(0), label="qat")
    losses = []
    for number in range(8):
        trainer.set_step(number)
        trainer.enter()
        losses.append(step(number).metrics["train/loss"])
    assert losses[-1] < losses[0]  # type: ignore[operator]


def test_cut_off_weights_stay_where_they_are() -> None:
    decoder = build_decoder(LING, 0)
    quantizer = fake_quantize(decoder, FORMATS, torch.float32)
    trainer = QuantizedTrainer(decoder, QUICK, quantizer)
    name = "layers.0.mlp.down_proj.weight"
    trainer.set_step(5)
    trainer.enter()
    quantizer.inside[name] = torch.zeros_like(decoder.get_parameter(name), dtype=torch.bool)
    quantizer.inside[name][0, 0] = True
    before = dict(trainer._own)
    language_step(trainer, documents, label="qat")(0)
    changed = decoder.get_parameter(name) != before[name]
    assert changed.sum() == 1 or torch.equal(decoder.get_parameter(name), before[name])


def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"formats of a \[quantize\]"):
        load_recipe(["wordmath-tiny"], ["qat.steps=3", "quantize="])
    with pytest.raises(RecipeError, match=r"qat\.baseline"):
        load_recipe(["wordmath-tiny"], ['eval.stages=["ptq"]'])
    with pytest.raises(RecipeError, match="calibration"):
        load_recipe(["wordmath-tiny"], ["qat.steps=3", "quantize.calibration.tokens=512"])


def test_other_formats_make_the_stage_run_again() -> None:
    def fingerprint(*keys: str) -> dict[str, str]:
        return dict(fingerprint_stages(load_recipe(["wordmath-tiny"], list(keys)).recipe, None))

    plain = fingerprint("quantize.preset=all-linear")
    one, other = (fingerprint("qat.steps=3", f"quantize.preset={preset}") for preset in ("all-linear", "tafkir"))
    assert one["qat"] != other["qat"] and one["rlvr"] == other["rlvr"] == plain["rlvr"]
