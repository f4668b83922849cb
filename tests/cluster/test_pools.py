"""Pools of Ray actors: the results of one process bit for bit, whoever dies, hangs or is replaced on the way."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.cluster.actors import PoolLimits
from tafkir.cluster.rollouts import RolloutCalls, RolloutPool, split_requests
from tafkir.cluster.verifiers import VerifierPool
from tafkir.errors import CheckpointError, RequestError, RolloutError
from tafkir.protocols import BatchGrader, Completer
from tafkir.records import Answer, Completion, Example, Request, SamplingParams
from tests.cluster.faults import BuildEngine, Parity, build_tiny, mark_in

pytestmark = pytest.mark.cluster

QUICK = PoolLimits(timeout_s=30, start_timeout_s=60, max_attempts=3)


def make_requests(num_prompts: int = 6, group: int = 4) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for p in range(num_prompts):
        ids = tuple(torch.randint(4, 300, (5 + 3 * p,), generator=generator).tolist())
        for _ in range(group):
            made.append(Request(str(len(made)), ids, SamplingParams(max_tokens=10, seed=900 + len(made))))
    return made


def in_process(requests: list[Request], prompts_per_call: int, version: int, seed: int) -> dict[str, Completion]:
    calls = RolloutCalls(BuildEngine()(), prompts_per_call)
    calls.load_weights(build_tiny(seed).state_dict().items(), version)
    return {done.request_id: done for done in calls.complete(requests)}


@pytest.fixture
def make_pool(ray_address: str) -> Iterator[Callable[..., RolloutPool]]:
    made: list[RolloutPool] = []

    def make(build: BuildEngine, workers: int = 2, **options: Any) -> RolloutPool:
        options = {"prompts_per_call": 2, "num_threads": 1, "limits": QUICK, **options}
        made.append(RolloutPool(build, workers, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def test_a_call_holds_whole_prompts_and_depends_on_the_requests_alone() -> None:
    requests = make_requests(5, 3)
    calls = split_requests(requests, 2)
    assert [len(call) for call in calls] == [6, 6, 3]
    assert [request for call in calls for request in call] == requests
    assert split_requests([], 2) == []


def test_workers_give_the_results_of_one_process_bit_for_bit(make_pool: Callable[..., RolloutPool]) -> None:
    requests = make_requests()
    pool = make_pool(BuildEngine())
    assert isinstance(pool, Completer)
    for version, seed in ((1, 5), (2, 6)):
        pool.load_weights(build_tiny(seed).state_dict().items(), version)
        found = list(pool.complete(requests))
        assert Counter(done.request_id for done in found) == Counter(request.id for request in requests)
        assert {done.request_id: done for done in found} == in_process(requests, 2, version, seed)
    assert pool.metrics() == {}
    sequences = [list(request.prompt_ids) for request in requests[::5]]
    engine = BuildEngine()()
    engine.load_weights(build_tiny(6).state_dict().items(), 2)
    for ours, theirs in zip(pool.score(sequences), [engine.score([ids])[0] for ids in sequences], strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RequestError, match="same id"):
        pool.complete([requests[0], requests[0]])
    # A consumer that leaves early leaves no worker that is still at it.
    assert next(pool.complete(requests)).policy_version == 2
    assert len(list(pool.complete(requests))) == len(requests)


@pytest.mark.parametrize(("fault", "counted"), [("die", "died"), ("hang", "stuck")])
def test_a_worker_lost_in_mid_step_is_named_and_costs_no_sample(
    fault: str,
    counted: str,
    make_pool: Callable[..., RolloutPool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = make_requests()
    # The first call of a worker may last as long as its start, too; the fault comes in a later one.
    limits = replace(QUICK, timeout_s=4.0) if fault == "hang" else QUICK
    mark = Path(mark_in(tmp_path))
    mark.touch()
    pool = make_pool(BuildEngine(fault, str(mark)), limits=limits)  # type: ignore[arg-type]
    pool.load_weights(build_tiny(5).state_dict().items(), 1)
    assert len(list(pool.complete(requests))) == len(requests)
    mark.unlink()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found = list(pool.complete(requests))
    assert time.monotonic() - began < 45
    assert Counter(done.request_id for done in found) == Counter(request.id for request in requests)
    assert {done.request_id: done for done in found} == in_process(requests, 2, 1, 5)
    assert pool.metrics() == {f"cluster/rollout_{counted}": 1.0, "cluster/rollout_repeated": 1.0}
    (line,) = [record.getMessage() for record in caplog.records if "takes its place" in record.getMessage()]
    assert line.startswith("rollout-") and "(process " in line


def test_what_a_worker_raises_is_raised_here(make_pool: Callable[..., RolloutPool], tmp_path: Path) -> None:
    requests = make_requests(2, 2)
    pool = make_pool(BuildEngine("refuse", mark_in(tmp_path), while_building=True), workers=1)
    with pytest.raises(CheckpointError, match="here: not this one"):
        list(pool.complete(requests))
    # The worker is still there; its next attempt finds the mark.
    assert len(list(pool.complete(requests))) == 4
    (tmp_path / "mark").unlink()
    other = make_pool(BuildEngine("raise", mark_in(tmp_path)), workers=1)
    with pytest.raises(RolloutError, match="rollout-0 failed: ZeroDivisionError: by hand"):
        list(other.complete(requests))
    lossy = tmp_path / "lossy"
    lossy.mkdir()
    with pytest.raises(RolloutError, match="completions for 4 requests"):
        list(make_pool(BuildEngine("lose one", mark_in(lossy)), workers=1).complete(requests))


def make_answers(count: int = 9) -> list[Answer]:
    return [Answer(Example(str(i), "made", "train", "?", "0"), "x" * i, i % 4 != 0) for i in range(count)]


def test_verifiers_grade_as_the_task_does_and_one_that_dies_loses_no_verdict(ray_address: str, tmp_path: Path) -> None:
    answers = make_answers()
    plain = [Parity().grade(a.example, a.text, finished=a.finished) for a in answers]
    pool = VerifierPool(Parity("die", mark_in(tmp_path)), 2, QUICK)
    assert isinstance(pool, BatchGrader) and pool.name == "parity"
    assert pool.grade_all(answers) == plain
    assert pool.metrics() == {"cluster/verifier_died": 1.0, "cluster/verifier_repeated": 1.0}
    assert pool.grade(answers[2].example, "xx") == plain[2]
    pool.close()


def test_an_answer_that_no_verifier_survives_costs_its_own_reward_only(ray_address: str) -> None:
    answers = make_answers(4)
    pool = VerifierPool(Parity(poison="xx"), 1, replace(QUICK, max_attempts=2))
    verdicts = pool.grade_all(answers)
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong", "error", "wrong"]
    assert "cost 2 workers" in verdicts[2].reason and "verifier-0" in verdicts[2].reason
    assert verdicts[2].reward == 0
    pool.close()


def test_what_cannot_be_sent_to_a_worker_is_a_named_error(ray_address: str) -> None:
    import threading

    task = Parity()
    object.__setattr__(task, "lock", threading.Lock())
    with pytest.raises(RolloutError, match=r"verifier worker .* cannot be sent"):
        VerifierPool(task, 1, QUICK)
