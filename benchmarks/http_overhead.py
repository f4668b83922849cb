"""What HTTP costs: streamed tokens a second through `tafkir serve` against the same requests in the bare engine.

    PYTHONPATH=src python benchmarks/http_overhead.py CHECKPOINT --out benchmarks/results/http_overhead.json

Two processes with the same weights take turns: a server, asked by 32 clients at once on connections of their own, and
an engine that is stepped until the same requests are done. Clients run on the same cores. Each pair has prompts of its
own, so that no cache helps. Beside the rates: CPU-seconds of the server's process over the engine's (which other work
on the machine changes less), the last first token over the median one, memory, idle CPU, and SIGTERM to exit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import signal
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.http_load import ServerProcess, post, serving

Prompts = list[list[int]]


def bare_engine(pipe: Connection, checkpoint: str, batch: int, threads: int | None) -> None:
    """Answers (prompts, tokens) with the seconds and CPU-seconds that an engine without a server takes."""
    from tafkir.data.published_tokenizer import load_tokenizer
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.records import Request, SamplingParams
    from tafkir.serve.loading import build_engine

    path = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(path)
    engine = build_engine(path, tokenizer, threads, max_batch=batch, weights="auto", paged=True)
    engine.eos_ids = ()
    pipe.send({"vocab": engine.decoder.config.vocab_size})
    while (order := pipe.recv()) is not None:
        prompts, tokens = order
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        began, cpu = time.perf_counter(), time.process_time()
        for i, ids in enumerate(prompts):
            engine.add_request(Request(str(i), tuple(ids), params))
        count = 0
        while engine.has_work:
            count += len(engine.step())
        assert count == tokens * len(prompts), (count, tokens)
        pipe.send({"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu})


def over_http(server: ServerProcess, prompts: Prompts, tokens: int) -> dict[str, float]:
    """The same through streamed completions, one connection each."""
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    async def everyone() -> list[Any]:
        bodies = [{"prompt": ids, **options} for ids in prompts]
        return await asyncio.gather(*(post(server.port, "/v1/completions", body) for body in bodies))

    cpu, began = server.cpu_s, time.perf_counter()
    answers = asyncio.run(everyone())
    seconds = time.perf_counter() - began
    assert all(answer.done for answer in answers), next(each.text for each in answers if not each.done)
    firsts = [answer.first_s for answer in answers]
    return {
        "seconds": seconds,
        "cpu_s": server.cpu_s - cpu,
        "ttft_median_s": statistics.median(firsts),
        "ttft_last_over_median": max(firsts) / statistics.median(firsts),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    work = (theirs, args.checkpoint, args.clients, args.threads)
    child = multiprocessing.get_context("spawn").Process(target=bare_engine, args=work)
    child.start()
    threads = ["--threads", str(args.threads)] if args.threads else []
    rows = []
    with serving(args.checkpoint, "--max-batch", str(args.clients), *threads, threads=args.threads) as server:
        vocab = ours.recv()["vocab"]
        rng, found = random.Random(0), {"ready_s": server.ready_s, "rss_ready_mib": server.rss_mib}
        for pair in range(args.pairs + 1):  # the first warms up
            prompts = [[rng.randrange(3, vocab) for _ in range(args.prompt)] for _ in range(args.clients)]
            sides = {}
            for side in ("http", "engine") if pair % 2 else ("engine", "http"):
                if side == "http":
                    sides[side] = over_http(server, prompts, args.tokens)
                else:
                    ours.send((prompts, args.tokens))
                    sides[side] = ours.recv()
            if pair:
                http, engine = sides["http"], sides["engine"]
                rows.append({
                    "http_tokens_s": args.clients * args.tokens / http["seconds"],
                    "engine_tokens_s": args.clients * args.tokens / engine["seconds"],
                    "overhead": 1 - engine["seconds"] / http["seconds"],
                    "cpu_overhead": http["cpu_s"] / engine["cpu_s"] - 1,
                    **{name: http[name] for name in ("ttft_median_s", "ttft_last_over_median")},
                })  # fmt: skip
                print(json.dumps({name: round(value, 4) for name, value in rows[-1].items()}), flush=True)
        ours.send(None)
        child.join()
        found |= {"rss_peak_mib": server.peak_mib, "rss_after_mib": server.rss_mib}
        cpu, began = server.cpu_s, time.perf_counter()
        time.sleep(args.idle)
        found["idle_cpu_share"] = (server.cpu_s - cpu) / (time.perf_counter() - began)
        began = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)
        found["sigterm_to_exit_s"] = time.perf_counter() - began
    medians = {f"median_{name}": statistics.median(row[name] for row in rows) for name in rows[0]}
    return {**found, **medians, "pairs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="base-tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--idle", type=float, default=10.0, help="Seconds over which idle CPU is taken.")
    parser.add_argument("--threads", type=int, help="Of the model; torch's choice if left out.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {name: value for name, value in vars(args).items() if name != "out"} | measure(args)
    print(json.dumps({name: value for name, value in found.items() if name != "pairs"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
