"""Files for schedulers that start a server for us: Ray Serve and SkyPilot."""

from __future__ import annotations

import json
import math
from typing import Any

from tafkir.errors import RecipeError
from tafkir.plan.advise import Option
from tafkir.plan.launch.engines import PORT, Server
from tafkir.plan.launch.shell import heading
from tafkir.plan.launch.yaml import render_yaml
from tafkir.plan.precision import checkpoint_bytes
from tafkir.plan.workload import Workload

__all__ = ["render_ray", "render_skypilot"]

# What clouds call the chips.
_SKY = {
    "a100": "A100-80GB",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "b300": "B300",
    "gb200": "GB200",
    "mi300x": "MI300X",
    "l40s": "L40S",
    "rtx4090": "RTX4090",
}
_FULL = 0.8


def render_ray(option: Option, server: Server, checkpoint: str) -> str:
    """A config for `serve deploy`: ray.serve.llm builds the application around vLLM.

    Raises:
        RecipeError: another engine, or attention in copies, whose ranks Ray starts from Python only.
    """
    if server.engine != "vllm":
        raise RecipeError(f"Ray Serve starts vLLM, not {server.engine}", where="--emit ray", fix="--engine vllm")
    d = option.fleet.decode
    if d.layout.dp > 1:
        raise RecipeError(
            f"{d.layout} copies attention", where="--emit ray", fix="--emit k8s or slurm, or --layout without DP"
        )
    users = max(1, math.ceil(option.point.concurrency))
    scaling = {
        "min_replicas": 1,
        "max_replicas": option.replicas,
        "target_ongoing_requests": max(1, round(_FULL * users)),
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    }
    model: dict[str, Any] = {
        "model_loading_config": {"model_id": d.shape.name, "model_source": checkpoint},
        "engine_kwargs": {
            name.removeprefix("--").replace("-", "_"): _typed(value)
            for name, value in server.flags
            if name != "--distributed-executor-backend"
        },
        "deployment_config": {"autoscaling_config": scaling, "max_ongoing_requests": 2 * users},
        "placement_group_config": {"bundle_per_worker": {"CPU": 1, "GPU": 1}, "strategy": "PACK"},
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    config = {"http_options": {"host": "0.0.0.0", "port": PORT}, "applications": [application]}
    return "\n".join(heading(option, server)) + "\n" + render_yaml(config)


def _typed(value: str | None) -> Any:
    """A flag's value as Python takes it."""
    if value is None:
        return True
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def render_skypilot(option: Option, workload: Workload, server: Server) -> str:
    """A task for `sky launch`, whose service part `sky serve up` reads.

    Raises:
        RecipeError: no cloud rents the chip, or the engine's nodes are started by MPI.
    """
    d = option.fleet.decode
    if d.chip.key not in _SKY:
        raise RecipeError(
            f"{d.chip.name} is in no cloud's catalogue", where="--emit skypilot", expected=", ".join(_SKY)
        )
    if server.mpi:
        raise RecipeError(
            "TensorRT-LLM over several nodes is started by MPI", where="--emit skypilot", fix="--emit slurm"
        )
    start_s = 600 + checkpoint_bytes(d.shape, d.precision) / server.nodes / 1e9
    requests = option.point.tokens_per_s / workload.output_tokens
    run = [
        "set -euo pipefail",
        f"PORT={PORT}",
        'export NODE_RANK="$SKYPILOT_NODE_RANK"',
        "MASTER_ADDR=\"${SKYPILOT_NODE_IPS%%$'\\n'*}\"",
        *server.body,
    ]
    service: dict[str, Any] = {
        "readiness_probe": {"path": "/health", "initial_delay_seconds": math.ceil(start_s)},
        "replica_policy": {
            "min_replicas": 1,
            "max_replicas": option.replicas,
            "target_qps_per_replica": round(_FULL * requests, 3),
            "downscale_delay_seconds": 1200,
        },
    }
    packages = {"vllm": "vllm", "sglang": "sglang[all]", "trtllm": "tensorrt-llm"}
    task = {
        "name": d.shape.name.replace(".", "-"),
        "resources": {"accelerators": {_SKY[d.chip.key]: server.chips}, "ports": [PORT]},
        "num_nodes": server.nodes,
        "setup": f"pip install '{packages[server.engine]}'\n",
        "run": "\n".join(run) + "\n",
        "service": service,
    }
    return "\n".join(heading(option, server)) + "\n" + render_yaml(task)
