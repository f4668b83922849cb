"""The MTP loss by hand, its weight's schedule, training on a frozen model bit by bit, and the acceptance rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tafkir.data.packing import Document, pack_documents
from tafkir.errors import RecipeError, TrainingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import add_mtp, build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.mtp import shift_documents
from tafkir.ops.loss import distillation_loss, distillation_loss_reference
from tafkir.ops.rope import rope_table
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.schema import MtpStageConfig, PretrainConfig
from tafkir.runlog.rundir import StageDir
from tafkir.train.language import language_loss, language_step
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.mtp import MtpLoss, measure_mtp, mtp_loss_weight_at
from tafkir.train.mtp_distill import distill_step, freeze_all_but_mtp

SMALL: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "initializer_range": 0.2,
}

PROJECTION = "mtp.layers.0.eh_proj.weight"


def config(**mtp: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | ({"mtp": mtp} if mtp else {}))


def documents_of(step: int, count: int = 6) -> list[Document]:
    """Counting up in steps of one or two: easy to foresee."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 23, (count,), generator=draw).tolist()
    return [([(s + i * (1 + s % 2)) % 23 for i in range(5 + s % 6)], None) for s in starts]


def loss_by_hand(decoder: Decoder, documents: Sequence[Document], weight: float) -> torch.Tensor:
    """λ/D Σ_k CE_k, document by document and position by position, from the paper's indices."""
    assert decoder.mtp is not None
    depth = decoder.mtp.shape.depth
    losses: list[list[torch.Tensor]] = [[] for _ in range(depth)]
    for ids, mask in documents:
        tokens, length = torch.tensor(ids), len(ids)
        wanted = [True] * length if mask is None else list(mask)
        state = decoder(tokens, torch.arange(length), VarlenCausal((0, length))).hidden_ND
        for k in range(1, depth + 1):
            rows = length - k  # every position whose shifted token exists, also those with nothing to predict
            if rows < 1:
                break
            cos, sin = rope_table(torch.arange(rows), decoder.config.rotary_size, decoder.config.rope_theta)
            embedded = decoder.embed_tokens(tokens[k:])
            out = decoder.mtp.layers[k - 1](state[:rows], embedded, cos, sin, VarlenCausal((0, rows)))
            state = out.hidden_MD
            logprobs = decoder.logits(state).log_softmax(-1)
            losses[k - 1] += [-logprobs[i, ids[i + k + 1]] for i in range(length - k - 1) if wanted[i + k + 1]]
    return weight / depth * torch.stack([torch.stack(found).mean() for found in losses]).sum()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loss_by_hand_on_five_tokens(depth: int) -> None:
    decoder = build_decoder(config(depth=depth), 1)
    documents: list[Document] = [([3, 1, 4, 1, 5], None)]
    batch = pack_documents(documents)
    _, out = language_loss(decoder, batch)
    found = MtpLoss(decoder, [batch], 0.3).of_piece(0, out)
    torch.testing.assert_close(found, loss_by_hand(decoder, documents, 0.3), rtol=0, atol=1e-6)


def test_packed_and_masked_documents_in_micro_batches_equal_the_formula() -> None:
    documents: list[Document] = [
        ([3, 1, 4, 1, 5, 9, 2], [False, False, False, True, True, True, False]),
        ([6, 5], None),
        ([3], None),
        ([5, 8, 9, 7], None),
        ([9, 3, 2], [False, True, True]),
    ]
    for parts in ([documents], [documents[:2], documents[2:]]):
        decoder = build_decoder(config(depth=2), 2)
        pieces = [pack_documents(part) for part in parts]
        mtp = MtpLoss(decoder, pieces, 0.5)
        terms = [mtp.of_piece(i, language_loss(decoder, piece)[1]) for i, piece in enumerate(pieces)]
        total = torch.stack(terms).sum()
        by_hand = loss_by_hand(decoder, documents, 0.5)
        torch.testing.assert_close(total, by_hand, rtol=0, atol=1e-6)
        assert mtp.counts.targets == [3 + 2 + 1, 3 + 1]
        weights = [dict(decoder.named_parameters())[name] for name in ("embed_tokens.weight", PROJECTION)]
        gradients, found = torch.autograd.grad(by_hand, weights), torch.autograd.grad(total, weights)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_weight_switches_once() -> None:
    table = PretrainConfig(steps=10, mtp_loss_weight=0.3, mtp_final_loss_weight=0.1, mtp_switch_share=0.7)
    assert [mtp_loss_weight_at(step, table) for step in range(10)] == [0.3] * 7 + [0.1] * 3
    constant = PretrainConfig(steps=10, mtp_loss_weight=0.1)
    assert {mtp_loss_weight_at(step, constant) for step in range(10)} == {0.1}
    assert mtp_loss_weight_at(0, PretrainConfig()) == 0


def trained(decoder: Decoder, steps: int = 3, **table: Any) -> tuple[Decoder, StepOutput]:
    trainer = Trainer(decoder, PretrainConfig(steps=steps, warmup_steps=0, learning_rate=1e-2, **table))
    step = language_step(trainer, documents_of, label="pretrain")
    for i in range(steps):
        trainer.set_step(i)
        output = step(i)
    return decoder, output


def test_off_is_bit_identical_and_touches_no_mtp_weight() -> None:
    without, plain = trained(build_decoder(config(), 3))
    fresh = build_decoder(config(depth=1), 3).state_dict()
    off, output = trained(build_decoder(config(depth=1), 3))
    assert output.metrics == plain.metrics
    state = off.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in without.state_dict().items())
    assert all(torch.equal(state[name], fresh[name]) for name in state if name.startswith("mtp."))


def test_on_trains_layers_and_biases_and_reports_them() -> None:
    fresh = build_decoder(config(depth=2), 3).state_dict()
    decoder, output = trained(build_decoder(config(depth=2), 3), mtp_loss_weight=0.3, micro_batches=2)
    changed = {name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert changed == set(fresh)
    assert output.metrics["train/mtp_loss_weight"] == 0.3
    assert {"train/mtp_loss/1", "train/mtp_loss/2"} <= output.metrics.keys()


def stage(path: Path) -> StageDir:
    found = StageDir(path, "sft")
    found.make()
    return found


def distill(decoder: Decoder, path: Path, *, stop_at: int | None = None, **table: Any) -> None:
    """The stage's loop; `stop_at` dies in the middle of that step."""
    freeze_all_but_mtp(decoder)
    settings: dict[str, Any] = {
        "steps": 8,
        "warmup_steps": 0,
        "learning_rate": 2e-2,
        "save_every": 2,
    } | table
    trainer = Trainer(decoder, MtpStageConfig(**settings))
    step = distill_step(trainer, documents_of, label="sft")

    def train_step(i: int) -> StepOutput:
        if i == stop_at:
            raise KeyboardInterrupt
        return step(i)

    fit(trainer, stage(path), train_step, label="sft")


def test_distilling_changes_the_mtp_layers_alone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    chat = build_decoder(config(), 4)
    add_mtp(chat, MtpConfig(depth=2), seed=5)
    before = {name: tensor.clone() for name, tensor in chat.state_dict().items()}
    distill(chat, tmp_path / "whole", weight_decay=0.5, micro_batches=2)
    after = chat.state_dict()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if not name.startswith("mtp.")}

    again = build_decoder(config(), 4)
    add_mtp(again, MtpConfig(depth=2), seed=5)
    with pytest.raises(KeyboardInterrupt):
        distill(again, tmp_path / "killed", stop_at=5, weight_decay=0.5, micro_batches=2)
    third = build_decoder(config(), 4)
    add_mtp(third, MtpConfig(depth=2), seed=6)  # its fresh weights are overwritten by the state
    distill(third, tmp_path / "killed", weight_decay=0.5, micro_batches=2)
    assert all(torch.equal(tensor, after[name]) for name, tensor in third.state_dict().items())
    rows = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("whole", "killed")]
    assert rows[0] == rows[1] and '"train/mtp_kl/2"' in rows[0]


def test_distilling_raises_the_acceptance_on_held_out_documents(tmp_path: Path) -> None:
    chat, _ = trained(build_decoder(config(), 7), steps=40)
    add_mtp(chat, MtpConfig(depth=2), seed=1)
    heldout = documents_of(10_001, count=40)
    before = measure_mtp(chat, heldout)
    distill(chat, tmp_path, steps=40)
    after = measure_mtp(chat, heldout)
    for k in (1, 2):
        assert after[f"mtp_acceptance/{k}"] > max(0.8, before[f"mtp_acceptance/{k}"] + 0.3)
        assert after[f"mtp_loss/{k}"] < before[f"mtp_loss/{k}"]


def test_the_acceptance_rate_position_by_position() -> None:
    decoder = build_decoder(config(depth=2), 8)
    documents: list[Document] = [([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True]), ([7, 8, 9], None)]
    assert decoder.mtp is not None
    agreed, counted, surprise = [0, 0], [0, 0], [0.0, 0.0]
    for ids, mask in documents:
        batch = pack_documents([(ids, mask)])
        out = decoder(batch.input_ids_N, batch.positions_N, VarlenCausal(batch.cu_seqlens))
        main = decoder.logits(out.hidden_ND).argmax(-1)
        shifted = shift_documents(batch.input_ids_N, batch.positions_N, batch.labels_N, batch.cu_seqlens, 2)
        outputs = decoder.mtp(out.hidden_ND, out.pre_norm_ND, decoder.embed_tokens, shifted)
        for k, output in enumerate(outputs, start=1):
            logits = decoder.logits(output.hidden_MD)
            for i in range(len(ids) - k - 1):
                if mask is None or mask[i + k + 1]:
                    agreed[k - 1] += int(logits[i].argmax() == main[i + k])
                    surprise[k - 1] += F.cross_entropy(logits[i], torch.tensor(ids[i + k + 1])).item()
                    counted[k - 1] += 1
    found = measure_mtp(decoder, documents, batch_size=1)
    assert counted == [4, 2]
    assert measure_mtp(decoder, documents) == pytest.approx(found, abs=1e-6)
    for k in (1, 2):
        assert found[f"mtp_acceptance/{k}"] == agreed[k - 1] / counted[k - 1]
        assert found[f"mtp_loss/{k}"] == pytest.approx(surprise[k - 1] / counted[k - 1], abs=1e-5)


def test_a_depth_that_no_document_reaches_is_left_out() -> None:
    decoder = build_decoder(config(depth=3), 8)
    assert set(measure_mtp(decoder, [([1, 2, 3], None)])) == {"mtp_acceptance/1", "mtp_loss/1"}
    assert measure_mtp(decoder, [([1, 2], None)]) == {}


def test_distillation_loss_equals_its_reference() -> None:
    draw = torch.Generator().manual_seed(9)
    hidden = torch.randn(300, 16, generator=draw, requires_grad=True)
    teacher, head = torch.randn(300, 16, generator=draw), torch.randn(40, 16, generator=draw)
    loss = distillation_loss(hidden, teacher, head)
    reference = distillation_loss_reference(hidden, teacher, head)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-3)
    (found,) = torch.autograd.grad(loss * 0.5, hidden)
    (wanted,) = torch.autograd.grad(reference * 0.5, hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float(distillation_loss(teacher, teacher, head)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sft.mtp_loss_weight=0.1", "sft.mtp_loss_weight"),
        ("sft.mtp_final_loss_weight=0.1", "sft.mtp_final_loss_weight"),
    ],
)
def test_a_recipe_that_trains_layers_the_model_lacks_is_refused(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=rf"{named}.*model\.mtp"):
        load_recipe(["smoke"], [override])
    assert load_recipe(["smoke"], [override, "model.mtp.depth=1"]).recipe.model.mtp == MtpConfig()


def test_a_decoder_without_layers_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"model\.mtp"):
        freeze_all_but_mtp(build_decoder(config(), 1))
