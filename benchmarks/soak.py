"""Many clients for many minutes, and ten times as many as there is room for: what leaks, what fails, who is refused.

    PYTHONPATH=src:. python benchmarks/soak.py CHECKPOINT --minutes 10 --out benchmarks/results/soak.json

Soak: 32 clients ask one after another for short and long answers, streamed and whole; a fifth of them leave in the
middle of an answer, a few send nonsense. Every valid request must come to its end, every other one get its 400. Memory
after warm-up (a fifth of the time) may not grow by more than 2 % until the end, with the queue empty at both ends, and
all blocks of the cache must have come back.

Overload: the server runs `--room` sequences and lets as many wait. First that many clients, then ten times as many,
each of which asks again at once, refused or not. Accepted requests must keep their time per token within 20 % of what
it was without the others; the rest must be told 503 with `Retry-After` in less than 50 ms. The clients share the
server's cores, so times mean something on a quiet machine alone. Exit code 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.http_load import Answer, ServerProcess, post, serving

WORDS = "river stone paper light garden window seven market train winter number music bread cloud table green".split()
NONSENSE: list[dict[str, Any]] = [
    {"prompt": "a", "max_tokens": -1},
    {"prompt": [10**9]},
    {"prompt": "a", "temperature": "hot"},
    {"nothing": 1},
]


def _request(rng: random.Random, context: int) -> tuple[dict[str, Any], float | None]:
    """A body, and after how many seconds the client leaves; None for one that stays."""
    long = rng.random() < 0.25
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, context // 8 if long else 20)))
    tokens = rng.randint(context // 8, context // 2) if long else rng.randint(1, 24)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "seed": rng.randrange(1 << 30), "ignore_eos": True}
    body |= {"stream": True} if rng.random() < 0.7 else {}
    body |= {"n": 3} if rng.random() < 0.05 else {}
    body |= {"logprobs": 2} if rng.random() < 0.1 else {}
    return body, rng.uniform(0.001, 0.5) if rng.random() < 0.2 else None


async def _client(server: ServerProcess, seed: int, until: float, context: int, seen: Counter[str]) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        if rng.random() < 0.03:
            answer = await post(server.port, "/v1/completions", rng.choice(NONSENSE))
            seen["nonsense refused" if answer.status == 400 else f"nonsense got {answer.status}: {answer.text}"] += 1
            continue
        body, leave = _request(rng, context)
        answer = await post(server.port, "/v1/completions", body, leave)
        if answer.done:
            seen["done"] += 1
        elif answer.left:
            seen["left"] += 1
        else:
            seen[f"failed: {answer.status} {answer.text[-300:]}"] += 1


async def _settle(server: ServerProcess) -> None:
    """Wait until nobody is being served any more."""
    deadline = time.monotonic() + 60
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any([await asyncio.to_thread(server.metric, name) for name in names]):
        if time.monotonic() > deadline:
            raise SystemExit("requests still run a minute after their clients left")
        await asyncio.sleep(0.1)


async def soak(server: ServerProcess, clients: int, seconds: float, context: int) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    rss = []
    # Equal parts with a pause between them, so that memory is always read with nothing on the way.
    parts = 10
    for part in range(parts):
        until = time.monotonic() + seconds / parts
        work = (_client(server, part * clients + i, until, context, seen) for i in range(clients))
        await asyncio.gather(*work)
        await _settle(server)
        rss.append(server.rss_mib)
        print(f"part {part + 1}/{parts}: {sum(seen.values())} requests, {rss[-1]:.1f} MiB", flush=True)
    warm, last = rss[1], rss[-1]
    used = await asyncio.to_thread(server.metric, "vllm:kv_cache_usage_perc")
    bad = {what: count for what, count in seen.items() if what not in ("done", "left", "nonsense refused")}
    return {
        "requests": dict(seen), "rss_mib": rss, "rss_growth": last / warm - 1, "cache_in_use": used,
        "held": not bad and last / warm - 1 <= 0.02 and used == 0 and server.process.poll() is None,
    }  # fmt: skip


async def overload(server: ServerProcess, room: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Time per token of accepted requests at the capacity and at ten times it, and how the rest are refused."""
    body = {"prompt": "seven market train", "max_tokens": tokens, "ignore_eos": True, "stream": True}

    async def client(until: float, answers: list[Answer]) -> None:
        while time.monotonic() < until:
            answers.append(await post(server.port, "/v1/completions", body))
            if answers[-1].status != 200:
                await asyncio.sleep(0.2)

    found: dict[str, Any] = {}
    for name, clients in (("at_capacity", room), ("at_10x", 10 * room)):
        answers: list[Answer] = []
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(until, answers) for _ in range(clients)))
        await _settle(server)
        accepted = [each for each in answers if each.status == 200]
        refused = [each for each in answers if each.status != 200]
        times = sorted(each.last_s for each in refused)
        per_token = [(each.last_s - each.first_s) / (tokens - 1) for each in accepted if each.done]
        found[name] = {
            "accepted": len(accepted),
            "complete": sum(each.done for each in accepted),
            "tpot_ms": 1000 * statistics.median(per_token or [float("nan")]),
            "refused": dict(Counter(str(each.status) for each in refused)),
            "with_retry_after": sum(each.retry_after is not None for each in refused),
            "refusal_ms_p50_p99_max": [1000 * times[int(q * (len(times) - 1))] for q in (0.5, 0.99, 1)]
            if times
            else [],
        }
        print(json.dumps({name: found[name]}), flush=True)
    before, after = found["at_capacity"], found["at_10x"]
    found["tpot_ratio"] = after["tpot_ms"] / before["tpot_ms"]
    refusals = sum(after["refused"].values())
    found["held"] = (
        found["tpot_ratio"] <= 1.2
        and after["complete"] == after["accepted"]
        and after["with_retry_after"] == refusals > 0
        and set(after["refused"]) <= {"503", "429"}
        and after["refusal_ms_p50_p99_max"][1] < 50
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="base-tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--context", type=int, default=512, help="Longest prompt and answer together, in tokens.")
    parser.add_argument("--room", type=int, default=8, help="Sequences that run under overload; as many may wait.")
    parser.add_argument("--overload-seconds", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=64, help="Of an answer under overload.")
    parser.add_argument("--threads", type=int, help="Of the model; torch's choice if left out.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = ["--threads", str(args.threads)] if args.threads else []
    found: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "out"}
    with serving(args.checkpoint, "--max-context", str(args.context), *threads, threads=args.threads) as server:
        found["soak"] = asyncio.run(soak(server, args.clients, 60 * args.minutes, args.context))
    limits = ["--max-batch", str(args.room), "--max-queue", str(args.room)]
    with serving(args.checkpoint, *limits, *threads, threads=args.threads) as server:
        found["overload"] = asyncio.run(overload(server, args.room, args.overload_seconds, args.tokens))
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if found["soak"]["held"] and found["overload"]["held"] else 1)


if __name__ == "__main__":
    main()
