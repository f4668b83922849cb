"""The step of reinforcement learning: dynamic sampling, overlong completions, and rollouts that are no good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rl import RlvrConfig
from tafkir.records import Completion, Example, FinishReason, Request, Verdict
from tafkir.runlog.metrics import Metric
from tafkir.train.loop import Trainer
from tafkir.train.rlvr import RlvrStep
from tafkir.train.rollout import Rollout, RolloutGroup, SynchronousRollouts

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_experts=0,
    head_dim=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    max_position_embeddings=64,
)
Try = tuple[list[int], float]


def group(*tries: Try, finish: FinishReason = "stop") -> RolloutGroup:
    rollouts = [
        Rollout(Completion("r", tuple(ids), (-3.4,) * len(ids), finish), "", Verdict("wrong", reward, None, ""))
        for ids, reward in tries
    ]
    return RolloutGroup(Example("sum-7", "test", "train", "", ""), (1, 2, 3), tuple(rollouts))


class Fixed:
    """The same groups every step."""

    def __init__(self, *groups: RolloutGroup) -> None:
        self.groups = groups

    def __call__(self, step: int) -> Sequence[RolloutGroup]:
        return self.groups

    def numbers(self) -> Mapping[str, Metric]:
        return {}

    def state(self) -> Any:
        return None

    def load_state(self, state: Any) -> None: ...


def learn(*groups: RolloutGroup, **keys: Any) -> tuple[Mapping[str, Metric], dict[str, Tensor]]:
    """One step without a mask; its metrics, and the weights after it."""
    config = RlvrConfig.model_validate({"warmup_steps": 0, "acceptance": {"kind": "none"}, **keys})
    trainer = Trainer(build_decoder(MODEL, 0), config)
    trainer.set_step(0)
    output = RlvrStep(trainer, Fixed(*groups), config, reference=None)(0)
    return output.metrics, {name: value.clone() for name, value in trainer.decoder.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


class Digits:
    """A completer that answers with the last token of the prompt, twice; the second try adds one to it."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], int | None]] = []

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append((request.prompt_ids, request.params.seed))
            token = request.prompt_ids[-1] + int(request.id) % 2
            yield Completion(request.id, (token,), (-1.0,), "stop")

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...


class Even:
    """Rewards an even token; of problems below 10 every answer is wrong."""

    name = "even"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        return Verdict("wrong", float(int(text) >= 10 and int(text) % 2 == 0), None, "")


class Numbers:
    """A tokenizer whose text is the token's number."""

    turn_end_id = 0

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


def sample(max_resamples: int, step: int = 3) -> tuple[list[int], Digits]:
    """The problems of a step are the step and ten more; those of step 13 and 23, when asked for, lie above ten."""
    config = RlvrConfig(steps=10, group_size=2, prompts_per_step=2, max_resamples=max_resamples)
    completer = Digits()
    source = SynchronousRollouts(
        completer,
        Numbers(),  # type: ignore[arg-type]  # has what is asked of a tokenizer
        Even(),  # type: ignore[arg-type]  # grades, and has no examples of its own
        lambda at: [(Example(str(x), "t", "train", "", ""), [x]) for x in (at, 2 if at < 23 else at + 10)],
        config,
        weights=lambda: [],
        seed=1,
    )
    return [int(found.example.id) for found in source(step)], completer


def test_dynamic_sampling_fills_the_batch_with_other_problems() -> None:
    assert sample(0)[0] == [3, 2]
    assert sample(1)[0] == [13, 2]
    groups, completer = sample(2)
    assert groups == [13, 23]
    # The third draw takes the place of the one group that is left.
    assert [prompt[0] for prompt, _ in completer.asked] == [3, 3, 2, 2, 13, 13, 2, 2, 23, 23]
    assert len({seed for _, seed in completer.asked}) == 10
    assert sample(2)[1].asked == completer.asked
    assert sample(5)[0] == [13, 23]


def test_overlong_completions_lose_reward() -> None:
    """Both tries are right, one at the limit: without the punishment there is nothing to learn."""
    tries = group(([5, 6, 2], 1.0), ([7] * 8, 1.0))
    plain, _ = learn(tries, max_completion_tokens=8)
    assert plain["train/skipped"] == 1.0
    shaped, _ = learn(tries, max_completion_tokens=8, overlong={"buffer_tokens": 4, "penalty": 0.5})
    assert "train/skipped" not in shaped and shaped["rollout/reward_mean"] == 1.0
    # An explicit reward of a half does the same.
    _, after = learn(group(([5, 6, 2], 1.0), ([7] * 8, 0.5)), max_completion_tokens=8)
    _, punished = learn(tries, max_completion_tokens=8, overlong={"buffer_tokens": 4, "penalty": 0.5})
    assert same(after, punished)


def test_truncated_completions_can_be_left_out() -> None:
    """With two tries, centred rewards are 1/2 and -1/2: both cut off leave no gradient at all."""
    cut = group(([5, 6, 7], 1.0), ([7, 8, 9], 0.0), finish="length")
    taught, _ = learn(cut)
    silent, _ = learn(cut, overlong={"drop_truncated": True})
    assert taught["train/grad_norm"] != 0 and silent["train/grad_norm"] == 0


def test_an_empty_completion_counts_and_teaches_nothing() -> None:
    metrics, after = learn(group(([5, 6], 1.0), ([], 0.0)))
    assert metrics["rollout/empty"] == 0.5
    assert all(torch.isfinite(value).all() for value in after.values())
    # The mean is over two completions, of which one has something to say: 1/2 times its advantage of 1/2.
    dry, _ = learn(group(([5, 6], 1.0), ([], 0.0)), advantage="dr_grpo")
    assert dry["train/loss"] == pytest.approx(-0.25, abs=1e-6)
    nothing, _ = learn(group(([], 1.0), ([], 0.0)))
    assert nothing["train/skipped"] == 1.0


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(reward: float) -> None:
    with pytest.raises(TrainingError, match=r"problem sum-7: the reward of completion 1 is (nan|inf); expected a fin"):
        learn(group(([5, 6], 1.0), ([5], reward)))


def test_what_the_grader_could_not_judge_is_left_out_and_counted() -> None:
    """A sandbox that failed says nothing about the answer: the step is that of the other groups alone."""
    good = group(([5, 6], 1.0), ([7], 0.0)), group(([8], 0.0), ([9, 4], 1.0))
    bad = group(([5], 0.0), ([6], 1.0))
    broken = replace(bad.rollouts[0].verdict, outcome="error", reason="no bwrap", failure="sandbox")
    bad = replace(bad, rollouts=(replace(bad.rollouts[0], verdict=broken), bad.rollouts[1]))
    for keys in ({}, {"advantage": "reinforce++"}):
        metrics, after = learn(*good, bad, **keys)
        plain, want = learn(*good, **keys)
        assert metrics == plain | {"rollout/ungraded": 1.0} and same(after, want)
    with pytest.raises(TrainingError, match=r"rlvr step 1: 1 of 2 answers could not be graded; the first: no bwrap"):
        learn(bad)


@pytest.mark.parametrize("pieces", [2, 3])
def test_micro_batches_make_the_same_step(pieces: int) -> None:
    draw = torch.Generator().manual_seed(3)
    groups = [
        group(*((torch.randint(4, 32, (n,), generator=draw).tolist(), float(n % 2)) for n in (2, 5, 7)))
        for _ in range(3)
    ]
    for keys in ({}, {"reduction": "token_mean"}, {"surrogate": "gspo", "acceptance": {"kind": "seq_tis"}}):
        one, whole = learn(*groups, **keys)
        many, split = learn(*groups, micro_batches=pieces, **keys)
        assert many["train/loss"] == pytest.approx(one["train/loss"], abs=1e-6)
        assert many["train/grad_norm"] == pytest.approx(one["train/grad_norm"], abs=1e-6)
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, atol=2e-5, rtol=0, msg=name)
