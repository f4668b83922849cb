"""Where a recipe's rollouts are sampled and graded: in this process, by servers, or by Ray workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tafkir.cli.completer import completer_builder
from tafkir.errors import RecipeError
from tafkir.recipe.cluster import ClusterConfig, InProcessEngine, SglangEngine, VllmEngine
from tafkir.records import StageName

if TYPE_CHECKING:
    from tafkir.cluster.actors import PoolLimits
    from tafkir.protocols import Completer, Task
    from tafkir.recipe.rollout import RolloutConfig
    from tafkir.recipe.schema import Recipe
    from tafkir.recipe.stage import BuildCompleter

__all__ = ["grading_sharer", "rollout_builder"]


def rollout_builder(recipe: Recipe, kind: StageName, folder: Path) -> BuildCompleter:
    """What a stage gets to build completers with.

    Args:
        folder: of the stage, where new weights for servers go unless the recipe names a place.
    """
    here = completer_builder(recipe, kind)
    engine = getattr(getattr(recipe, kind), "engine", None)
    if isinstance(engine, VllmEngine | SglangEngine):
        return partial(_build_servers, engine=engine, folder=folder)
    if isinstance(engine, InProcessEngine) and recipe.cluster is not None:
        return partial(_build_workers, here=here, recipe=recipe, cluster=recipe.cluster)
    return here


def grading_sharer(recipe: Recipe) -> Callable[[Task], Task]:
    """What a stage gets to have its answers graded by: Ray verifiers, or the task itself."""
    cluster = recipe.cluster
    if cluster is None or not cluster.num_verifiers:
        return lambda task: task
    return partial(_build_verifiers, cluster=cluster)


def _build_servers(
    checkpoint: Path, rollout: RolloutConfig | None = None, *, engine: VllmEngine | SglangEngine, folder: Path
) -> Completer:
    from tafkir.checkpoint.load import load_config
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.remote.pool import Limits, ServerPool
    from tafkir.remote.sglang import SglangDialect
    from tafkir.remote.vllm import VllmDialect
    from tafkir.remote.weights import WeightFolders

    tokenizer = Tokenizer.load(checkpoint)
    place = Path(engine.weight_dir) if engine.weight_dir else folder / "rollout-weights"
    dialect = VllmDialect(engine.weight_sync) if isinstance(engine, VllmEngine) else SglangDialect()
    return ServerPool(
        engine.urls,
        dialect,
        tokenizer,
        eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
        vocab_size=load_config(checkpoint).vocab_size,
        folders=WeightFolders(place, checkpoint, engine.weight_dtype),
        limits=Limits(
            timeout_s=engine.timeout_s,
            weight_timeout_s=engine.weight_timeout_s,
            max_concurrency=engine.max_concurrency,
            max_retries=engine.max_retries,
        ),
        api_key=_read_key(engine.api_key_env),
    )


def _read_key(variable: str) -> str | None:
    if not variable:
        return None
    key = os.environ.get(variable)
    if not key:
        raise RecipeError(
            f"the environment variable {variable} is not set",
            where="engine.api_key_env",
            fix="set it, or clear the key",
        )
    return key


def _build_workers(
    checkpoint: Path,
    rollout: RolloutConfig | None = None,
    *,
    here: BuildCompleter,
    recipe: Recipe,
    cluster: ClusterConfig,
) -> Completer:
    from tafkir.cluster.rollouts import RolloutCalls, RolloutPool
    from tafkir.cluster.session import open_ray

    # A worker of another machine must find the checkpoint, too: on a shared file system, by its full path.
    place = checkpoint.absolute()
    build = partial(here, place) if rollout is None else partial(here, place, rollout)
    if not cluster.num_rollout_workers:
        return RolloutCalls(build(), cluster.prompts_per_call)
    open_ray(cluster)
    return RolloutPool(
        build,
        cluster.num_rollout_workers,
        prompts_per_call=cluster.prompts_per_call,
        num_threads=recipe.threads,
        kernels=recipe.kernels,
        limits=_limits(cluster, cluster.timeout_s, cluster.cpus_per_worker, cluster.gpus_per_worker),
    )


def _build_verifiers(task: Task, *, cluster: ClusterConfig) -> Task:
    from tafkir.cluster.session import open_ray
    from tafkir.cluster.verifiers import VerifierPool

    open_ray(cluster)
    limits = _limits(cluster, cluster.grade_timeout_s, cluster.cpus_per_verifier, 0.0)
    return VerifierPool(task, cluster.num_verifiers, limits)


def _limits(cluster: ClusterConfig, timeout_s: float, num_cpus: float, num_gpus: float) -> PoolLimits:
    from tafkir.cluster.actors import PoolLimits

    return PoolLimits(
        timeout_s=timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        max_attempts=cluster.max_attempts,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
