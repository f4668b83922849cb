"""How fast a sharded bfloat16 checkpoint is loaded, beside plain reads of the same files from the page cache.

Writes a checkpoint (the first layers of Ring-mini-2.0, about 4 GB unless told otherwise) into a temporary folder,
warms the page cache, and alternates:

    read into memory    every shard whole, into fresh memory: what anything that wants the bytes has to pay
    read, large pages   the same into memory that Linux was asked to give in large pages, as the loader's is
    read and forget     every shard through one buffer of 1 MiB: no memory is filled, the upper bound
    load                `load_checkpoint`: strict, every weight checked for NaN and infinity
    load, hashed        the same with a manifest: every tensor's SHA-256 compared as well
    safetensors         `safe_open(...).get_tensor` copied into the same decoder, nothing checked

Rates are bytes on disk per CPU second (user and system) and per second of wall time; ratios are medians over pairs.

    python benchmarks/load_checkpoint.py --out benchmarks/results/load_checkpoint.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from tafkir.checkpoint.load import advise_huge_pages, empty_decoder, load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.models.decoder import Decoder
from tafkir.models.hf import read_hf_tensors
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.presets import load_preset

Timing = tuple[float, float]

WAYS = ("read into memory", "load", "read, large pages", "read and forget", "safetensors", "load, hashed")


def model_config(gigabytes: float) -> ModelConfig:
    """Ring-mini-2.0 with as many of its layers as come nearest to so many gigabytes in bfloat16; two at least."""
    whole = load_preset("ring-mini-2.0")
    cuts = [whole.model_copy(update={"num_hidden_layers": n}) for n in range(2, whole.num_hidden_layers + 1)]
    return min(cuts, key=lambda cut: abs(2 * cut.num_parameters() - 1e9 * gigabytes))


@torch.no_grad()
def write_checkpoint(folder: Path, config: ModelConfig, shard_bytes: int) -> None:
    """Weights of normal noise, repeated: drawing billions of them would take longer than the benchmark."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.bfloat16().to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for parameter in decoder.parameters():
        for part in parameter.view(-1).split(noise.numel()):
            part.copy_(noise[: part.numel()])
    for router in decoder.routers:
        assert router.expert_bias is not None
        router.expert_bias = torch.zeros(router.expert_bias.shape)
    save_checkpoint(folder, decoder, dtype=torch.bfloat16, max_shard_bytes=shard_bytes)


def timed(action: Callable[[], object]) -> Timing:
    """CPU and wall seconds of an action; what it returns is freed outside of the measurement."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    timing = time.process_time() - cpu, time.perf_counter() - wall
    del result
    return timing


def read_and_forget(files: list[Path]) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def read_into_large_pages(files: list[Path]) -> list[torch.Tensor]:
    contents = []
    for file in files:
        content = torch.empty(file.stat().st_size, dtype=torch.uint8)
        advise_huge_pages(content)
        with file.open("rb", buffering=0) as handle:
            view = content.numpy().data
            for start in range(0, len(view), 1 << 20):
                handle.readinto(view[start : start + (1 << 20)])
        contents.append(content)
    return contents


def load_with_safetensors(folder: Path, files: list[Path], config: ModelConfig) -> Decoder:
    decoder = empty_decoder(config, torch.bfloat16)
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118  # not a mapping
        read_hf_tensors(decoder, where, lambda name: where[name].get_tensor(name))
    return decoder


def measure(folder: Path, config: ModelConfig, repeats: int, chosen: list[str]) -> dict[str, list[Timing]]:
    """Alternates the ways to read, after one round that warms the cache."""
    files = sorted(folder.glob("*.safetensors"))
    load = lambda hashed: load_checkpoint(folder, dtype=torch.bfloat16, verify_hashes=hashed)  # noqa: E731
    manifest, aside = folder / "tafkir.json", folder / "aside.json"
    ways: dict[str, Callable[[], object]] = {
        "read into memory": lambda: [file.read_bytes() for file in files],
        "load": lambda: load(False),
        "read, large pages": lambda: read_into_large_pages(files),
        "read and forget": lambda: read_and_forget(files),
        "safetensors": lambda: load_with_safetensors(folder, files, config),
        "load, hashed": lambda: load(True),
    }
    ways = {name: way for name, way in ways.items() if name in chosen}
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            if repeat == 0 and name == "load, hashed":
                continue
            if name == "load":
                # A folder from elsewhere has no manifest.
                manifest.rename(aside)
            timing = timed(way)
            if name == "load":
                aside.rename(manifest)
            if repeat:
                timings[name].append(timing)
                print(f"  {repeat}/{repeats} {name:18s} {timing[0]:6.2f} CPU s {timing[1]:6.2f} s", file=sys.stderr)
    return timings


def summarise(timings: dict[str, list[Timing]], num_bytes: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name, values in timings.items():
        cpu, wall = ([num_bytes / value[i] / 1e9 for value in values] for i in (0, 1))
        row = {
            "cpu_gb_s": statistics.median(cpu),
            "cpu_gb_s_min": min(cpu),
            "cpu_gb_s_max": max(cpu),
            "wall_gb_s": statistics.median(wall),
        }
        for other in (way for way in timings if not way.startswith("load")):
            pairs = [theirs[0] / ours[0] for ours, theirs in zip(values, timings[other], strict=True)]
            row[f"ratio_to_{other.replace(',', '').replace(' ', '_')}"] = statistics.median(pairs)
        rows[name] = {key: round(value, 3) for key, value in row.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where the temporary folder goes")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = model_config(args.gigabytes)
    with tempfile.TemporaryDirectory(prefix="tafkir-load-", dir=args.dir) as name:
        need, free = 1.1e9 * args.gigabytes, shutil.disk_usage(name).free
        if free < need:
            sys.exit(f"{name}: {free / 1e9:.1f} GB are free, {need / 1e9:.1f} GB are needed")
        folder = Path(name) / "model"
        write_checkpoint(folder, config, int(args.shard_gigabytes * 1e9))
        files = list(folder.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        rows = summarise(measure(folder, config, args.repeats, args.ways), num_bytes)
    result = {
        "question": "is a checkpoint loaded at 80 % or more of the rate at which its files are read?",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "torch": torch.__version__,
        "threads": args.threads,
        "repeats": args.repeats,
        "bytes": num_bytes,
        "files": len(files),
        "parameters": config.num_parameters(),
        "layers": config.num_hidden_layers,
        "rows": rows,
    }
    print(f"{num_bytes / 1e9:.2f} GB in {len(files)} files, {config.num_parameters() / 1e9:.2f}B parameters")
    others = " / ".join(
        key.removeprefix("ratio_to_").replace("_", " ") for key in next(iter(rows.values())) if key[:5] == "ratio"
    )
    print(f"{'':18s} {'GB/CPU s':>9s} {'spread':>13s} {'GB/s':>6s}  ratio to {others}")
    for name, row in rows.items():
        spread = f"{row['cpu_gb_s_min']:.2f}-{row['cpu_gb_s_max']:.2f}"
        ratios = " / ".join(f"{value:.0%}" for key, value in row.items() if key.startswith("ratio"))
        print(f"{name:18s} {row['cpu_gb_s']:9.2f} {spread:>13s} {row['wall_gb_s']:6.2f}  {ratios}")
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
