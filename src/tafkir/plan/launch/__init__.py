"""From a planned layout to files that start existing engines with it; nothing is started here."""

from __future__ import annotations

from tafkir.errors import RecipeError
from tafkir.plan.advise import Option
from tafkir.plan.coefficients import ENGINES
from tafkir.plan.launch.engines import engine_flags, server_of
from tafkir.plan.launch.kubernetes import render_kubernetes
from tafkir.plan.launch.schedulers import render_ray, render_skypilot
from tafkir.plan.launch.shell import render_script, render_slurm
from tafkir.plan.launch.training import render_torchrun
from tafkir.plan.workload import Workload

__all__ = ["SCHEDULERS", "TARGETS", "engine_flags", "render_launch", "render_torchrun"]

SCHEDULERS = ("slurm", "k8s", "ray", "skypilot")
"""Targets that start an engine which is named besides."""

TARGETS = ("vllm", "sglang", "trtllm", *SCHEDULERS, "torchrun")
"""What `--emit` takes; torchrun trains, the others serve."""


def render_launch(
    option: Option,
    workload: Workload,
    checkpoint: str,
    target: str,
    *,
    engine: str = "vllm",
    image: str | None = None,
) -> str:
    """The file that serves an option with a target: a script of an engine, or a scheduler's file around one.

    Args:
        option: without workers of their own for prompts, which need a router.
        workload: whose lengths the server has to hold.
        checkpoint: folder or hub name, in the planned precision.
        target: one of `TARGETS`, but not torchrun.
        engine: that a scheduler starts.
        image: of the container, for Kubernetes.

    Raises:
        RecipeError: no such target, or one that cannot start this layout; the message says what does.
        CapacityError: the model's context, stretched 16 times, is shorter than the requests.
    """
    if target not in TARGETS or target == "torchrun":
        serving = [name for name in TARGETS if name != "torchrun"]
        raise RecipeError("no such target", where=f"--emit {target}", expected=f"one of {', '.join(serving)}")
    server = server_of(option, workload, checkpoint, target if target in ENGINES else engine)
    if target == "k8s":
        return render_kubernetes(option, workload, server, checkpoint, image)
    if target == "slurm":
        return render_slurm(option, server)
    if target == "ray":
        return render_ray(option, server, checkpoint)
    if target == "skypilot":
        return render_skypilot(option, workload, server)
    if server.mpi:
        raise RecipeError(
            "TensorRT-LLM over several nodes is started by MPI",
            where="--emit trtllm",
            fix="--emit slurm --engine trtllm",
        )
    return render_script(option, server)
