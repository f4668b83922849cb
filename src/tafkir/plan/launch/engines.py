"""How an engine is started with a planned layout: program, flags, and how the nodes of a replica find each other."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.advise import MEMORY_SHARE, Option
from tafkir.plan.launch.yaml import render_yaml
from tafkir.plan.load import CHUNK_TOKENS
from tafkir.plan.serving import Deployment
from tafkir.plan.workload import Workload

__all__ = ["NODE_CHIPS", "PORT", "Flags", "Server", "engine_flags", "engine_table", "server_of"]

NODE_CHIPS, PORT = 8, 8000
"""Chips of a node, and where a server listens."""

_TABLE = Path(__file__).resolve().parents[1] / "tables" / "engine_flags.toml"
# Room for what requests are longer than in the mean.
_LONGER = 2.0
_RAY_PORT, _SGLANG_PORT, _DP_PORT = 6379, 20000, 13345

Flags = list[tuple[str, str | None]]
"""(flag, value); None for a switch."""


@dataclass(frozen=True, slots=True)
class Server:
    """One replica's server.

    Attributes:
        engine: `vllm`, `sglang` or `trtllm`.
        program: words before the flags. flags: the same on every node.
        body: shell lines that start it, between which `$NODE_RANK` and `$MASTER_ADDR` tell the nodes apart.
        nodes: that one replica takes. chips: of it on each.
        mpi: every chip's process is started by MPI (TensorRT-LLM over nodes).
    """

    engine: str
    program: tuple[str, ...]
    flags: tuple[tuple[str, str | None], ...]
    body: tuple[str, ...]
    nodes: int
    chips: int
    mpi: bool = False


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def engine_table(engine: str) -> dict[str, Any]:
    """Flags, image and metrics of an engine, and where they were found.

    Raises:
        RecipeError: there is none of that name.
    """
    if engine not in _tables():
        raise RecipeError("no such engine", where=f"--emit {engine}", expected=f"one of {', '.join(_tables())}")
    table: dict[str, Any] = _tables()[engine]
    return table


def engine_flags(engine: str) -> frozenset[str]:
    """Flags that were found in an engine's definitions of its arguments."""
    return frozenset(engine_table(engine)["flags"])


def server_of(option: Option, workload: Workload, checkpoint: str, engine: str) -> Server:
    """What starts one replica of an option.

    Args:
        option: without workers of their own for prompts, which need a router.
        workload: whose lengths the server has to hold.
        checkpoint: folder or hub name, in the planned precision.

    Raises:
        RecipeError: no such engine, prompts are split off, nothing to draft with, or a layout the engine cannot start.
        CapacityError: the model's context, stretched 16 times, is shorter than the requests.
    """
    known = engine_flags(engine)
    if option.fleet.prompts is not None:
        raise RecipeError("workers of their own for prompts need a router", where="--emit", fix="take another layout")
    d = option.fleet.decode
    if d.speculation.tokens and not d.shape.mtp_depth:
        raise RecipeError(
            "it has no multi-token-prediction layer to draft with", where=d.shape.name, fix="leave --speculate out"
        )
    nodes = math.ceil(d.layout.chips / NODE_CHIPS)
    longest = math.ceil((workload.prompt_tokens + workload.output_tokens) * _LONGER)
    context = math.ceil(longest / 1024) * 1024
    if longest <= d.shape.max_context:
        context = min(context, d.shape.max_context)
    build = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[engine]
    server = build(option, context, nodes, checkpoint)
    unknown = [name for name, _ in server.flags if name not in known]
    assert not unknown, unknown
    return server


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


def _trust(checkpoint: str) -> Flags:
    """What a folder needs that brings the class of its config along, as Ling's do."""
    config = Path(checkpoint) / "config.json"
    brings = config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    return [("--trust-remote-code", None)] if brings else []


def _command(program: tuple[str, ...], flags: Flags, *more: str) -> str:
    # Signals reach the server itself.
    words = [f"exec {shlex.join(program)}"]
    words += [name if value is None else f"{name} {_quoted(value)}" for name, value in flags]
    return " \\\n  ".join([*words, *more])


def _quoted(value: str) -> str:
    """For the shell; what it shall fill in stays open."""
    return f'"{value}"' if value.startswith("$") else shlex.quote(value)


def _vllm(option: Option, context: int, nodes: int, checkpoint: str) -> Server:
    d = option.fleet.decode
    layout = d.layout
    # Its context parallelism splits the cache over chips that tensor parallelism counts.
    flags: Flags = [("--tensor-parallel-size", str(layout.tp * layout.cp))]
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
    flags += _trust(checkpoint)
    program = ("vllm", "serve", checkpoint)
    if nodes == 1:
        body = [_command(program, flags, '--port "$PORT"')]
    else:
        flags, body = _vllm_nodes(option, program, flags, nodes)
    return Server("vllm", program, tuple(flags), tuple(body), nodes, _chips_here(d, nodes))


def _vllm_nodes(option: Option, program: tuple[str, ...], flags: Flags, nodes: int) -> tuple[Flags, list[str]]:
    """Copies of attention on every node speak to the first one's coordinator; one that spans nodes is Ray's."""
    layout = option.fleet.decode.layout
    one = layout.tp * layout.pp * layout.cp
    if layout.dp == 1:
        flags = [*flags, ("--distributed-executor-backend", "ray")]
        return flags, [
            'if [ "$NODE_RANK" -gt 0 ]; then',
            f'  exec ray start --address="$MASTER_ADDR:{_RAY_PORT}" --block',
            "fi",
            f"ray start --head --port={_RAY_PORT}",
            _command(program, flags, '--port "$PORT"'),
        ]
    local = layout.dp // nodes
    if local * nodes != layout.dp or local * one > NODE_CHIPS:
        raise RecipeError(
            f"a copy of attention would span nodes in {layout}", where="--emit vllm", fix="--emit sglang spans them"
        )
    flags = [
        *flags,
        ("--data-parallel-size-local", str(local)),
        ("--data-parallel-address", "$MASTER_ADDR"),
        ("--data-parallel-rpc-port", str(_DP_PORT)),
    ]
    return flags, [
        'role=(--port "$PORT")',
        'if [ "$NODE_RANK" -gt 0 ]; then',
        f'  role=(--headless --data-parallel-start-rank "$((NODE_RANK * {local}))")',
        "fi",
        _command(program, flags, '"${role[@]}"'),
    ]


def _chips_here(d: Deployment, nodes: int) -> int:
    return d.layout.chips if nodes == 1 else NODE_CHIPS


def _sglang(option: Option, context: int, nodes: int, checkpoint: str) -> Server:
    d, memory = option.fleet.decode, option.memory
    layout = d.layout
    if layout.cp > 1:
        raise RecipeError(f"{layout} splits one cache", where="--emit sglang", fix="--emit vllm does")
    # SGLang's tensor parallelism counts all chips of the replica; attention is copied inside of it.
    flags: Flags = [("--model-path", checkpoint), ("--tp-size", str(layout.tp * layout.dp))]
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
            ("--dist-init-addr", f"$MASTER_ADDR:{_SGLANG_PORT}"),
        ]
    flags += _trust(checkpoint)
    static = (memory.usable - memory.activations - memory.other) / d.chip.memory_bytes
    flags += [
        ("--context-length", str(context)),
        ("--max-running-requests", str(option.batch * layout.dp)),
        ("--chunked-prefill-size", str(CHUNK_TOKENS)),
        ("--mem-fraction-static", f"{static:.2f}"),
        ("--enable-metrics", None),
        ("--host", "0.0.0.0"),
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
    program = ("python", "-m", "sglang.launch_server")
    body = (_command(program, flags, '--port "$PORT"'),)
    return Server("sglang", program, tuple(flags), body, nodes, _chips_here(d, nodes))


def _trtllm(option: Option, context: int, nodes: int, checkpoint: str) -> Server:
    """What has no flag stands in a file of options that the script writes first."""
    d = option.fleet.decode
    layout = d.layout
    if layout.cp > 1:
        raise RecipeError(f"{layout} splits one cache", where="--emit trtllm", fix="--emit vllm does")
    if context > d.shape.max_context:
        raise CapacityError(
            f"requests of {context:,} tokens in {d.shape.max_context:,}, which trtllm-serve does not stretch",
            where=d.shape.name,
            fix="--emit vllm or sglang, or shorten the workload",
        )
    options: dict[str, Any] = {}
    if layout.dp > 1:
        options["enable_attention_dp"] = True
    if d.cache_dtype_bytes == 1:
        options["kv_cache_config"] = {"dtype": "fp8", "free_gpu_memory_fraction": MEMORY_SHARE}
    if d.speculation.tokens:
        options["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": d.speculation.tokens}
    flags: Flags = [("--tp_size", str(layout.tp * layout.dp))]
    flags += [(name, str(size)) for name, size in (("--pp_size", layout.pp), ("--ep_size", layout.ep)) if size > 1]
    flags += [
        ("--max_batch_size", str(option.batch)),
        ("--max_num_tokens", str(max(CHUNK_TOKENS, option.batch))),
        ("--max_seq_len", str(context)),
        ("--kv_cache_free_gpu_memory_fraction", f"{MEMORY_SHARE:g}"),
        ("--enable_chunked_prefill", None),
        ("--host", "0.0.0.0"),
    ]
    body = []
    if options:
        body = ['OPTIONS="$(mktemp)"', "cat > \"$OPTIONS\" <<'YAML'", render_yaml(options) + "YAML"]
        flags.append(("--extra_llm_api_options", "$OPTIONS"))
    if nodes > 1:
        flags.append(("--gpus_per_node", str(NODE_CHIPS)))
    launch = ("trtllm-llmapi-launch",) if nodes > 1 else ()
    program = (*launch, "trtllm-serve", "serve", checkpoint)
    body.append(_command(program, flags, '--port "$PORT"'))
    return Server("trtllm", program, tuple(flags), tuple(body), nodes, _chips_here(d, nodes), mpi=nodes > 1)
