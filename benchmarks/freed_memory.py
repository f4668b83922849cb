"""What it does to training steps that a process keeps the memory it frees (`tafkir.native.memory`).

The same steps of a recipe's first training on text, from fresh weights, in processes that keep freed memory and in
processes that leave it to the C library, in turn: page faults and system seconds of a step (its median), CPU-seconds,
peak memory, and whether the weights end with the same bits.

    python benchmarks/freed_memory.py --out benchmarks/results/freed_memory.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

MODES = ("system", "keep")


def steps_of(recipe: str, mode: str, steps: int) -> dict[str, Any]:
    """Train, and say what it took."""
    import torch

    from tafkir.data.packing import Document
    from tafkir.models.build import build_decoder
    from tafkir.native.memory import keep_freed_memory
    from tafkir.ops.native import select_kernels
    from tafkir.recipe.load import load_recipe
    from tafkir.train.language import language_step
    from tafkir.train.loop import Trainer

    torch.set_num_threads(1)
    kept = mode == "keep" and keep_freed_memory()
    kernels, given = select_kernels("auto"), load_recipe([recipe]).recipe
    table = given.pretrain or given.sft
    assert table is not None, "a recipe that trains on text"
    batch, vocab = table.batch_problems, given.model.vocab_size

    def documents(step: int) -> list[Document]:
        draw = Random(step)
        return [([draw.randrange(vocab) for _ in range(draw.randrange(40, 140))], None) for _ in range(batch)]

    decoder = build_decoder(given.model, seed=0)
    trainer = Trainer(decoder, table)
    one_step = language_step(trainer, documents, label="pretrain")
    rows = []
    for step in range(steps):
        trainer.set_step(step)
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        one_step(step)
        after = resource.getrusage(resource.RUSAGE_SELF)
        rows.append((time.process_time() - began, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
    weights = b"".join(p.detach().numpy().tobytes() for p in decoder.parameters())
    cpu, system, faults = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return {
        "kept": kept,
        "kernels": kernels,
        "cpu_s": cpu,
        "system_s": system,
        "page_faults": faults,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": hashlib.sha256(weights).hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/wordmath-tiny.toml")
    parser.add_argument("--steps", type=int, default=6, help="of each process; the first one does not count")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind")
    parser.add_argument("--note", default="", help="goes into the result, such as how busy the machine was")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--as", dest="mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(steps_of(args.recipe, args.mode, args.steps)))
        return
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(args.repeats):
        for mode in MODES:
            command = [sys.executable, __file__, "--as", mode, "--recipe", args.recipe, "--steps", str(args.steps)]
            runs[mode].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    figures = ("cpu_s", "system_s", "page_faults", "peak_rss_bytes")
    result = {
        "benchmark": "freed_memory",
        "command": " ".join(["python", *sys.argv]),
        "note": args.note,
        "load_average": os.getloadavg(),
        "medians": {mode: {f: statistics.median(run[f] for run in runs[mode]) for f in figures} for mode in MODES},
        "cpu_ratios": [b["cpu_s"] / a["cpu_s"] for a, b in zip(runs["system"], runs["keep"], strict=True)],
        "same_bits": len({run["weights"] for mode in MODES for run in runs[mode]}) == 1,
        "kept": all(run["kept"] for run in runs["keep"]),
        "kernels": runs["keep"][0]["kernels"],
    }
    if not args.json:
        for mode, row in result["medians"].items():
            print(
                f"{mode:7} {row['page_faults']:8.0f} page faults and {1e3 * row['system_s']:.1f} of "
                f"{1e3 * row['cpu_s']:.0f} ms in the kernel a step, peak {row['peak_rss_bytes'] / 2**20:.0f} MiB"
            )
        print(f"CPU ratio {statistics.median(result['cpu_ratios']):.3f}, same bits: {result['same_bits']}")
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
