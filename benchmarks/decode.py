"""Decode tokens/s of the engine at several numbers of sequences, with weights in memory as they are stored or in
float32, beside transformers' `generate`, on one thread.

Every run is a process of its own, the ways in turn; a way that is compared with the first one gives the median of the
ratios of neighbours. Prompts are random ids, greedy, nothing ends early; rates are tokens after the first over CPU
seconds (wall in the file beside). Models: `make_models.py` of the serving issue, or any folders.

    python benchmarks/decode.py bf16=MODEL16 nvfp4=MODEL-NVFP4 --out benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from alternate import in_child, is_child, serve_child


def decode_ours(folder: str, weights: str, sequences: int, prompt: int, output: int) -> dict[str, Any]:
    """One batch through the engine; `weights` as `serve.loading.build_engine` has it."""
    import torch

    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.checkpoint.packed import load_packed
    from tafkir.engine.paged_engine import PagedEngine
    from tafkir.ops.native import select_kernels
    from tafkir.records import Request, SamplingParams

    select_kernels("native")
    decoder = (load_packed if weights == "stored" else load_checkpoint)(Path(folder)).decoder
    engine = PagedEngine(decoder, eos_ids=(), max_batch=sequences, prefix_caching=False)
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {}
    for length in (2, output):  # the first one warms up
        for i in range(sequences):
            ids = torch.randint(16, decoder.config.vocab_size, (prompt,), generator=generator)
            params = SamplingParams(temperature=0.0, max_tokens=length)
            engine.add_request(Request(id=str(i), prompt_ids=tuple(ids.tolist()), params=params))
        begun: set[str] = set()
        while len(begun) < sequences:
            begun |= {event.request_id for event in engine.step()}
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while engine.has_work:
            tokens += len(engine.step())
        result = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "tokens": tokens}
    return result


def decode_transformers(folder: str, dtype: str, sequences: int, prompt: int, output: int) -> dict[str, Any]:
    """The same by `generate`: its time for all tokens less its time for one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    generator, taken = torch.Generator().manual_seed(0), {}
    for length in (1, output):
        ids = torch.randint(16, model.config.vocab_size, (sequences, prompt), generator=generator)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        taken[length] = (time.process_time() - cpu, time.perf_counter() - wall)
    (cpu_1, wall_1), (cpu_all, wall_all) = taken[1], taken[output]
    return {"cpu_s": cpu_all - cpu_1, "wall_s": wall_all - wall_1, "tokens": sequences * (output - 1)}


def work(way: str, **spec: Any) -> dict[str, Any]:
    """One run; `way` is transformers:DTYPE, or what the engine's weights are."""
    kind, _, dtype = way.partition(":")
    if kind == "transformers":
        return decode_transformers(dtype=dtype, **spec)
    return decode_ours(weights=way, **spec)


def compare(ways: list[tuple[str, str, str]], sizes: dict[str, int], repeats: int) -> dict[str, Any]:
    """Rates by the name of the way, and each one's ratio to the first.

    Args:
        ways: name, way (`work`), folder.
        sizes: sequences, prompt, output.
    """
    rates: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    walls: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(repeats):
        for name, way, folder in ways:
            run = in_child(__file__, {"way": way, "folder": folder, **sizes})
            rates[name].append(run["tokens"] / run["cpu_s"])
            walls[name].append(run["tokens"] / run["wall_s"])
    first = rates[ways[0][0]]
    return {
        name: {
            "tokens_per_cpu_s": round(statistics.median(found), 1),
            "tokens_per_wall_s": round(statistics.median(walls[name]), 1),
            "ratio_to_first": round(statistics.median(a / b for a, b in zip(found, first, strict=True)), 2),
        }
        for name, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="NAME=FOLDER", help="served as stored; the first one also others' way"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of transformers")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    named = [model.partition("=")[::2] for model in args.models]
    ways = [(f"{name}, stored", "stored", folder) for name, folder in named]
    ways += [
        (f"{named[0][0]}, in float32", "float32", named[0][1]),
        (f"transformers {args.dtype}", f"transformers:{args.dtype}", named[0][1]),
    ]
    results = []
    for sequences in args.sequences:
        sizes = {"sequences": sequences, "prompt": args.prompt, "output": args.output}
        found = compare(ways, sizes, args.repeats)
        results.append({**sizes, "ways": found})
        for name, row in found.items():
            sys.stdout.write(f"{sequences:3} {name:28} {row['tokens_per_cpu_s']:8} tok/s  {row['ratio_to_first']}x\n")
        sys.stdout.flush()
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "models": {name: Path(folder).name for name, folder in named},
                    "repeats": args.repeats,
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    if is_child():
        serve_child(work)
    else:
        main()
