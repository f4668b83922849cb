"""One small Ray cluster for all tests here, with workers of one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tafkir.cluster.session import open_ray
from tafkir.recipe.cluster import ClusterConfig
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of the cluster; this process is in it."""
    ray = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    # Workers inherit it; what they run is found by name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), str(ROOT), before)))
    torch.set_num_threads(1)
    config = ClusterConfig(num_rollout_workers=2, num_verifiers=2, object_store_bytes=80_000_000)
    open_ray(config)
    open_ray(config)  # one that is there already is taken as it is
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
