"""Reward models on disk: transformers reads them as classifiers with one label and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint, load_reward_model
from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.reward import RewardModel, reward_model_from
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.train.reward_model import score_answers

QWEN3 = ModelConfig(
    model_type="qwen3",
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    num_experts=0,
    num_shared_experts=0,
    partial_rotary_factor=1.0,
)
PROMPT, ANSWERS = [3, 1, 4, 1, 5], [[9, 2, 6], [5, 3, 5, 8, 9, 7]]


def reward_model(config: ModelConfig = QWEN3) -> RewardModel:
    model = reward_model_from(build_decoder(config, 0), 1)
    with torch.no_grad():
        model.score.weight.mul_(30)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same_rewards(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = reward_model(QWEN3.model_copy(update={"tie_word_embeddings": tied}))
    save_checkpoint(tmp_path / "rm", model)
    assert json.loads((tmp_path / "rm/config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True, dtype=torch.float32
    )
    assert theirs.config.num_labels == 1 and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        want = [float(theirs(input_ids=torch.tensor([PROMPT + answer])).logits) for answer in ANSWERS]
    assert abs(want[0] - want[1]) > 0.1
    assert score_answers(model, [(PROMPT, ANSWERS)])[0] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("config", [QWEN3, ModelConfig(vocab_size=64, mtp=MtpConfig())])
def test_a_reward_model_comes_back_to_the_bit_with_its_scale(config: ModelConfig, tmp_path: Path) -> None:
    model = reward_model(config)
    assert model.mtp is None and model.lm_head is None
    save_checkpoint(tmp_path / "rm", model, extra={"reward_mean": 0.25, "reward_std": 2.0})
    found = load_reward_model(tmp_path / "rm")
    assert (found.reward_mean, found.reward_std) == (0.25, 2.0)
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in model.state_dict().items())


def test_policies_and_reward_models_are_not_taken_for_each_other(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "rm", reward_model())
    save_checkpoint(tmp_path / "policy", build_decoder(QWEN3, 0))
    with pytest.raises(CheckpointError, match=r"Qwen3ForSequenceClassification is not supported"):
        load_checkpoint(tmp_path / "rm")
    with pytest.raises(CheckpointError, match=r"Qwen3ForCausalLM with None labels is no reward model"):
        load_reward_model(tmp_path / "policy")


def test_the_head_is_new_and_the_rest_is_a_copy() -> None:
    decoder = build_decoder(QWEN3, 0)
    model = reward_model_from(decoder, 1)
    assert torch.equal(model.embed_tokens.weight, decoder.embed_tokens.weight)
    assert model.embed_tokens.weight.data_ptr() != decoder.embed_tokens.weight.data_ptr()
    wide = reward_model_from(build_decoder(QWEN3.model_copy(update={"hidden_size": 512}), 0), 1)
    assert float(wide.score.weight.std()) == pytest.approx(513**-0.5, rel=0.1)
