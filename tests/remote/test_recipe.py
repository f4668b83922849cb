"""From a recipe's tables to what samples and grades: servers, calls in this process, or a refusal that says why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.rollouts import grading_sharer, rollout_builder
from tafkir.cluster.rollouts import RolloutCalls
from tafkir.engine.engine import Engine
from tafkir.errors import RecipeError
from tafkir.protocols import Counting
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.schema import Recipe
from tafkir.records import Example, Request, SamplingParams
from tafkir.remote.pool import ServerPool
from tafkir.tasks.math import WordProblems
from tafkir.train.rollout import SynchronousRollouts
from tests.remote.servers import SglangServer, VllmServer


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(["smoke"], overrides).recipe


def server_recipe(kind: str, url: str, *overrides: str) -> Recipe:
    own = (f"rlvr.engine.kind={kind}", f'rlvr.engine.urls=["{url}"]', "rlvr.engine.max_concurrency=4")
    return recipe_with(*own, *overrides)


@pytest.mark.parametrize(("kind", "server_class"), [("vllm", VllmServer), ("sglang", SglangServer)])
def test_a_recipes_servers_sample_its_steps(
    kind: str, server_class: type[VllmServer | SglangServer], checkpoint: Path, tmp_path: Path
) -> None:
    policy = load_checkpoint(checkpoint).decoder
    with server_class(checkpoint) as server:
        recipe = server_recipe(kind, server.url, "rlvr.engine.weight_dtype=float32")
        pool = rollout_builder(recipe, "rlvr", tmp_path)(checkpoint)
        assert isinstance(pool, ServerPool)
        assert recipe.rlvr is not None
        prompts = [(Example(str(i), "made", "train", "?", "4"), (40 + i, 41, 42)) for i in range(2)]
        source = SynchronousRollouts(
            pool,
            server.tokenizer,
            grading_sharer(recipe)(WordProblems()),
            lambda step: prompts,
            recipe.rlvr,
            weights=lambda: policy.state_dict().items(),
            seed=1,
        )
        for step in (0, 1):
            groups = source(step)
            assert Counter(r.completion.policy_version for group in groups for r in group.rollouts) == {step: 4}
        assert source.numbers() == {"engine/servers_alive": 1.0}
        pool.close()
    assert sorted(path.name for path in (tmp_path / "rollout-weights").iterdir()) == [
        "version-00000000",
        "version-00000001",
    ]


def test_without_workers_a_cluster_is_calls_in_this_process(checkpoint: Path, tmp_path: Path) -> None:
    plain = rollout_builder(recipe_with(), "rlvr", tmp_path)(checkpoint)
    assert isinstance(plain, Engine) and not isinstance(plain, Counting)
    recipe = recipe_with("cluster.num_rollout_workers=0", "cluster.prompts_per_call=1")
    calls = rollout_builder(recipe, "rlvr", tmp_path)(checkpoint)
    assert isinstance(calls, RolloutCalls)
    assert isinstance(rollout_builder(recipe, "eval", tmp_path)(checkpoint), Engine)
    task = WordProblems()
    assert grading_sharer(recipe)(task) is task
    requests = [Request(str(i), (40 + i // 2, 41), recipe_params(i)) for i in range(4)]
    found = {done.request_id: done for done in calls.complete(requests)}
    for pair in (requests[:2], requests[2:]):
        for done in plain.complete(pair):
            assert found[done.request_id] == done


def recipe_params(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=6, seed=seed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rlvr.engine.kind=vllm"], "rlvr.engine.urls: missing key"),
        (["rlvr.engine.kind=trt"], "got rlvr.engine.kind = trt; expected one of 'in_process', 'vllm', 'sglang'"),
        (["rlvr.engine.kind=vllm", 'rlvr.engine.urls=["node7:8000"]'], "does not begin with http"),
        (["rlvr.engine.kind=vllm", 'rlvr.engine.urls=["http://a:1/v1"]'], "has a path; leave /v1 out"),
        (["rlvr.engine.kind=vllm", 'rlvr.engine.urls=["http://a:1", "http://a:1/"]'], "names a server twice"),
        (
            ["rlvr.engine.kind=vllm", 'rlvr.engine.urls=["http://a:1"]', "cluster.num_verifiers=1"],
            "rollout workers beside its servers.*num_rollout_workers to 0",
        ),
        (
            ["rlvr.engine.kind=sglang", 'rlvr.engine.urls=["http://a:1"]', "rlvr.rollout.precision=nvfp4"],
            "only the engine in this process can do",
        ),
        (["rlvr.reward_file=mine.py", "cluster.num_verifiers=1"], "exclude each other"),
    ],
)
def test_tables_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["smoke"], overrides)


def test_a_key_that_is_not_in_the_environment_is_named(checkpoint: Path, tmp_path: Path) -> None:
    recipe = server_recipe("vllm", "http://127.0.0.1:9", "rlvr.engine.api_key_env=TAFKIR_TEST_NO_SUCH_KEY")
    with pytest.raises(RecipeError, match="TAFKIR_TEST_NO_SUCH_KEY is not set"):
        rollout_builder(recipe, "rlvr", tmp_path)(checkpoint)


def test_results_depend_on_how_prompts_are_put_together_not_on_who_computes_them() -> None:
    def changed(before: Recipe, after: Recipe) -> bool:
        return fingerprint_stages(before, None)["rlvr"] != fingerprint_stages(after, None)["rlvr"]

    spread = recipe_with("cluster.num_rollout_workers=2")
    assert changed(recipe_with(), spread)
    assert changed(spread, recipe_with("cluster.prompts_per_call=8"))
    assert not changed(spread, recipe_with("cluster.num_rollout_workers=7", "cluster.timeout_s=1.0"))
    one, two = (
        server_recipe("vllm", url, f"rlvr.engine.timeout_s={t}") for url, t in (("http://a", 1.0), ("http://b", 2.0))
    )
    assert not changed(one, two)
    assert changed(one, server_recipe("sglang", "http://a"))
    assert changed(one, server_recipe("vllm", "http://a", "rlvr.engine.weight_dtype=float32"))
