"""Shell scripts that start a server by hand or under Slurm."""

from __future__ import annotations

import math

from tafkir.plan.advise import Option
from tafkir.plan.launch.engines import NODE_CHIPS, PORT, Server, engine_table

__all__ = ["heading", "render_script", "render_slurm"]

_VISIBLE = {"ascend": "ASCEND_RT_VISIBLE_DEVICES", "mi3": "HIP_VISIBLE_DEVICES"}


def heading(option: Option, server: Server) -> list[str]:
    """Comment lines: what was planned, and where the flags are from."""
    d, table = option.fleet.decode, engine_table(server.engine)
    return [
        f"# {d.shape.name} in {d.precision.name} on {option.replicas} x {d.layout} of {d.chip.name}, by tafkir plan:",
        f"# {option.point.concurrency * option.replicas:,.0f} users, {option.point.ttft_s:.2f} s to the first token, "
        f"{option.point.tpot_s * 1e3:.1f} ms a token (means).",
        f"# Flags as in {table['source']}",
        f"# at {table['commit']}.",
    ]


def render_script(option: Option, server: Server) -> str:
    """A bash script for one node: every replica that it holds, or its part of a replica that spans several."""
    lines = ["#!/usr/bin/env bash", *heading(option, server), "set -euo pipefail"]
    if server.nodes == 1:
        return "\n".join([*lines, *_replicas(option, server)]) + "\n"
    lines += [
        f"# Run it on each of {server.nodes} nodes of a replica ({option.replicas} of them).",
        f': "${{NODE_RANK:?from 0 to {server.nodes - 1}}}" "${{MASTER_ADDR:?address of the node of rank 0}}"',
        f'PORT="${{PORT:-{PORT}}}"',
    ]
    return "\n".join([*lines, *server.body]) + "\n"


def _replicas(option: Option, server: Server) -> list[str]:
    """One server for each replica of a node, on neighbouring ports and chips of its own."""
    size = server.chips
    here = min(option.replicas, NODE_CHIPS // size)
    machines = math.ceil(option.replicas / here)
    lines = [f"# Run it on each of {machines} nodes, behind a load balancer."] if machines > 1 else []
    if here == 1:
        return [*lines, f'PORT="${{PORT:-{PORT}}}"', *server.body]
    chip = option.fleet.decode.chip.key
    variable = next((name for key, name in _VISIBLE.items() if chip.startswith(key)), "CUDA_VISIBLE_DEVICES")
    return [
        *lines,
        f'first_port="${{PORT:-{PORT}}}"',
        "serve() {",
        *server.body,
        "}",
        f"for replica in $(seq 0 {here - 1}); do",
        f"  first=$((replica * {size}))",
        "  PORT=$((first_port + replica))",
        f'  export {variable}="$(seq -s, "$first" $((first + {size - 1})))"',
        "  serve &",
        "done",
        "wait",
    ]


def render_slurm(option: Option, server: Server) -> str:
    """A batch script for `sbatch`: an array with one task for each replica, and one srun over its nodes."""
    name = option.fleet.decode.shape.name
    tasks = server.chips if server.mpi else 1
    # Servers run until they are cancelled; a site's own limit decides.
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={server.nodes}",
        f"#SBATCH --ntasks-per-node={tasks}",
        f"#SBATCH --gpus-per-node={server.chips}",
        *([f"#SBATCH --array=0-{option.replicas - 1}"] if option.replicas > 1 else []),
        "#SBATCH --requeue",
        *(["#SBATCH --exclusive"] if server.nodes > 1 else []),
        "#SBATCH --output=%x-%A_%a.log" if option.replicas > 1 else "#SBATCH --output=%x-%j.log",
        *heading(option, server),
        "set -euo pipefail",
        # not `| head -n 1`: scontrol may still be writing when head leaves, which pipefail takes for a failure
        'NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"',
        "MASTER_ADDR=\"${NODES%%$'\\n'*}\"",
        "# Replicas that share a node need ports of their own.",
        f'PORT="$(({PORT} + ${{SLURM_ARRAY_TASK_ID:-0}}))"',
        "export MASTER_ADDR PORT",
        "serve() {",
        "set -euo pipefail",
        'export NODE_RANK="$SLURM_NODEID"',
        *server.body,
        "}",
        "export -f serve",
        'echo "serving on http://$MASTER_ADDR:$PORT"',
        f"srun --kill-on-bad-exit=1{' --mpi=pmix' if server.mpi else ''} bash -c serve",
    ]
    return "\n".join(lines) + "\n"
