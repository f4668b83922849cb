"""Pools of Ray actors: the results of one process bit for bit, whoever dies, hangs or is replaced on the way."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tafkir.cluster.actors import PoolLimits
from tafkir.cluster.rollouts import RolloutCalls, RolloutPool, split_requests
from tafkir.cluster.verifiers import VerifierPool
from tafkir.errors import CheckpointError, RequestError, RolloutError
from tafkir.protocols import BatchGrader, Completer, Counting
from tafkir.records import Answer, Completion, Example, Request, SamplingParams
from tests.cluster.faults import BuildEngine, build_tiny
from tests.cluster.graders import Parity

pytestmark = pytest.mark.cluster

# A shared machine may take its time; what hangs hangs longer than this.
LIMITS = PoolLimits(timeout_s=12, start_timeout_s=100, max_attempts=3)


def make_requests(num_prompts: int = 6, group: int = 4) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for p in range(num_prompts):
        ids = tuple(torch.randint(4, 300, (5 + 3 * p,), generator=generator).tolist())
        for _ in range(group):
            made.append(Request(str(len(made)), ids, SamplingParams(max_tokens=10, seed=900 + len(made))))
    return made


def in_process(requests: list[Request], version: int, seed: int, orders: Path) -> dict[str, Completion]:
    calls = RolloutCalls(BuildEngine(str(orders))(), 2)
    calls.load_weights(build_tiny(seed).state_dict().items(), version)
    return {done.request_id: done for done in calls.complete(requests)}


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def pool(ray_address: str, orders: Path) -> Iterator[RolloutPool]:
    """Two workers that stay for all tests: to start one costs seconds."""
    pool = RolloutPool(BuildEngine(str(orders)), 2, prompts_per_call=2, num_threads=1, limits=LIMITS)
    yield pool
    pool.close()


def test_a_call_holds_whole_prompts_and_depends_on_the_requests_alone() -> None:
    requests = make_requests(5, 3)
    calls = split_requests(requests, 2)
    assert [len(call) for call in calls] == [6, 6, 3]
    assert [request for call in calls for request in call] == requests
    assert split_requests([], 2) == []


def test_workers_give_the_results_of_one_process_bit_for_bit(pool: RolloutPool, orders: Path) -> None:
    requests = make_requests()
    assert isinstance(pool, Completer) and isinstance(pool, Counting)
    for version, seed in ((1, 5), (2, 6)):
        pool.load_weights(build_tiny(seed).state_dict().items(), version)
        found = list(pool.complete(requests))
        assert Counter(done.request_id for done in found) == Counter(request.id for request in requests)
        assert {done.request_id: done for done in found} == in_process(requests, version, seed, orders)
    sequences = [list(request.prompt_ids) for request in requests[::5]]
    engine = BuildEngine(str(orders))()
    engine.load_weights(build_tiny(6).state_dict().items(), 2)
    for ours, theirs in zip(pool.score(sequences), [engine.score([ids])[0] for ids in sequences], strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RequestError, match="same id"):
        pool.complete([requests[0], requests[0]])
    assert pool.metrics() == {}


@pytest.mark.parametrize(("order", "counted"), [("die", "died"), ("hang", "stuck")])
def test_a_worker_lost_in_mid_step_is_named_and_costs_no_sample(
    order: str, counted: str, pool: RolloutPool, orders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = make_requests()
    pool.load_weights(build_tiny(5).state_dict().items(), 3)
    before = Counter(pool.metrics())
    (orders / f"order-{order}").touch()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found = list(pool.complete(requests))
    assert time.monotonic() - began < LIMITS.timeout_s + LIMITS.start_timeout_s
    assert Counter(done.request_id for done in found) == Counter(request.id for request in requests)
    assert {done.request_id: done for done in found} == in_process(requests, 3, 5, orders)
    new = Counter(pool.metrics()) - before
    lines = [record.getMessage() for record in caplog.records if "takes its place" in record.getMessage()]
    # On a machine that is slow enough, a worker that works may be late as well.
    assert new[f"cluster/rollout_{counted}"] >= 1
    assert new["cluster/rollout_repeated"] == new.total() / 2 == len(lines)
    assert all(line.startswith("rollout-") and "(process " in line for line in lines)


def test_what_a_worker_raises_is_raised_here_and_the_pool_goes_on(pool: RolloutPool, orders: Path) -> None:
    requests = make_requests(2, 2)
    for order, error, message in (
        ("refuse", CheckpointError, "here: not this one"),
        ("raise", RolloutError, r"rollout-\d failed: ZeroDivisionError: by hand"),
        ("lose one", RolloutError, "3 completions for 4 requests"),
    ):
        (orders / f"order-{order}").touch()
        with pytest.raises(error, match=message):
            list(pool.complete(requests))
    assert len(list(pool.complete(requests))) == 4


def make_answers(count: int = 9) -> list[Answer]:
    return [Answer(Example(str(i), "made", "train", "?", "0"), "x" * i, i % 4 != 0) for i in range(count)]


def test_verifiers_grade_as_the_task_does_and_one_that_dies_or_hangs_loses_no_verdict(
    ray_address: str, tmp_path: Path
) -> None:
    answers = make_answers()
    task = Parity(str(tmp_path))
    plain = [task.grade(answer.example, answer.text, finished=answer.finished) for answer in answers]
    pool = VerifierPool(task, 2, replace(LIMITS, timeout_s=8.0, max_attempts=4))
    assert isinstance(pool, BatchGrader) and pool.name == "parity"
    assert pool.grade_all(answers) == plain
    for order in ("die", "hang"):
        (tmp_path / f"order-{order}").touch()
        assert pool.grade_all(answers) == plain
    metrics = pool.metrics()
    assert metrics["cluster/verifier_died"] == 1 and metrics["cluster/verifier_stuck"] >= 1
    assert pool.grade(answers[2].example, "xx") == plain[2]
    pool.close()


def test_an_answer_that_no_verifier_survives_costs_its_own_reward_only(ray_address: str, tmp_path: Path) -> None:
    pool = VerifierPool(Parity(str(tmp_path), poison="xx"), 1, replace(LIMITS, max_attempts=2))
    verdicts = pool.grade_all(make_answers(4))
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong", "error", "wrong"]
    assert "cost 2 workers" in verdicts[2].reason and "verifier-0" in verdicts[2].reason
    assert verdicts[2].reward == 0
    pool.close()


def test_what_cannot_be_sent_to_a_worker_is_a_named_error(ray_address: str, tmp_path: Path) -> None:
    task = Parity(str(tmp_path))
    object.__setattr__(task, "lock", threading.Lock())
    with pytest.raises(RolloutError, match=r"verifier worker .* cannot be sent"):
        VerifierPool(task, 1, LIMITS)


def test_a_worker_that_finds_no_room_is_named(ray_address: str, tmp_path: Path) -> None:
    limits = PoolLimits(timeout_s=0.5, start_timeout_s=0.5, max_attempts=1, num_gpus=1.0)
    pool = RolloutPool(BuildEngine(str(tmp_path)), 1, prompts_per_call=1, num_threads=1, limits=limits)
    with pytest.raises(RolloutError, match=r"rollout-0, did not answer within 1 s \(it never started; free for it"):
        list(pool.complete(make_requests(1, 1)))
    pool.close()
