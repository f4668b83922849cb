"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import time
from types import ModuleType

from tafkir.errors import BackendUnavailable
from tafkir.recipe.cluster import ClusterConfig

__all__ = ["import_ray", "open_ray"]


def import_ray() -> ModuleType:
    """The module `ray`. Raises BackendUnavailable where it is not installed."""
    # Ray would tell its makers about every cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable(
            "Ray is not installed", where="[cluster]", fix='pip install "tafkir[ray]", or leave [cluster] out'
        ) from error
    module: ModuleType = ray
    return module


def open_ray(config: ClusterConfig) -> None:
    """Connect to the cluster that the recipe names; one that this process is in already is taken as it is.

    A cluster that is started here has the CPUs that the recipe's workers ask for, and ends with this process.

    Raises:
        BackendUnavailable: Ray is not installed, or there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        return
    options: dict[str, object] = {"address": config.address}
    if config.address == "local":
        workers = config.num_rollout_workers * config.cpus_per_worker
        verifiers = config.num_verifiers * config.cpus_per_verifier
        options |= {"num_cpus": max(1, -int(-(workers + verifiers) // 1)), "include_dashboard": False}
        if config.object_store_bytes:
            options["object_store_memory"] = config.object_store_bytes
    deadline = time.monotonic() + config.start_timeout_s
    while True:
        try:
            return _join(ray, options)
        except BackendUnavailable:
            # Ray gives its own processes half a minute to start, which a busy machine may not have.
            ray.shutdown()
            if config.address != "local" or time.monotonic() > deadline:
                raise


def _join(ray: ModuleType, options: dict[str, object]) -> None:
    try:
        ray.init(
            **options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, namespace="tafkir"
        )
    except Exception as error:  # Ray raises many kinds, a bare Exception among them
        raise BackendUnavailable(
            f"no Ray cluster ({' '.join(str(error).split())})",
            where=f"cluster.address = {options['address']}",
            fix="start one with `ray start --head`, or set cluster.address to local",
        ) from error
