"""One small Ray cluster for all tests here, with workers of one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import ROOT

NUM_CPUS = 8


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of the cluster; this process is in it."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = os.environ.get("PYTHONPATH")
    # Workers inherit it; what they run is found by name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), str(ROOT), before)))
    torch.set_num_threads(1)
    context = ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=80_000_000,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
