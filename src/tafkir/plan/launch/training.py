"""A script that trains a recipe on a planned layout with torchrun."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from tafkir.errors import RecipeError
from tafkir.plan.launch.engines import NODE_CHIPS
from tafkir.plan.training import TrainJob, TrainOption

__all__ = ["render_torchrun"]

_DEVICES = {"ascend": "npu", "cpu": "cpu"}


def render_torchrun(options: Sequence[TrainOption], job: TrainJob, recipe: str, *, python: str = "python") -> str:
    """The fastest of the planned layouts that `tafkir run` trains: FSDP2, experts and tensors over chips, no pipeline.

    Args:
        options: fastest first. recipe: as `tafkir run` takes it.
        python: that starts torchrun.

    Raises:
        RecipeError: none of them does without a pipeline.
    """
    able = [option for option in options if option.layout.pp == 1 and option.layout.shard == "fsdp"]
    if not able:
        raise RecipeError(
            "every layout that fits needs a pipeline or ZeRO-1, which `tafkir run` does not have",
            where="--emit torchrun",
            fix="more chips, or a smaller batch",
        )
    best, layout = able[0], able[0].layout
    nodes = math.ceil(job.chips / NODE_CHIPS)
    each = job.chips // nodes
    device = next((name for start, name in _DEVICES.items() if job.chip.key.startswith(start)), "cuda")
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.shape.name} on {job.chips} x {job.chip.name}, {layout}, by tafkir plan:",
        f"# {best.tokens_per_s_per_chip * job.chips:,.0f} tokens/s, {sum(best.memory.values()) / 1e9:.1f} GB a chip, "
        f"{best.days:,.2f} days for {job.tokens:.3g} tokens.",
        "set -euo pipefail",
    ]
    rendezvous = ["--standalone"]
    if nodes > 1:
        lines += [
            f"# Run it on each of {nodes} nodes.",
            ': "${NODE_RANK:?from 0 to ' + str(nodes - 1) + '}" "${MASTER_ADDR:?address of the node of rank 0}"',
        ]
        rendezvous = [f"--nnodes={nodes}", '--node-rank="$NODE_RANK"', "--rdzv-backend=c10d"]
        rendezvous += ['--rdzv-endpoint="$MASTER_ADDR:29500"', f"--rdzv-id={shlex.quote(job.shape.name)}"]
    words = [
        f"{shlex.quote(python)} -m torch.distributed.run {' '.join(rendezvous)} --nproc-per-node={each}",
        f"-m tafkir.cli.main run {shlex.quote(recipe)}",
        *(
            f"--set parallel.{name}={value}"
            for name, value in (
                ("expert_parallel", layout.ep),
                ("tensor_parallel", layout.tp),
                ("device", device),
            )
        ),
        '"$@"',
    ]
    return "\n".join([*lines, " \\\n  ".join(words)]) + "\n"
