"""Where rollouts and verifiers run: `[rlvr.engine]` for servers, `[cluster]` for pools on Ray. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tafkir.recipe.tables import Positive, Table

__all__ = ["ClusterConfig", "InProcessEngine", "RolloutEngine", "SglangEngine", "VllmEngine"]

_KIND = "What samples the rollouts: the engine in this process (or, with [cluster], in Ray workers), or servers."
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class InProcessEngine(Table):
    """Tafkir's own engine."""

    kind: Literal["in_process"] = Field("in_process", description=_KIND)


class ServerEngine(Table):
    """What servers of any kind have in common."""

    urls: tuple[str, ...] = Field(min_length=1, description="Addresses of the servers, such as http://node7:8000.")
    timeout_s: Seconds = Field(600.0, description="Longest wait for one completion.")
    weight_timeout_s: Seconds = Field(1200.0, description="Longest wait for a server to take new weights.")
    max_concurrency: Positive = Field(64, description="Requests at one server at once.")
    max_retries: int = Field(3, ge=0, description="Further attempts of a request whose server died, was late or busy.")
    weight_dir: str = Field(
        "", description="Folder for new weights, the same path on every server; empty takes the stage's own folder."
    )
    weight_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Number format of those weights.")
    api_key_env: str = Field("", description="Environment variable that holds the servers' API key.")

    @model_validator(mode="after")
    def _check_urls(self) -> Self:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls: {url!r} does not begin with http:// or https://")
            if url.rstrip("/").endswith("/v1"):
                raise ValueError(f"urls: {url!r} has a path; leave /v1 out")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("urls names a server twice")
        return self


class VllmEngine(ServerEngine):
    """vLLM servers (`vllm serve`), 0.10.2 or newer."""

    kind: Literal["vllm"] = Field("vllm", description=_KIND)
    weight_sync: Literal["disk", "reload"] = Field(
        "disk", description="vLLM's weight transfer from disk, or its older worker method reload_weights."
    )


class SglangEngine(ServerEngine):
    """SGLang servers, 0.5.3 or newer."""

    kind: Literal["sglang"] = Field("sglang", description=_KIND)
    weight_sync: Literal["disk"] = Field("disk", description="SGLang's update_weights_from_disk.")


def _engine_kind(value: Any) -> str:
    kind = value.get("kind", "in_process") if isinstance(value, Mapping) else getattr(value, "kind", "in_process")
    return str(kind)


RolloutEngine = Annotated[
    Annotated[InProcessEngine, Tag("in_process")]
    | Annotated[VllmEngine, Tag("vllm")]
    | Annotated[SglangEngine, Tag("sglang")],
    Discriminator(_engine_kind),
]
"""What `[rlvr.engine]` may hold, told apart by `kind`."""


class ClusterConfig(Table):
    """Rollout workers and verifiers as Ray actors; the trainer stays in the process that was started."""

    address: str = Field(
        "local", description="A Ray cluster (host:port, or auto for the one of this machine); local starts one."
    )
    num_rollout_workers: int = Field(2, ge=0, description="Ray actors that sample; 0 samples in the trainer's process.")
    num_verifiers: int = Field(0, ge=0, description="Ray actors that grade; 0 grades in the trainer's process.")
    prompts_per_call: Positive = Field(
        4,
        description="Problems that a worker gets at once. Results depend on it in the last bits, on nothing else here.",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that Ray sets aside for a rollout worker.")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for a rollout worker.")
    cpus_per_verifier: float = Field(1.0, gt=0, description="CPUs that Ray sets aside for a verifier.")
    timeout_s: Seconds = Field(600.0, description="Longest wait for one call to a rollout worker.")
    grade_timeout_s: Seconds = Field(60.0, description="Longest wait for one call to a verifier.")
    start_timeout_s: Seconds = Field(300.0, description="Longest wait for Ray, and for a worker, to start.")
    max_attempts: Positive = Field(3, description="Workers that a call may cost before the run stops.")
    object_store_bytes: int = Field(
        0, ge=0, description="Shared memory of a cluster that is started here; 0 leaves it to Ray."
    )
