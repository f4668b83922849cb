"""A million simulated requests: one replica at 80 % load, and eight behind each router with 200 prefixes to find.

Writes benchmarks/results/plan_simulate.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tafkir.plan.advise import advise
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment
from tafkir.plan.simulate import simulate_fleet
from tafkir.plan.workload import WORKLOADS

RESULT = Path(__file__).resolve().parent / "results" / "plan_simulate.json"


def main() -> None:
    """Simulate, print a table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the single replica")
    parser.add_argument("--routed", type=int, default=40_000, help="of each router")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    chat = WORKLOADS["chat"]
    chip = load_chips(own_only=True)["h100"]
    d = Deployment(find_shape("qwen3-32b"), chip, PRECISIONS["bf16"], Layout(tp=2), fitted_coefficients(), "vllm")
    option = advise(d, chat, 2, only=Layout(tp=2))[0][0]
    rate = 0.8 * option.point.tokens_per_s / chat.output_tokens
    room = option.memory.free / option.memory.sequence * (chat.prompt_tokens + chat.output_tokens)
    held: dict[str, Any] = {"max_sequences": option.batch, "cache_tokens": room}
    runs = {"one replica": dict(rate=rate, replicas=1, requests=args.requests, router="random")}
    for router in ("random", "round_robin", "least_loaded", "prefix_aware"):
        runs[router] = dict(rate=8 * 0.6 * rate, replicas=8, requests=args.routed, router=router, prefixes=200)
    found = {}
    for name, run in runs.items():
        start = time.process_time()
        load = simulate_fleet(d, chat, **run, **held)  # type: ignore[arg-type]
        seconds = time.process_time() - start
        found[name] = {"cpu_s": round(seconds, 2), **run, **asdict(load)}
        print(
            f"{name:<14} {run['requests']:>9,} requests {seconds:7.1f} CPU-s  hits {load.hits:4.0%}  "
            f"TTFT {load.ttft.p50:.2f} / {load.ttft.p90:.2f} / {load.ttft.p99:.2f} s",
            flush=True,
        )
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
