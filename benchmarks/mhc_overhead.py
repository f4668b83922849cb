"""What mHC with n = 4 streams adds to a training step (forward, backward, AdamW), against the plain residual.

Twins that differ in the residual alone take steps in turn, in one run, on the same tokens; the overhead is the median
of the pairwise ratios of CPU seconds (of wall seconds on a GPU), less one. `reference` computes the paper's equations
with autograd, `fused` is what the decoder does (by compiled kernels or torch's ops, as `--kernels` says), `apart` the
same with a writing and the next reading each by itself, `recompute` keeps the streams of one sublayer in a few,
`compiled` has torch.compile make the reference's kernels. Bytes are what
the operations of one sublayer's mixing read and write, tensor by tensor, per token, with torch's ops (what a compiled
kernel does inside cannot be seen); the least is the paper's table (arXiv 2512.24880, section 4.3) with its backward.

    python benchmarks/mhc_overhead.py --out benchmarks/results/mhc_overhead.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tafkir.models import residual
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.native.memory import keep_freed_memory
from tafkir.ops import hyper_connections as hc
from tafkir.ops import native
from tafkir.ops.loss import next_token_loss
from tafkir.ops.sinkhorn import sinkhorn, sinkhorn_reference
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.residual import ResidualConfig

VERSIONS = ("reference", "apart", "fused", "recompute", "compiled")
STREAMS = 4


def config_of(hidden: int, layers: int, residual_config: ResidualConfig) -> ModelConfig:
    """A dense decoder in the proportions of Ring-mini-2.0: KV heads a quarter of the heads, MLP 2.5 times the width."""
    return ModelConfig(
        vocab_size=2048,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        head_dim=64,
        intermediate_size=hidden * 5 // 2,
        first_k_dense_replace=layers,
        residual=residual_config,
    )


def reference_read(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float, pre_eps: float) -> hc.Reading:
    """`project_and_read` without a backward of its own."""
    z, u = hc.project_and_read_reference(x, phi, bias, alpha, norm_eps, pre_eps)
    return hc.Reading(z, u, x, torch.sigmoid(alpha * z[:, : x.shape[1]] + bias) + pre_eps)


def stacked_write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Equation 3 as sums that a compiler can fuse; a matmul of 4 by 4 blocks it would leave to a library."""
    num = x.shape[1]
    rows = [
        sum((res[:, i, j, None] * x[:, j] for j in range(num)), post[:, i, None] * y)  # one new stream
        for i in range(num)
    ]
    return torch.stack(rows, 1)


def kernels_of(version: str) -> residual.Kernels:
    """The ops by which the decoder mixes its streams in the version of that name."""
    if version == "reference":
        return residual.Kernels(reference_read, hc.write_streams_reference, sinkhorn_reference)
    if version == "compiled":
        return residual.Kernels(torch.compile(reference_read), torch.compile(stacked_write), sinkhorn)
    if version == "apart":
        return residual.TORCH_KERNELS._replace(write_and_read=None)
    return residual.TORCH_KERNELS


def build_step(config: ModelConfig, version: str, tokens: int, device: torch.device) -> Callable[[], float]:
    """A training step on documents of 128 tokens."""
    decoder = build_decoder(config, seed=0).to(device)
    residual.use_kernels(decoder, kernels_of(version))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(tokens, device=device) % 128
    bounds = list(range(0, tokens + 1, 128))

    def step() -> float:
        hidden = decoder(ids, positions, VarlenCausal(bounds, device=device)).hidden_ND
        loss = next_token_loss(hidden, decoder.head_weight, ids.roll(-1)) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())  # waits for the device

    return step


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            leaves = [leaf for leaf in (*args, out) if isinstance(leaf, Tensor)]
            for value in (*args, out):
                leaves += (
                    [leaf for leaf in value if isinstance(leaf, Tensor)] if isinstance(value, list | tuple) else []
                )
            # An expanded tensor is read at its own size.
            self.total += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in leaves)
        return out


def mixing_bytes(version: str, hidden: int, tokens: int = 256) -> float:
    """Bytes per token of one sublayer's mixing, forward and backward, in multiples of a hidden state (D floats)."""
    config = ResidualConfig(kind="mhc", num_streams=STREAMS)
    connection = residual.ManifoldConnection(config, hidden)
    with torch.no_grad():
        connection.fresh_weights(0.02, torch.Generator().manual_seed(0))
    x = torch.randn(tokens, STREAMS, hidden, requires_grad=True)
    y = torch.randn(tokens, hidden, requires_grad=True)
    state = residual.StreamState(x, None)
    residual.use_kernels(connection, kernels_of(version))
    with CountBytes() as count:
        u, ctx = connection.read(state)
        out = connection.write(state, ctx, y).x_NnD
        torch.autograd.backward([u, out], [torch.ones_like(u), torch.ones_like(out)])
    return count.total / (tokens * hidden * 4)


def least_bytes() -> int:
    """The same by the paper's kernels: each meets every operand once.

    Forward: norm and projection read nC; F_pre reads nC, writes C; F_post,res reads (n + 1)C, writes nC. Backward:
    F_post,res reads its gradient, X and y and writes two gradients, (3n + 2)C; the other two together read their
    gradient, X and du and write one gradient, (3n + 1)C.
    """
    n = STREAMS
    return n + (n + 1) + (n + 1 + n) + (3 * n + 2) + (3 * n + 1)


def compiled_bytes() -> int:
    """The same by the compiled kernels, which hold a block of tokens in the cache from one writing to the next reading.

    Forward: X and y are read, the new streams and u written. Backward: three times the streams (their gradient, the new
    ones and X), du and y are read, two gradients written.
    """
    n = STREAMS
    return (n + 1) + (n + 1) + (3 * n + 2) + (n + 1)


def measure(step: Callable[[], float], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    step()
    return clock() - start


def median_interval(values: list[float]) -> tuple[float, float]:
    """About 95 % for the median, by order statistics (binomial, n draws at one half)."""
    ordered, n = sorted(values), len(values)
    outside, tail = 0, 1 / 2**n
    while tail <= 0.025 and outside < n // 2:
        outside += 1
        tail += math.comb(n, outside) / 2**n
    return ordered[max(0, outside - 1)], ordered[n - max(1, outside)]


def compare(hidden: int, args: argparse.Namespace) -> dict[str, Any]:
    """Plain against every version, in turn."""
    device = torch.device(args.device)
    steps = {"plain": build_step(config_of(hidden, args.layers, ResidualConfig()), "plain", args.tokens, device)}
    for version in args.versions:
        config = ResidualConfig(kind="mhc", num_streams=STREAMS, recompute=version == "recompute")
        steps[version] = build_step(config_of(hidden, args.layers, config), version, args.tokens, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            taken = measure(step, device)
            if repeat:
                seconds[name].append(taken)
    row: dict[str, Any] = {"hidden_size": hidden, "plain_step_s": statistics.median(seconds["plain"]), "versions": {}}
    spread = statistics.quantiles(seconds["plain"], n=4) if args.repeats > 1 else [0.0, 0.0, 0.0]
    row["plain_spread"] = (spread[2] - spread[0]) / row["plain_step_s"]
    for version in args.versions:
        ratios = [b / a - 1 for a, b in zip(seconds["plain"], seconds[version], strict=True)]
        row["versions"][version] = {
            "overhead": statistics.median(ratios),
            "overhead_interval": median_interval(ratios),
            # What other processes take from a step only adds to it, so the fastest steps are the cleanest.
            "overhead_of_fastest": min(seconds[version]) / min(seconds["plain"]) - 1,
            "overhead_range": (min(ratios), max(ratios)),
            "added_ms_per_sublayer": 1e3 * statistics.median(ratios) * row["plain_step_s"] / (2 * args.layers),
        }
    return row


def render(result: dict[str, Any]) -> str:
    lines = [f"{'hidden':>7}{'plain s':>9}{'noise':>7}" + "".join(f"{v:>26}" for v in result["versions"])]
    for row in result["rows"]:
        cells = [
            f"{v['overhead']:+9.1%} ({v['overhead_interval'][0]:+.0%}..{v['overhead_interval'][1]:+.0%})"
            for v in row["versions"].values()
        ]
        lines.append(
            f"{row['hidden_size']:7}{row['plain_step_s']:9.3f}{row['plain_spread']:7.0%}"
            + "".join(f"{cell:>26}" for cell in cells)
        )
    least = result["least_bytes_in_hidden_states"]
    lines.append(f"bytes moved by the mixing, in hidden states per token and sublayer; the least is {least}:")
    lines.append(f"  {'compiled':10} {result['compiled_bytes_in_hidden_states']:6.1f}, as it is written")
    lines += [f"  {name:10} {moved:6.1f} = {moved / least:.1f}x" for name, moved in result["bytes"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=["reference", "fused", "recompute"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per step; a multiple of 128")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which each version takes a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument(
        "--memory", choices=("keep", "system"), default="keep", help="keep freed memory, as training stages do, or not"
    )
    parser.add_argument("--note", default="", help="goes into the result, such as how busy the machine was")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = args.memory == "keep" and keep_freed_memory()
    native.select_kernels("torch")
    # What a compiler fused cannot be seen operation by operation.
    moved = {name: mixing_bytes(name, 1024) for name in ("reference", "fused")}
    result = {
        "benchmark": "mhc_overhead",
        "command": " ".join(["python", *sys.argv]),
        "streams": STREAMS,
        "layers": args.layers,
        "tokens_per_step": args.tokens,
        "versions": args.versions,
        "threads": args.threads,
        "device": args.device,
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "memory": "keep" if kept else "system",
        "note": args.note,
        "least_bytes_in_hidden_states": least_bytes(),
        "compiled_bytes_in_hidden_states": compiled_bytes(),
        "bytes": moved,
        "kernels": native.select_kernels(args.kernels),
        "rows": [compare(hidden, args) for hidden in args.hidden],
    }
    if not args.json:
        print(render(result))
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
