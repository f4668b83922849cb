"""From a planned layout to a shell script that starts vLLM or SGLang with it; nothing is started here."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.advise import MEMORY_SHARE, Option
from tafkir.plan.load import CHUNK_TOKENS
from tafkir.plan.serving import Deployment
from tafkir.plan.workload import Workload

__all__ = ["ENGINES_EMITTED", "engine_flags", "render_launch"]

ENGINES_EMITTED = ("vllm", "sglang")
"""Engines that scripts are written for."""

_TABLE = Path(__file__).resolve().parent / "tables" / "engine_flags.toml"
_NODE = 8
_PORT = 8000
# Room for what requests are longer than in the mean.
_LONGER = 2.0

Flags = list[tuple[str, str | None]]


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def engine_flags(engine: str) -> frozenset[str]:
    """Flags that were found in an engine's definitions of its arguments."""
    return frozenset(_tables()[engine]["flags"])


def render_launch(option: Option, workload: Workload, checkpoint: str, engine: str) -> str:
    """A shell script that serves an option: every replica of a node, or one node of a replica that spans several.

    Args:
        option: without workers of their own for prompts, which need a router.
        workload: whose lengths the server has to hold.
        checkpoint: folder or hub name, in the planned precision.
        engine: `vllm` or `sglang`.

    Raises:
        RecipeError: no such engine, prompts are split off, nothing to draft with, or vLLM would have to span nodes.
        CapacityError: the model's context, stretched 16 times, is shorter than the requests.
    """
    if engine not in ENGINES_EMITTED:
        raise RecipeError("no such engine", where=f"--emit {engine}", expected=f"one of {', '.join(ENGINES_EMITTED)}")
    if option.fleet.prompts is not None:
        raise RecipeError("workers of their own for prompts need a router", where="--emit", fix="take another layout")
    d = option.fleet.decode
    if d.speculation.tokens and not d.shape.mtp_depth:
        raise RecipeError(
            "it has no multi-token-prediction layer to draft with", where=d.shape.name, fix="leave --speculate out"
        )
    nodes = math.ceil(d.layout.chips / _NODE)
    if engine == "vllm" and nodes > 1:
        raise RecipeError(
            f"{d.layout} spans {nodes} nodes", where="--emit vllm", expected="one node", fix="--emit sglang spans them"
        )
    context = _context(workload)
    flags = _vllm(option, context) if engine == "vllm" else _sglang(option, context, nodes)
    unknown = [name for name, _ in flags if name not in engine_flags(engine)]
    assert not unknown, unknown
    program = ["vllm", "serve", checkpoint] if engine == "vllm" else ["python", "-m", "sglang.launch_server"]
    if engine == "sglang":
        flags = [("--model-path", checkpoint), *flags]
    return _script(option, engine, program, flags, nodes)


def _context(workload: Workload) -> int:
    """Tokens of a request that the server has to hold, rounded up to a thousand and twenty-four."""
    return math.ceil((workload.prompt_tokens + workload.output_tokens) * _LONGER / 1024) * 1024


def _yarn(d: Deployment, context: int) -> str | None:
    """The override that stretches the context, where the model's own is shorter than what is asked."""
    own = d.shape.max_context
    if context <= own:
        return None
    factor = math.ceil(context / own)
    if factor > 16:
        raise CapacityError(
            f"requests of {context:,} tokens in a context of {own:,}", where=d.shape.name, fix="shorten the workload"
        )
    scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": own}
    return json.dumps({"rope_scaling": scaling, "max_position_embeddings": factor * own})


def _vllm(option: Option, context: int) -> Flags:
    d = option.fleet.decode
    layout = d.layout
    flags: Flags = [("--tensor-parallel-size", str(layout.tp))]
    sizes = (
        ("--pipeline-parallel-size", layout.pp),
        ("--data-parallel-size", layout.dp),
        ("--decode-context-parallel-size", layout.cp),
    )
    flags += [(name, str(size)) for name, size in sizes if size > 1]
    if layout.ep > 1:
        flags.append(("--enable-expert-parallel", None))
    flags += [
        ("--max-model-len", str(context)),
        ("--max-num-seqs", str(option.batch)),
        ("--max-num-batched-tokens", str(max(CHUNK_TOKENS, option.batch))),
        ("--gpu-memory-utilization", f"{MEMORY_SHARE:g}"),
    ]
    if d.cache_dtype_bytes == 1:
        flags.append(("--kv-cache-dtype", "fp8"))
    override = _yarn(d, context)
    if override:
        flags.append(("--hf-overrides", override))
    if d.speculation.tokens:
        config = {"method": "mtp", "num_speculative_tokens": d.speculation.tokens}
        flags.append(("--speculative-config", json.dumps(config)))
    return flags


def _sglang(option: Option, context: int, nodes: int) -> Flags:
    d, memory = option.fleet.decode, option.memory
    layout = d.layout
    # SGLang's tensor parallelism counts all chips of the replica; attention is copied inside of it.
    flags: Flags = [("--tp-size", str(layout.tp * layout.dp))]
    if layout.pp > 1:
        flags.append(("--pp-size", str(layout.pp)))
    if layout.dp > 1:
        flags += [("--dp-size", str(layout.dp)), ("--enable-dp-attention", None)]
    if layout.ep > 1:
        flags.append(("--ep-size", str(layout.ep)))
    if nodes > 1:
        flags += [
            ("--nnodes", str(nodes)),
            ("--node-rank", "$NODE_RANK"),
            ("--dist-init-addr", "$MASTER_ADDR:20000"),
        ]
    static = (memory.usable - memory.activations - memory.other) / d.chip.memory_bytes
    flags += [
        ("--context-length", str(context)),
        ("--max-running-requests", str(option.batch * layout.dp)),
        ("--chunked-prefill-size", str(CHUNK_TOKENS)),
        ("--mem-fraction-static", f"{static:.2f}"),
    ]
    if d.precision.name.startswith("nvfp4"):
        flags.append(("--quantization", "modelopt_fp4"))
    if d.cache_dtype_bytes == 1:
        flags.append(("--kv-cache-dtype", "fp8_e4m3"))
    override = _yarn(d, context)
    if override:
        flags.append(("--json-model-override-args", override))
    if d.speculation.tokens:
        flags += [
            ("--speculative-algorithm", "NEXTN"),
            ("--speculative-num-steps", str(d.speculation.tokens)),
            ("--speculative-eagle-topk", "1"),
            ("--speculative-num-draft-tokens", str(d.speculation.tokens + 1)),
        ]
    return flags


def _script(option: Option, engine: str, program: list[str], flags: Flags, nodes: int) -> str:
    d, table = option.fleet.decode, _tables()[engine]
    words = [shlex.join(program)]
    for name, value in flags:
        words.append(name if value is None else f"{name} {_quoted(value)}")
    head = [
        "#!/usr/bin/env bash",
        f"# {d.shape.name} in {d.precision.name} on {option.replicas} x {d.layout} of {d.chip.name}, by tafkir plan:",
        f"# {option.point.concurrency * option.replicas:,.0f} users, {option.point.ttft_s:.2f} s to the first token, "
        f"{option.point.tpot_s * 1e3:.1f} ms a token (means).",
        f"# Flags as in {table['source']}",
        f"# at {table['commit']}.",
        "set -euo pipefail",
    ]
    if nodes > 1:
        head += [
            f"# Run it on each of {nodes} nodes of a replica ({option.replicas} of them).",
            ': "${NODE_RANK:?from 0 to ' + str(nodes - 1) + '}" "${MASTER_ADDR:?address of the node of rank 0}"',
        ]
        return "\n".join([*head, _command(words, f"--port {_PORT}", indent="")]) + "\n"
    return "\n".join([*head, *_replicas(option, words)]) + "\n"


def _replicas(option: Option, words: list[str]) -> list[str]:
    """One server for each replica of a node, on neighbouring ports and chips of its own."""
    d = option.fleet.decode
    size = d.layout.chips
    here = min(option.replicas, _NODE // size)
    machines = math.ceil(option.replicas / here)
    lines = [f"# Run it on each of {machines} nodes, behind a load balancer."] if machines > 1 else []
    if here == 1:
        return [*lines, _command(words, f"--port {_PORT}", indent="")]
    prefixes = {"ascend": "ASCEND_RT_VISIBLE_DEVICES", "mi3": "HIP_VISIBLE_DEVICES"}
    variable = next((name for key, name in prefixes.items() if d.chip.key.startswith(key)), "CUDA_VISIBLE_DEVICES")
    return [
        *lines,
        f"for replica in $(seq 0 {here - 1}); do",
        f"  first=$((replica * {size}))",
        f'  export {variable}="$(seq -s, "$first" $((first + {size - 1})))"',
        _command(words, f'--port "$(({_PORT} + replica))" &', indent="  "),
        "done",
        "wait",
    ]


def _command(words: list[str], last: str, indent: str) -> str:
    return f" \\\n{indent}  ".join([indent + words[0], *words[1:], last])


def _quoted(value: str) -> str:
    """For the shell; what it shall fill in stays open."""
    return f'"{value}"' if value.startswith("$") else shlex.quote(value)
