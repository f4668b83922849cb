"""Partial rollouts and rollouts of older weights: the same tokens as in one piece, and the same again after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.engine.engine import Engine
from tafkir.errors import BackendUnavailable, CheckpointError, RecipeError
from tafkir.models.decoder import Decoder
from tafkir.recipe.load import load_recipe
from tafkir.recipe.long_tail import LongTailConfig
from tafkir.recipe.rl import RlvrConfig
from tafkir.records import Completion, Example, Message, Request, Verdict
from tafkir.train.long_tail import PooledRollouts, StaleRollouts, join_pieces, open_rollouts
from tafkir.train.rollout import RolloutGroup, RolloutSource, SynchronousRollouts
from tafkir.train.rollout_state import load_completion, load_example, save_completion, save_example
from tests.engine.conftest import build_tiny

P, G = 3, 3
# So many that lengths differ: about one token in ten ends a completion.
STOPS = (3, 4, 5, 6, 7, 8)
EOS = STOPS[0]


class Words:
    turn_end_id = EOS

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class EvenLength:
    """Rewards an even number of tokens."""

    name = "even"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        even = len(text.split()) % 2 == 0
        return Verdict("correct" if even else "wrong", float(even), text, example.answer)


def prompts(step: int) -> list[tuple[Example, list[int]]]:
    """Prompts of different lengths, with an `extra` that JSON alone would not bring back."""
    chosen = []
    for i in range(P):
        number = step * P + i
        extra = {"cells": ((1, 2), (3,)), "talk": (Message("user", "٣"),), 7: [1.5]}
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(4, 60, (2 + number % 5,), generator=generator).tolist()
        chosen.append((Example(f"p{number}", "test", "train", "?", "1", extra), ids))
    return chosen


@pytest.fixture(scope="module")
def decoders() -> list[Decoder]:
    """The policy after 0, 1, 2 ... steps."""
    return [build_tiny(seed) for seed in range(6)]


def make(
    decoders: Sequence[Decoder], *, moving: bool = True, engine: Any = None, **options: Any
) -> tuple[RolloutSource, Callable[[int], None]]:
    """A source, and what moves the policy to the weights of a step."""
    tail = {
        key: options.pop(key)
        for key in ("token_budget", "pool_prompts", "max_retention", "staleness")
        if key in options
    }
    config = RlvrConfig(
        prompts_per_step=P,
        group_size=G,
        max_completion_tokens=16,
        steps=6,
        long_tail=LongTailConfig(**tail),
        **options,
    )
    now = [0]

    def weights() -> Iterable[tuple[str, Tensor]]:
        return decoders[now[0] if moving else 0].state_dict().items()

    def move(step: int) -> None:
        now[0] = step

    completer = engine or Engine(build_tiny(9), eos_ids=STOPS, max_batch=16)
    words: Any = Words()
    task: Any = EvenLength()
    return open_rollouts(completer, words, task, prompts, config, weights=weights, seed=5), move


def run(source: RolloutSource, move: Callable[[int], None], steps: Iterable[int]) -> list[Sequence[RolloutGroup]]:
    done = []
    for step in steps:
        move(step)
        done.append(source(step))
    return done


def test_nothing_changes_where_nothing_is_asked_for(decoders: list[Decoder]) -> None:
    source, _ = make(decoders)
    assert type(source) is SynchronousRollouts
    assert source.state() is None and source.numbers() == {}


@pytest.mark.parametrize("budget", [1, 15, 10_000])
def test_cut_completions_are_those_of_one_piece(decoders: list[Decoder], budget: int) -> None:
    """With weights that stand still, whatever is cut and however often, problem n gets its synchronous completions."""
    whole, _ = make(decoders, moving=False)
    expected = {group.example.id: group for step in range(4) for group in whole(step)}
    source, _ = make(decoders, moving=False, token_budget=budget, max_retention=99)
    seen: list[str] = []
    cut = 0
    for step in range(4):
        groups = source(step)
        assert groups
        numbers = source.numbers()
        assert numbers["rollout/finished_groups"] == len(groups)
        assert len(groups) == P or sum(len(r.completion.token_ids) for g in groups for r in g.rollouts) >= budget
        for group in groups:
            seen.append(group.example.id)
            for ours, theirs in zip(group.rollouts, expected[group.example.id].rollouts, strict=True):
                assert ours.completion.token_ids == theirs.completion.token_ids
                assert ours.completion.logprobs == pytest.approx(theirs.completion.logprobs, abs=2e-5)
                assert ours.completion.finish_reason == theirs.completion.finish_reason
                assert ours.verdict == theirs.verdict
                cut += bool(ours.completion.token_versions)
    assert len(seen) == len(set(seen))
    assert (cut > 0) == (budget < 10_000)
    if budget == 10_000:
        assert [f"p{n}" for n in range(4 * P)] == seen


def test_every_token_has_the_log_probability_of_the_weights_that_sampled_it(decoders: list[Decoder]) -> None:
    source, move = make(decoders, token_budget=20, max_retention=99)
    mixed = 0
    for step, groups in enumerate(run(source, move, range(6))):
        for group in groups:
            for done in (rollout.completion for rollout in group.rollouts):
                versions = done.token_versions or (done.policy_version,) * len(done.token_ids)
                assert len(versions) == len(done.logprobs) == len(done.token_ids)
                assert list(versions) == sorted(versions) and versions[-1] == done.policy_version <= step
                mixed += len(set(versions)) > 1
                for version in set(versions):
                    scorer = Engine(decoders[version], eos_ids=STOPS)
                    (scored,) = scorer.score([group.prompt_ids + done.token_ids])
                    scored = scored[-len(done.logprobs) :]
                    own = torch.tensor([v == version for v in versions])
                    torch.testing.assert_close(torch.tensor(done.logprobs)[own], scored[own], atol=2e-5, rtol=0)
    assert mixed > 0
    assert source.numbers()["rollout/stale_tokens"] > 0


def test_what_is_cut_too_often_is_dropped_counted_and_replaced(decoders: list[Decoder]) -> None:
    source, move = make(decoders, token_budget=1, max_retention=1, pool_prompts=5)
    assert isinstance(source, PooledRollouts)
    seen: set[str] = set()
    dropped = 0.0
    for step in range(6):
        move(step)
        seen |= {group.example.id for group in source(step)}
        numbers = source.numbers()
        dropped += numbers["rollout/dropped_groups"]  # type: ignore[operator]
        assert numbers["rollout/carried_groups"] + numbers["rollout/finished_groups"] == 5  # type: ignore[operator]
        assert numbers["rollout/lag_max"] <= 1  # type: ignore[operator]
    assert dropped > 0
    begun = source.state()["next"]
    assert begun == len(seen) + dropped + source.numbers()["rollout/carried_groups"]  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"token_budget": 20},
        {"staleness": 2},
        {"token_budget": 20, "staleness": 1, "pool_prompts": 4},
    ],
)
def test_a_source_that_resumes_gives_the_same_rollouts_to_the_last_bit(
    decoders: list[Decoder], options: dict[str, int]
) -> None:
    unbroken, move = make(decoders, **options)
    expected = run(unbroken, move, range(6))
    killed, move = make(decoders, **options)
    assert run(killed, move, range(3)) == expected[:3]
    text = json.dumps(killed.state(), ensure_ascii=False)
    resumed, move = make(decoders, **options)
    resumed.load_state(json.loads(text))
    assert run(resumed, move, range(3, 6)) == expected[3:]
    assert resumed.numbers() == unbroken.numbers()
    assert any(rollout.completion.logprobs for groups in expected[3:] for g in groups for rollout in g.rollouts)


@pytest.mark.parametrize("staleness", [2, 9])
def test_stale_rollouts_are_those_of_older_weights(decoders: list[Decoder], staleness: int) -> None:
    source, move = make(decoders, staleness=staleness)
    assert isinstance(source, StaleRollouts)
    got = run(source, move, range(6))
    fresh, move_fresh = make(decoders)
    assert isinstance(fresh, SynchronousRollouts)
    for step, groups in enumerate(got):
        version = max(0, step - staleness)
        move_fresh(version)
        fresh.refresh(version)
        assert groups == fresh.sample(step)
        assert {r.completion.policy_version for group in groups for r in group.rollouts} == {version}
    assert source.numbers()["rollout/lag_mean"] == pytest.approx(min(5, staleness))
    assert source.state() == {"sampled": 6, "queue": [], "source": None}


class OneShot:
    """A completer that cannot be stopped."""

    def complete(self, requests: Sequence[Request]) -> Iterable[Completion]:
        return iter(())

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...


def test_what_cannot_work_is_refused(decoders: list[Decoder]) -> None:
    with pytest.raises(BackendUnavailable, match="cannot stop and go on"):
        make(decoders, token_budget=5, engine=OneShot())
    assert isinstance(make(decoders, staleness=1, engine=OneShot())[0], StaleRollouts)
    with pytest.raises(RecipeError, match="max_resamples"):
        make(decoders, token_budget=5, max_resamples=1)


def test_pieces_join_with_versions_and_experts() -> None:
    ids = torch.arange(12, dtype=torch.int16).view(6, 2, 1)
    begun = Completion("a", (5, 6), (-1.0, -2.0), "cancelled", 3, expert_ids=ids[:3])
    piece = Completion("x", (7, EOS), (-0.5, -0.25), "stop", 4, expert_ids=-ids[:5] - 1)
    done = join_pieces(begun, piece)
    assert done.request_id == "a" and done.token_ids == (5, 6, 7, EOS) and done.logprobs == (-1.0, -2.0, -0.5, -0.25)
    assert done.token_versions == (3, 3, 4, 4) and done.policy_version == 4 and done.finish_reason == "stop"
    assert torch.equal(done.expert_ids, torch.cat((ids[:3], -ids[3:5] - 1)))
    nothing = join_pieces(begun, Completion("x", (), (), "cancelled", 4))
    assert nothing == replace(begun, expert_ids=nothing.expert_ids) and nothing.policy_version == 3
    assert join_pieces(begun, replace(piece, policy_version=3)).token_versions == ()


def test_state_brings_everything_back() -> None:
    ids = torch.tensor([[[300, -1], [2, 3]]], dtype=torch.int16)
    done = Completion("1.2", (4, 5), (-0.1, -1 / 3), "cancelled", 2, ids, (1, 2))
    back = load_completion(json.loads(json.dumps(save_completion(done))))
    assert torch.equal(back.expert_ids, ids) and replace(back, expert_ids=None) == replace(done, expert_ids=None)
    example = prompts(0)[0][0]
    assert load_example(json.loads(json.dumps(save_example(example)))) == example
    with pytest.raises(CheckpointError, match=r"example p0.*set"):
        save_example(replace(example, extra={"bad": {1}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rlvr.keep_rollouts=5MB", "rlvr.keep_rollouts: '5MB' is neither 'all' nor 'none', '50 steps' or '256 MB'"),
        ("rlvr.long_tail.pool_prompts=3", "rlvr.long_tail: pool_prompts is the pool of a token budget"),
        ("rlvr.long_tail.budget=3", "unknown key.*rlvr.long_tail.token_budget"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["smoke"], [override])
