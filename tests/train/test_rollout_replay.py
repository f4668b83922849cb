"""Experts of rollouts: recorded by the engine, replayed in training, and what that does to a quantized mismatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.engine.engine import Engine
from tafkir.errors import TrainingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.quant.rollout import RolloutWeights
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rl import NoAcceptance, RlvrConfig
from tafkir.recipe.rollout import RolloutConfig
from tafkir.records import Completion, Example, Request, SamplingParams, Verdict
from tafkir.runlog.metrics import Metric
from tafkir.train.batch import build_rl_batch
from tafkir.train.loop import Trainer
from tafkir.train.replay import compare_experts, recorded_experts
from tafkir.train.rlvr import RlvrStep
from tafkir.train.rollout import Rollout, RolloutGroup

EOS = 3
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    head_dim=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=128,
)
RECORDING = {"eos_ids": (EOS,), "record_experts": True}


def build() -> Decoder:
    decoder = build_decoder(CONFIG, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return decoder


def roll_out(engine: Engine, *, prompts: int = 5, group: int = 3, max_tokens: int = 20) -> list[RolloutGroup]:
    generator = torch.Generator().manual_seed(1)
    texts = [tuple(torch.randint(4, 64, (3 + 4 * i,), generator=generator).tolist()) for i in range(prompts)]
    asked = [
        Request(f"{i}-{j}", text, SamplingParams(seed=10 * i + j, max_tokens=max_tokens - 3 * i))
        for i, text in enumerate(texts)
        for j in range(group)
    ]
    done = {completion.request_id: completion for completion in engine.complete(asked)}
    verdicts = [Verdict("wrong", float(j % 2), None, "") for j in range(group)]
    return [
        RolloutGroup(
            Example(str(i), "test", "train", "", ""),
            text,
            tuple(Rollout(done[f"{i}-{j}"], "", verdicts[j]) for j in range(group)),
        )
        for i, text in enumerate(texts)
    ]


def quantized_engine(decoder: Decoder, precision: str) -> Engine:
    own = build()
    engine = Engine(
        own,
        prepare_weights=RolloutWeights(RolloutConfig.model_validate({"precision": precision}), 0),
        **RECORDING,  # type: ignore[arg-type]
    )
    engine.load_weights(decoder.state_dict().items(), 0)
    return engine


def forward_experts(decoder: Decoder, ids: tuple[int, ...]) -> Tensor:
    """[tokens, layers, A]: the decoder's choice on a whole sequence, without an engine."""
    with torch.no_grad():
        out = decoder(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)]))
    return torch.stack(out.expert_ids, dim=1)


def number(metrics: Mapping[str, Metric], name: str) -> float:
    value = metrics[name]
    assert isinstance(value, int | float)
    return value


class GivenRollouts:
    """A source that has the same groups at every step."""

    def __init__(self, groups: list[RolloutGroup]) -> None:
        self.groups = groups

    def __call__(self, step: int) -> list[RolloutGroup]:
        return self.groups

    def numbers(self) -> dict[str, Any]:
        return {}

    def state(self) -> None:
        return None

    def load_state(self, state: Any) -> None:
        return None


def step_of(decoder: Decoder, groups: list[RolloutGroup], **changes: Any) -> RlvrStep:
    values = {
        "acceptance": NoAcceptance(),
        "steps": 4,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "monitor": {"on_red": "warn"},
        **changes,
    }
    config = RlvrConfig(**values)
    return RlvrStep(Trainer(decoder, config), GivenRollouts(groups), config, reference=None)


@pytest.mark.parametrize("max_batch", [4, 64])
def test_the_engine_records_what_a_whole_forward_chooses(max_batch: int) -> None:
    decoder = build()
    # A small batch makes sequences end, wait, and change their rows.
    groups = roll_out(Engine(decoder, max_batch=max_batch, **RECORDING))  # type: ignore[arg-type]
    lengths = set()
    for group in groups:
        for rollout in group.rollouts:
            found: Tensor = rollout.completion.expert_ids
            fed = group.prompt_ids + rollout.completion.token_ids[:-1]
            assert found.dtype == torch.int16 and found.shape == (len(fed), 3, 2)
            assert torch.equal(found.long(), forward_experts(decoder, fed))
            lengths.add(len(fed))
    assert len(lengths) > 4


def test_a_continued_completion_records_its_whole_context() -> None:
    decoder = build()
    engine = Engine(decoder, **RECORDING)  # type: ignore[arg-type]
    prompt = (5, 6, 7, 8)
    whole = next(iter(engine.complete([Request("a", prompt, SamplingParams(seed=1, max_tokens=12))])))
    cut = 5
    request = Request("b", prompt, SamplingParams(seed=1, max_tokens=12), whole.token_ids[:cut])
    rest = next(iter(engine.complete([request])))
    assert rest.token_ids == whole.token_ids[cut:]
    assert torch.equal(rest.expert_ids, whole.expert_ids)


def test_recording_changes_no_token_and_is_off_by_default() -> None:
    decoder = build()
    plain, recorded = roll_out(Engine(decoder, eos_ids=(EOS,))), roll_out(Engine(decoder, **RECORDING))  # type: ignore[arg-type]
    for a, b in zip(plain, recorded, strict=True):
        for one, other in zip(a.rollouts, b.rollouts, strict=True):
            assert one.completion == replace(other.completion, expert_ids=None)


def test_the_layout_of_the_record_is_that_of_the_batch() -> None:
    decoder = build()
    groups = roll_out(Engine(decoder, **RECORDING))  # type: ignore[arg-type]
    batch = build_rl_batch(groups, [[0.0] * 3] * 5)
    out = decoder(batch.input_ids_N, batch.positions_N, batch.attention)
    # The very choices that training makes by itself at equal weights.
    assert all(torch.equal(own, ids) for own, ids in zip(out.expert_ids, batch.expert_ids, strict=True))
    agreement = compare_experts(out.expert_ids, batch.expert_ids)
    assert set((agreement + agreement).metrics().values()) == {1.0} and len(agreement.same_tokens) == 3


def test_tokens_without_a_record_choose_for_themselves() -> None:
    groups = roll_out(Engine(build(), **RECORDING))  # type: ignore[arg-type]
    first = groups[0]
    bare = [replace(r, completion=replace(r.completion, expert_ids=None)) for r in first.rollouts]
    ids = recorded_experts([replace(first, rollouts=(bare[0], *first.rollouts[1:])), *groups[1:]])
    prompt, fed = len(first.prompt_ids), len(bare[0].completion.token_ids) - 1
    assert (ids[0][prompt : prompt + fed] == -1).all() and (ids[0][:prompt] >= 0).all()
    assert (ids[0][prompt + fed :] >= 0).all()
    ids = recorded_experts([replace(first, rollouts=tuple(bare)), *groups[1:]])
    total = prompt + sum(len(r.completion.token_ids) - 1 for r in bare)
    assert (ids[0][:total] == -1).all() and (ids[0][total:] >= 0).all()
    nothing = [replace(group, rollouts=tuple(bare)) for group in groups[:1]]
    assert recorded_experts(nothing) == [] and compare_experts([], []).metrics() == {}


def test_a_record_of_another_length_is_refused() -> None:
    groups = roll_out(Engine(build(), **RECORDING))  # type: ignore[arg-type]
    rollout = groups[0].rollouts[0]
    short: Completion = replace(rollout.completion, expert_ids=rollout.completion.expert_ids[:-1])
    broken = replace(groups[0], rollouts=(replace(rollout, completion=short), *groups[0].rollouts[1:]))
    with pytest.raises(TrainingError, match="records the experts"):
        recorded_experts([broken])


def test_replay_without_a_record_is_refused() -> None:
    decoder = build()
    groups = roll_out(Engine(decoder, eos_ids=(EOS,)))
    with pytest.raises(TrainingError, match="do not say which experts"):
        step_of(decoder, groups, rollout=RolloutConfig(replay_experts=True))(0)


def test_replay_at_equal_weights_changes_nothing() -> None:
    rows = []
    for replay in (False, True):
        decoder = build()
        groups = roll_out(Engine(build(), **RECORDING))  # type: ignore[arg-type]
        step = step_of(decoder, groups, rollout=RolloutConfig(replay_experts=replay))
        rows.append((step(0).metrics, {name: p.detach().clone() for name, p in decoder.named_parameters()}))
    assert rows[0][0] == rows[1][0]
    assert all(torch.equal(a, b) for a, b in zip(rows[0][1].values(), rows[1][1].values(), strict=True))
    assert number(rows[0][0], "mismatch/abs_logprob_diff_max") < 1e-4


@pytest.mark.parametrize("precision", ["nvfp4", "fp8"])
def test_replay_of_quantized_rollouts_ends_the_disagreement_and_lowers_the_mismatch(precision: str) -> None:
    metrics = {}
    for replay in (False, True):
        decoder = build()
        groups = roll_out(quantized_engine(decoder, precision), prompts=8, group=6, max_tokens=40)
        step = step_of(decoder, groups, rollout=RolloutConfig(precision="nvfp4", replay_experts=replay))
        metrics[replay] = step(0).metrics
    own, replayed = metrics[False], metrics[True]
    assert 0.5 < number(own, "mismatch/expert_agreement") < 1
    assert number(replayed, "mismatch/expert_agreement") == number(replayed, "mismatch/same_experts/2") == 1
    assert 0 < number(replayed, "mismatch/abs_logprob_diff_mean") < number(own, "mismatch/abs_logprob_diff_mean")
    assert number(replayed, "mismatch/kl") < number(own, "mismatch/kl")


def test_agreement_counts_experts_and_tokens() -> None:
    chosen = [torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[0, 1], [2, 3], [4, 5]])]
    recorded = [torch.tensor([[1, 0], [2, 7], [-1, -1]]), torch.tensor([[6, 7], [3, 2], [-1, -1]])]
    found = compare_experts(chosen, recorded) + compare_experts([], [])
    # Five of eight experts in common; one of two tokens whole in either layer.
    assert found.metrics() == {
        "mismatch/expert_agreement": 5 / 8,
        "mismatch/same_experts/0": 0.5,
        "mismatch/same_experts/1": 0.5,
    }


def test_log_probabilities_that_stay_fixed_over_updates_are_replayed_too() -> None:
    decoder = build()
    groups = roll_out(quantized_engine(decoder, "nvfp4"))
    rows = []
    for updates in (1, 2):
        config = {"rollout": RolloutConfig(precision="nvfp4", replay_experts=True), "updates_per_rollout": updates}
        rows.append(step_of(build(), groups, **config)(0).metrics)
    # Both compare the rollouts with the same weights on the same experts, whatever the updates did.
    assert number(rows[0], "mismatch/abs_logprob_diff_mean") == number(rows[1], "mismatch/abs_logprob_diff_mean")
