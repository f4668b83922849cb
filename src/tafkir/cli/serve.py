"""`tafkir serve CHECKPOINT` and `tafkir chat CHECKPOINT`: talk to a model over HTTP or in the terminal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.serve.canaries import CanaryOptions
    from tafkir.serve.options import ServerOptions

__all__ = ["CacheNumbers", "Speculate", "chat", "serve"]


class CacheNumbers(StrEnum):
    """`engine.cache_formats.CacheFormat`, as a command line names it."""

    AUTO = "auto"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="ngram|nextn|CHECKPOINT[:TOKENS]",
        help="Draft tokens and check several in a step: from the text itself, by the model's MTP layers, or by a "
        "smaller model. What is said stays the same; it rests by itself where it does not pay.",
    ),
]


class WeightNumbers(StrEnum):
    """`serve.loading.WeightNumbers`, as a command line names it."""

    AUTO = "auto"
    FLOAT32 = "float32"
    STORED = "stored"
    INT8_HEAD = "int8-head"


class MatmulPrecision(StrEnum):
    """`ops.native.MatmulPrecision`, as a command line names it."""

    HIGHEST = "highest"
    HIGH = "high"
    MEDIUM = "medium"


class Device(StrEnum):
    """Where the tokens are computed."""

    CPU = "cpu"
    CUDA = "cuda"


CheckpointName = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, run directory, or bundled name.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-key.")]
MaxContext = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of a prompt and its answer; the model's if left out.")
]
KvCache = Annotated[
    CacheNumbers,
    typer.Option("--kv-cache", help="Its numbers: auto as the weights', fp8 a byte each, nvfp4 4.5 bits."),
]
Weights = Annotated[
    WeightNumbers,
    typer.Option(
        help="In memory: float32, or stored as in the checkpoint (bf16, INT8, FP8, NVFP4); auto: stored. int8-head: as "
        "stored, but logits come from an INT8 copy of the output head: fewer bytes, other numbers than those stored."
    ),
]
Precision = Annotated[
    MatmulPrecision,
    typer.Option(
        "--matmul-precision",
        help="Activations before a matrix unit (AMX), for prompts and batches of nine tokens or more: highest "
        "float32's 24 bits, high 16, medium bfloat16 as other engines compute, three times as fast.",
    ),
]
DeviceName = Annotated[
    Device,
    typer.Option(help="cuda: weights in bf16, or NVFP4 as stored; with --weights float32 all in float32. Untried."),
]
FourBitProducts = Annotated[
    bool,
    typer.Option("--four-bit-products", help="On Blackwell: multiply NVFP4 weights by activations rounded to NVFP4."),
]
Processors = Annotated[
    str | None,
    typer.Option(
        "--cpus", metavar="LIST|nodeN", help="Processors to stay on: 0-15,32-47, or those of a NUMA node: node1."
    ),
]
PrefixCache = Annotated[
    bool, typer.Option(help="Begin with what earlier requests of the same beginning have left in the cache.")
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="The same tokens and log-probabilities to the bit, alone or in any mix."),
]


ApiKeys = Annotated[
    list[str] | None, typer.Option(envvar="TAFKIR_API_KEY", help="A key that clients must bring; repeatable.")
]
Origins = Annotated[list[str] | None, typer.Option(help="An origin whose pages may call the server; repeatable.")]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="TAFKIR_ADMIN_KEY", help="Opens /update_weights_from_disk, which puts other weights in place."),
]
TracesEndpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="Send OpenTelemetry traces there: http://localhost:4318/v1/traces.")
]
AdminRemote = Annotated[bool, typer.Option("--admin-remote", help="Open it to other machines than this one, too.")]
CanaryFile = Annotated[
    str | None,
    typer.Option(metavar="FILE|default", help="Questions with known answers that the server asks itself in between."),
]
BaselineFile = Annotated[
    Path | None,
    typer.Option(help="What their answers are held to (`tafkir canary record`); the first round if left out."),
]
CanaryShare = Annotated[
    float, typer.Option(min=0.0001, max=1, help="Most of the time that may go by with canaries on their way.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="tafkir, or vllm, sglang, trtllm: start that one as `tafkir plan` would.")
]
HardwareName = Annotated[str | None, typer.Option("--hardware", help="Of another engine: h100:8, cpu, ...")]
PrintOnly = Annotated[bool, typer.Option("--print", help="Print how another engine is started.")]


def serve(
    checkpoint: CheckpointName,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that run at once.")] = 32,
    max_context: MaxContext = None,
    max_cache_mb: Annotated[int | None, typer.Option(min=1, help="Limit of the key-value cache, in MiB.")] = None,
    kv_cache: KvCache = CacheNumbers.AUTO,
    speculate: Speculate = None,
    weights: Weights = WeightNumbers.AUTO,
    matmul_precision: Precision = MatmulPrecision.HIGHEST,
    prefix_cache: PrefixCache = True,
    batch_invariant: BatchInvariant = False,
    device: DeviceName = Device.CPU,
    four_bit_products: FourBitProducts = False,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests that wait.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; torch's choice if left out.")] = None,
    cpus: Processors = None,
    api_key: ApiKeys = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line.")] = None,
    rate_limit: Annotated[int, typer.Option(min=0, help="Most requests a minute of one key; 0: no limit.")] = 0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest body of a request, in MiB.")] = 4.0,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take to arrive.")] = 20.0,
    request_timeout: Annotated[float, typer.Option(min=0, help="Seconds that an answer may take; 0: any.")] = 0.0,
    drain: Annotated[float, typer.Option(min=1, help="Seconds that running requests get after SIGTERM.")] = 30.0,
    cors_origin: Origins = None,
    admin_key: AdminKey = None,
    admin_remote: AdminRemote = False,
    otlp_traces_endpoint: TracesEndpoint = None,
    canaries: CanaryFile = None,
    baseline: BaselineFile = None,
    canary_share: CanaryShare = 0.01,
    engine: EngineName = "tafkir",
    hardware: HardwareName = None,
    print_only: PrintOnly = False,
) -> None:
    """Serve a checkpoint over the OpenAI API, with a chat page at /.

    Keys are asked for on everything but /, /health, /ready, /version and /metrics. SIGTERM takes nothing new and lets
    what runs finish.
    """
    _run_on(cpus)
    from tafkir.cli.completer import checkpoint_of
    from tafkir.cli.handover import hand_over
    from tafkir.ops.native import set_matmul_precision
    from tafkir.serve.run import serve as serve_checkpoint

    if engine != "tafkir":
        hand_over(checkpoint_of(checkpoint), engine, hardware, port, print_only=print_only)
        return
    options = _options(
        api_key, api_key_file, rate_limit, max_body_bytes=round(max_body_mb * (1 << 20)),
        cors_origins=tuple(cors_origin or ()), body_timeout_s=body_timeout, request_timeout_s=request_timeout,
        drain_s=drain, admin_key=admin_key, admin_remote=admin_remote, otlp_traces_endpoint=otlp_traces_endpoint,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "max_batch": max_batch, "max_context": max_context, "max_queue": max_queue, "num_threads": threads,
        "weights": weights.value, "speculate": speculate, "prefix_caching": prefix_cache, "model_name": model_name,
        "batch_invariant": batch_invariant, "device": device.value, "four_bit_products": four_bit_products,
        "max_cache_bytes": max_cache_mb << 20 if max_cache_mb else None, "kv_cache": kv_cache.value,
        "canaries": _canaries(canaries, baseline, canary_share),
    }  # fmt: skip
    set_matmul_precision(matmul_precision.value)
    serve_checkpoint(checkpoint_of(checkpoint), host, port, options=options, **sizes)


def _run_on(cpus: str | None) -> None:
    """Choose processors, before torch is imported, which counts those that it may use."""
    if cpus is not None:
        from tafkir.native.placement import run_on

        run_on(cpus)


def _options(keys: list[str] | None, file: Path | None, rate_limit: int, **rest: Any) -> ServerOptions:
    from tafkir.serve.options import ServerOptions, read_api_keys

    return ServerOptions((*(keys or ()), *(read_api_keys(file) if file else ())), rate_limit, **rest)


def _canaries(file: str | None, baseline: Path | None, share: float) -> CanaryOptions | None:
    from tafkir.serve.canaries import CanaryOptions

    return CanaryOptions(None if file == "default" else Path(file), baseline, share) if file else None


def chat(
    checkpoint: CheckpointName,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens of this total share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Fixes what is drawn at a temperature above 0.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message that opens every conversation.")] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Keep the conversation from one message to the next.")
    ] = False,
    thinking: Annotated[bool, typer.Option(help="Show the chain of thought.")] = True,
    speculate: Speculate = None,
) -> None:
    """Chat with a checkpoint in the terminal.

    Each message stands alone unless --history is given. From a pipe, every line gets an answer.
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.records import SamplingParams
    from tafkir.serve.chat import run_chat

    run_chat(
        checkpoint_of(checkpoint),
        params=SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed),
        system=system,
        history=history,
        show_thinking=thinking,
        speculate=speculate,
    )
