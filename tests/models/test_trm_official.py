"""Ours against the official TRM and HRM code: the same weights and inputs, answers, gradients and carries to 1e-5."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.models.trm import Trm, TrmState
from tafkir.models.trm_names import official_name, official_names, shape_from_official
from tafkir.ops.stable_max import stable_max_loss, stable_max_loss_reference
from tafkir.recipe.trm import TrmShape
from tests.models.trm_official import (
    BATCH,
    CELLS,
    COMMON,
    FIXTURE,
    IDS,
    SHOWN_STEPS,
    VARIANTS,
    VOCAB,
    batches,
    fill,
    sample,
)

RECORDED: dict[str, Any] = json.loads(FIXTURE.read_text())["variants"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def shape_of(variant: str) -> TrmShape:
    theirs = COMMON | VARIANTS[variant]
    width = theirs["puzzle_emb_ndim"]
    return TrmShape(
        vocab_size=VOCAB,
        sequence_length=CELLS,
        num_puzzle_ids=IDS if width else 1,
        hidden_size=theirs["hidden_size"],
        num_attention_heads=theirs["num_heads"],
        mixer="mlp" if theirs.get("mlp_t") else "attention",
        position_encoding=theirs["pos_encodings"],
        prefix_length=theirs.get("puzzle_emb_len", -(-width // theirs["hidden_size"])),
        puzzle_embedding_size=width,
        num_recursions=theirs["H_cycles"],
        num_latent_steps=theirs["L_cycles"],
        max_supervision_steps=theirs["halt_max_steps"],
        latents="z" if variant == "single" else "yz",
        separate_networks=variant == "hrm",
        gradient="one_step" if variant == "hrm" else "recursion",
    )


def official_weights(variant: str) -> Trm:
    """Our model with the weights that the official one was given, by their names."""
    model = Trm(shape_of(variant))
    names = official_names(list(model.state_dict()), model.shape)
    with torch.no_grad():
        fill({names[name]: tensor for name, tensor in model.state_dict().items() if name in names})
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_inference_steps(variant: str) -> None:
    model, batch = official_weights(variant).eval(), batches()[-1]
    outputs = list(model.steps(batch["inputs"], batch["puzzle_identifiers"]))
    assert len(outputs) == 16
    logits = torch.stack([outputs[step].logits for step in SHOWN_STEPS])
    q = torch.stack([torch.stack((out.q_halt, out.q_continue)) for out in outputs])
    torch.testing.assert_close(logits, torch.tensor(RECORDED[variant]["solve"]["logits"]), **TOLERANCE)
    torch.testing.assert_close(q, torch.tensor(RECORDED[variant]["solve"]["q"]), **TOLERANCE)


def first_gradients(variant: str, loss_of: Any = stable_max_loss) -> tuple[float, dict[str, Tensor]]:
    """Token loss of the first training step, and all gradients of it and of the halting loss."""
    model, batch = official_weights(variant).train(), batches()[0]
    out = model(model.start(BATCH), batch["inputs"], batch["puzzle_identifiers"])
    known = batch["labels"] != -100
    loss = (loss_of(out.logits, batch["labels"]).sum(-1) / known.sum(-1)).sum() / BATCH
    right = ((out.logits.argmax(-1) == batch["labels"]) | ~known).all(-1)
    q_loss = torch.nn.functional.binary_cross_entropy_with_logits(out.q_halt, right.float())
    (loss if variant == "hrm" else loss + 0.5 * q_loss).backward()
    names = official_names([name for name, _ in model.named_parameters()], model.shape)
    return loss.item(), {names[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_of", [stable_max_loss, stable_max_loss_reference])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_one_training_step(variant: str, loss_of: Any) -> None:
    recorded = RECORDED[variant]["train"][0]
    loss, gradients = first_gradients(variant, loss_of)
    assert loss == pytest.approx(recorded["loss"], rel=1e-5)
    # HRM's halting loss is left out on both sides; where nothing flows theirs is absent or zero.
    compared = set(recorded["gradients"]) & set(gradients)
    assert compared >= set(recorded["gradients"]) - {"q_head.weight", "q_head.bias"}
    for name in compared:
        got, want = torch.tensor(sample(gradients[name])), torch.tensor(recorded["gradients"][name])
        torch.testing.assert_close(got, want, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_tell_the_shape(variant: str) -> None:
    shape = shape_of(variant)
    model = Trm(shape)
    sizes = {official_name(n): tuple(t.shape) for n, t in model.state_dict().items()}
    if shape.latents == "z":
        del sizes["H_init"]
    known = {key: getattr(shape, key) for key in ("num_attention_heads", "num_recursions", "num_latent_steps")}
    known |= {"prefix_length": shape.prefix_length, "sequence_length": CELLS}
    known |= {"position_encoding": shape.position_encoding, "num_puzzle_ids": shape.num_puzzle_ids}
    assert shape_from_official(sizes, **known) == shape


def test_a_state_is_detached() -> None:
    model, batch = official_weights("mlp").train(), batches()[0]
    state = model(model.start(BATCH), batch["inputs"], batch["puzzle_identifiers"]).state
    assert isinstance(state, TrmState) and not state.y.requires_grad and not state.z.requires_grad
