"""What `tafkir eval --tasks` costs beside the engine itself, how soon it starts, and what ten kills do to it.

- overhead: CPU-seconds of `evaluate_models` on a checkpoint against the engine alone on the same requests, in turn.
- client: CPU-seconds of the command for an answer of an endpoint that answers at once.
- start: CPU-seconds and wall time from the command to its first request at an endpoint.
- offline: whether the command runs on a checkpoint with networking cut off (`unshare -rn`).
- kills: ten `kill -9` at random moments, then a run to the end, against an unbroken run: equal files, but for
  latencies, and no request sent again whose answer had come.

    OMP_NUM_THREADS=1 python benchmarks/eval_overhead.py base-tiny --out benchmarks/results/eval_overhead.json
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tafkir.checkpoint.load import load_config
from tafkir.cli.completer import build_completer
from tafkir.engine.engine import Engine
from tafkir.eval.checkpoint_answers import CheckpointAnswers
from tafkir.eval.harness import EvalSettings, evaluate_models
from tafkir.eval.samples import load_samples
from tafkir.recipe.bundled import find_checkpoint
from tafkir.records import Request, SamplingParams
from tafkir.runlog.atomic import read_json, write_json
from tafkir.runlog.rundir import describe_environment
from tafkir.tasks.catalog import load_task
from tests.eval.chat_server import ChatServer

COMMAND = [sys.executable, "-m", "tafkir.cli.main", "eval"]
SAMPLING = ["--tasks", "gsm8k", "--samples", "4", "--temperature", "0.7", "--max-tokens", "96"]


def _overhead(checkpoint: Path, repeats: int, limit: int) -> dict[str, Any]:
    """The engine alone, and the harness around it, on the same requests."""
    torch.set_num_threads(1)
    engine, context = build_completer(checkpoint), load_config(checkpoint).max_position_embeddings
    task = load_task("gsm8k")
    settings = EvalSettings(samples=4, limit=limit, temperature=0.7, max_tokens=96)
    alone, harnessed, tokens = [], [], 0
    for number in range(repeats + 1):  # the first one warms up
        with tempfile.TemporaryDirectory() as folder:
            model = CheckpointAnswers("m", checkpoint, context=context, build_completer=lambda: engine)
            began = time.process_time()
            done = evaluate_models([model], [task], settings, Path(folder) / "samples.jsonl")
            harnessed.append(time.process_time() - began)
        began = time.process_time()
        count = _raw(engine, model, task, [(sample.item, sample.seed) for sample in done.samples])
        alone.append(time.process_time() - began)
        tokens = sum(sample.tokens for sample in done.samples)
        assert count == tokens, "both sides sample the same tokens"
        print(f"{number}: engine {alone[-1]:.2f} s, evaluation {harnessed[-1]:.2f} s, {tokens:,} tokens", flush=True)
    ratios = [b / a for a, b in zip(alone[1:], harnessed[1:], strict=True)]
    return {
        "samples": 4 * limit,
        "tokens": tokens,
        "engine_cpu_s": statistics.median(alone[1:]),
        "evaluation_cpu_s": statistics.median(harnessed[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _raw(engine: Engine, model: CheckpointAnswers, task: Any, wanted: Sequence[tuple[str, int]]) -> int:
    """The requests of the evaluation through the engine alone, prompts encoded once an item."""
    end = model._tokenizer.turn_end_id
    prompts = {example.id: tuple(model.read(task.prompt(example))) for example in task.examples("test")}
    params = SamplingParams(temperature=0.7, top_p=task.card.sampling.top_p, max_tokens=96, stop_token_ids=(end,))
    requests = [
        Request(str(number), prompts[item], replace(params, seed=seed)) for number, (item, seed) in enumerate(wanted)
    ]
    return sum(len(completion.token_ids) for completion in engine.complete(requests))


def _client(repeats: int) -> dict[str, Any]:
    """CPU of the command alone: with 600 answers, less that with 20, for each answer between."""
    costs: dict[int, list[float]] = {20: [], 600: []}
    starts: list[tuple[float, float]] = []
    with ChatServer() as server:
        for _ in range(repeats):
            for limit, found in costs.items():
                with tempfile.TemporaryDirectory() as folder:
                    before, began, seen = _children(), time.monotonic(), len(server.bodies)
                    process = subprocess.Popen(
                        [*COMMAND, server.url, *SAMPLING[:2], "--limit", str(limit), "--out", folder + "/out"],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                    while len(server.bodies) == seen and process.poll() is None:
                        time.sleep(0.005)
                    first = time.monotonic() - began
                    cpu = _cpu_of(process.pid)
                    process.wait()
                    found.append(_children() - before)
                    starts.append((first, cpu))
            print(f"client: {costs}", flush=True)
    medians = {limit: statistics.median(found) for limit, found in costs.items()}
    return {
        "cpu_ms_per_answer": 1000 * (medians[600] - medians[20]) / 580,
        "start_wall_s": statistics.median(wall for wall, _ in starts),
        "start_cpu_s": statistics.median(cpu for _, cpu in starts),
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _offline(checkpoint: str) -> bool | None:
    """Whether an evaluation runs without a network; None where the system does not let us cut it off."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rn", *COMMAND, checkpoint, *SAMPLING, "--limit", "2", "--out", folder + "/out"]
        return subprocess.run(command, capture_output=True).returncode == 0


def _kills(kills: int, seed: int) -> dict[str, Any]:
    generator, concurrency = random.Random(seed), 8
    again_after_recorded = 0
    with tempfile.TemporaryDirectory() as folder, ChatServer(delay_s=0.1) as server:
        command = [*COMMAND, server.url, *SAMPLING, "--limit", "100", "--concurrency", str(concurrency), "--out"]
        place = Path(folder) / "killed"
        for number in range(kills):
            wanted = len(server.bodies) + generator.randint(1, 35)
            process = subprocess.Popen([*command, str(place)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.bodies) < wanted and process.poll() is None:
                time.sleep(generator.uniform(0.001, 0.02))
            process.kill()
            process.wait()
            samples = place / "samples.jsonl"
            recorded = {sample.seed for sample in load_samples(samples)} if samples.exists() else set()
            before = len(server.bodies)
            print(f"kill {number + 1}: {len(recorded)} of 400 answers in the file", flush=True)
            if number == kills - 1:
                subprocess.run([*command, str(place)], check=True, capture_output=True)
                again_after_recorded = len(recorded & {body["seed"] for body in server.bodies[before:]})
        asked = Counter(body["seed"] for body in server.bodies)
        whole = Path(folder) / "whole"
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        equal = _content(place) == _content(whole)
    return {
        "kills": kills,
        "answers": len(asked),
        "same_file": equal,
        "recorded_answers_asked_again": again_after_recorded,
        "asked_again_in_flight": sum(asked.values()) - len(asked),
        "most_in_flight": kills * concurrency,
    }


def _content(folder: Path) -> list[str]:
    """The lines of a results file by key, without latencies."""
    rows = [{name: v for name, v in asdict(sample).items() if name != "latency_s"} for sample in load_samples(folder)]
    return sorted(json.dumps(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=64, help="items of the overhead part, four samples each")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--parts", default="kills,client,offline,overhead", help="of --out, the others stay")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "kills": lambda: _kills(options.kills, 0),
        "client": lambda: _client(options.repeats),
        "offline": lambda: _offline(options.checkpoint),
        "overhead": lambda: _overhead(find_checkpoint(options.checkpoint), options.repeats, options.limit),
    }
    result: dict[str, Any] = read_json(options.out) if options.out and options.out.exists() else {}
    result |= {name: parts[name]() for name in options.parts.split(",")}
    result["environment"] = describe_environment()
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
