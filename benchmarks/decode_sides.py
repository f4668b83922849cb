"""One engine in a process of its own, for `benchmarks/decode.py`: asked for batches in JSON, it says what they took.

Run by the interpreter of the engine's own environment, so that it imports nothing of this project but for its own side.
A side is a function from its settings to another one, from prompts and a number of tokens to the tokens that came:
greedy, nothing ends early, no prefix cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Batch = Callable[[list[list[int]], int], list[list[int]]]


def tafkir(spec: dict[str, Any]) -> Batch:
    """The server's engine, weights as they are stored (`--weights auto`)."""
    import torch

    from tafkir.checkpoint.packed import load_packed
    from tafkir.engine.paged_engine import PagedEngine
    from tafkir.ops.native import select_kernels, set_matmul_precision
    from tafkir.records import Request, SamplingParams

    torch.set_num_threads(spec["threads"])
    select_kernels("native")
    set_matmul_precision(spec.get("precision", "highest"))
    decoder = load_packed(spec["model"], **spec.get("options", {})).decoder
    cache = 1 << 30

    def batch(prompts: list[list[int]], count: int) -> list[list[int]]:
        engine = PagedEngine(decoder, eos_ids=(), max_batch=len(prompts), max_cache_bytes=cache, prefix_caching=False)
        params = SamplingParams(temperature=0.0, max_tokens=count)
        asked = [Request(id=str(i), prompt_ids=tuple(ids), params=params) for i, ids in enumerate(prompts)]
        done = {answer.request_id: list(answer.token_ids) for answer in engine.complete(asked)}
        return [done[request.id] for request in asked]

    return batch


def transformers(spec: dict[str, Any]) -> Batch:
    """`generate` on one padded batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()

    @torch.inference_mode()
    def batch(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0, **lengths)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    return batch


def vllm(spec: dict[str, Any]) -> Batch:
    """vLLM's CPU build in this process, compiled unless `eager`."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        spec["model"], dtype=spec["dtype"], enforce_eager=spec["eager"], max_model_len=2048, max_num_seqs=32,
        max_num_batched_tokens=4096, enable_prefix_caching=False, seed=0, disable_log_stats=True,
    )  # fmt: skip

    def batch(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        out = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in out]

    return batch


def llama_cpp(spec: dict[str, Any]) -> Batch:
    """llama.cpp's server in this process (xllamacpp), one slot a sequence, the cache in the weights' dtype."""
    import urllib.request

    import xllamacpp

    types = xllamacpp.ggml_type
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup = spec["gguf"], False
    params.n_parallel, params.n_ctx, params.n_batch = 32, 32 * 1100, 4096  # a slot has its share
    params.kv_unified = spec["unified"]
    kind = types.GGML_TYPE_F32 if spec["dtype"] == "float32" else types.GGML_TYPE_BF16
    params.cache_type_k = params.cache_type_v = kind
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["threads"]
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(32)

    def ask(ids: list[int], count: int) -> list[int]:
        body = {
            "prompt": ids, "n_predict": count, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"],
            "cache_prompt": False, "ignore_eos": True, "return_tokens": True,
        }  # fmt: skip
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
            return tokens

    return lambda prompts, count: list(pool.map(lambda ids: ask(ids, count), prompts))


SIDES: dict[str, Callable[[dict[str, Any]], Batch]] = {
    "tafkir": tafkir, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp,
}  # fmt: skip


def timed(batch: Batch, prompts: list[list[int]], count: int) -> tuple[float, float]:
    """Seconds by the clock, and of all this process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = batch(prompts, count)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    assert [len(ids) for ids in out] == [count] * len(prompts), f"{[len(ids) for ids in out]} tokens, not {count}"
    return spent


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    # Engines print; what they print goes the way of errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    batch = SIDES[spec["side"]](spec)
    numbers = random.Random(0)

    def prompts(sequences: int, length: int) -> list[list[int]]:
        return [[numbers.randrange(16, spec["vocab"]) for _ in range(length)] for _ in range(sequences)]

    batch(prompts(2, 32), 4)
    print(json.dumps({"ready_s": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        sequences, length, count = job["sequences"], job["prompt"], job["output"]
        first_s, first_cpu_s = timed(batch, prompts(sequences, length), 1)
        found = {"first_s": first_s, "first_cpu_s": first_cpu_s}
        if count > 1:
            found["wall_s"], found["cpu_s"] = timed(batch, prompts(sequences, length), count)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
    # Some engines' threads outlive their owners.
    os._exit(0)
