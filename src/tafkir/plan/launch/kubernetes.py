"""Kubernetes manifests: a Deployment, or a LeaderWorkerSet where a replica spans nodes, and what belongs around it."""

from __future__ import annotations

import math
import re
from typing import Any

from tafkir.errors import RecipeError
from tafkir.plan.advise import Option
from tafkir.plan.launch.engines import PORT, Server, engine_table
from tafkir.plan.launch.shell import heading
from tafkir.plan.launch.yaml import render_documents
from tafkir.plan.precision import checkpoint_bytes
from tafkir.plan.workload import Workload

__all__ = ["manifests", "render_kubernetes"]

_RESOURCE = {"mi3": "amd.com/gpu", "ascend": "huawei.com/Ascend910"}
_LWS = "leaderworkerset.sigs.k8s.io"
# Weights at 1 GB/s and five minutes for compiling and capturing graphs; a probe every ten seconds.
_LOAD_RATE, _START_S, _PROBE_S = 1e9, 300, 10
# Of the users that a replica was planned for: the share at which another one is started.
_FULL = 0.8
_PROMETHEUS = "http://prometheus-operated.monitoring:9090"

Manifest = dict[str, Any]


def render_kubernetes(option: Option, workload: Workload, server: Server, checkpoint: str, image: str | None) -> str:
    """All manifests as one YAML file for `kubectl apply -f -`.

    Raises:
        RecipeError: see `manifests`.
    """
    documents = manifests(option, workload, server, checkpoint, image)
    name = documents[0]["metadata"]["name"]
    notes = [
        *heading(option, server),
        f"# Wanted beforehand: a PersistentVolumeClaim {name}-weights, and a Gateway called inference.",
        "# ScaledObject needs KEDA, ServiceMonitor the Prometheus operator, LeaderWorkerSet its own controller.",
    ]
    return "\n".join(notes) + "\n" + render_documents(documents)


def manifests(
    option: Option, workload: Workload, server: Server, checkpoint: str, image: str | None = None
) -> list[Manifest]:
    """The workload first, then service, disruption budget, scaling, monitoring and route.

    Args:
        image: of the container, in place of the engine's own `:latest`.

    Raises:
        RecipeError: the engine's nodes are started by MPI, which a pod template is not.
    """
    if server.mpi:
        raise RecipeError(
            "TensorRT-LLM over several nodes is started by MPI",
            where="--emit k8s",
            fix="--emit slurm, or --engine vllm or sglang",
        )
    name = re.sub(r"[^a-z0-9]+", "-", option.fleet.decode.shape.name.lower()).strip("-")[:40].strip("-")
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "inference"}
    several = server.nodes > 1
    pod = _pod(option, workload, server, checkpoint, image, labels)
    worker = _pod(option, workload, server, checkpoint, image, labels, answers=False)
    # Clients speak to the first node of a replica.
    reached = {**labels, f"{_LWS}/worker-index": "0"} if several else labels
    metadata = {"name": name, "labels": labels}
    replicated: Manifest = {"replicas": option.replicas}
    found: list[Manifest] = []
    if several:
        group = {"size": server.nodes, "restartPolicy": "RecreateGroupOnPodRestart"}
        group |= {"leaderTemplate": pod, "workerTemplate": worker}
        spec: Manifest = {**replicated, "leaderWorkerTemplate": group}
        found.append(_object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", metadata, spec))
    else:
        strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
        spec = {**replicated, "strategy": strategy, "selector": {"matchLabels": labels}, "template": pod}
        found.append(_object("apps/v1", "Deployment", metadata, spec))
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    found.append(_object("v1", "Service", metadata, {"selector": reached, "ports": ports}))
    budget = {"maxUnavailable": 1, "selector": {"matchLabels": reached}}
    found.append(_object("policy/v1", "PodDisruptionBudget", metadata, budget))
    if engine_table(server.engine)["running"]:
        monitor = {
            "selector": {"matchLabels": labels},
            "endpoints": [{"port": "http", "path": "/metrics", "interval": "15s"}],
        }
        found.append(_object("monitoring.coreos.com/v1", "ServiceMonitor", metadata, monitor))
        found.append(_scaling(option, server, metadata, found[0]))
    route = {
        "parentRefs": [{"name": "inference"}],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                # Streams of answers are long; the gateway shall not cut them.
                "timeouts": {"request": "0s"},
                "backendRefs": [{"name": name, "port": 80}],
            }
        ],
    }
    found.append(_object("gateway.networking.k8s.io/v1", "HTTPRoute", metadata, route))
    return found


def _object(version: str, kind: str, metadata: Manifest, spec: Manifest) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _pod(
    option: Option,
    workload: Workload,
    server: Server,
    checkpoint: str,
    image: str | None,
    labels: dict[str, str],
    *,
    answers: bool = True,
) -> Manifest:
    """A pod of one node; `answers` where clients speak to it."""
    d = option.fleet.decode
    resource = next((key for start, key in _RESOURCE.items() if d.chip.key.startswith(start)), "nvidia.com/gpu")
    resources = {resource: server.chips}
    lines = ["set -euo pipefail", f"PORT={PORT}"]
    if server.nodes > 1:
        lines.append('NODE_RANK="$LWS_WORKER_INDEX" MASTER_ADDR="$LWS_LEADER_ADDRESS"')
    local = checkpoint.startswith("/")
    weights = {"name": "weights", "mountPath": checkpoint if local else "/weights", "readOnly": local}
    container: Manifest = {
        "name": "server",
        "image": image or f"{engine_table(server.engine)['image']}:latest",
        "command": ["bash", "-c"],
        "args": ["\n".join([*lines, *server.body]) + "\n"],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [weights, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if not local:
        container["env"] = [{"name": "HF_HOME", "value": "/weights"}]
    if answers:
        container |= _probes(option, server)
    # An answer that has begun is finished before the pod goes.
    longest = option.point.ttft_s + 4 * workload.output_tokens * option.point.tpot_s
    volumes = [
        {"name": "weights", "persistentVolumeClaim": {"claimName": f"{labels['app.kubernetes.io/name']}-weights"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{4 * server.chips}Gi"}},
    ]
    spec = {
        "terminationGracePeriodSeconds": math.ceil(longest) + 30,
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": labels}, "spec": spec}


def _probes(option: Option, server: Server) -> Manifest:
    """Ready when /health answers; given as long to start as the weights take to read, twice over."""
    d = option.fleet.decode
    start_s = 2 * checkpoint_bytes(d.shape, d.precision) / server.nodes / _LOAD_RATE + _START_S
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    return {
        "startupProbe": {**health, "periodSeconds": _PROBE_S, "failureThreshold": math.ceil(start_s / _PROBE_S)},
        "readinessProbe": {**health, "periodSeconds": _PROBE_S, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 3 * _PROBE_S, "failureThreshold": 5},
    }


def _scaling(option: Option, server: Server, metadata: Manifest, target: Manifest) -> Manifest:
    """KEDA keeps requests at a share of what a replica was planned for; slowly down, so that it does not swing."""
    table = engine_table(server.engine)
    where = f'{{service="{metadata["name"]}"}}'
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": _PROMETHEUS,
            "query": f"sum({table['running']}{where}) + sum({table['waiting']}{where})",
            "threshold": f"{max(1.0, _FULL * option.point.concurrency):.0f}",
        },
    }
    slowly = {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}]}
    spec = {
        "scaleTargetRef": {key: target[key] for key in ("apiVersion", "kind")} | {"name": metadata["name"]},
        "minReplicaCount": 1,
        "maxReplicaCount": max(1, option.replicas),
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": slowly}}},
        "triggers": [trigger],
    }
    return _object("keda.sh/v1alpha1", "ScaledObject", metadata, spec)
