"""Runs a function in several real processes that are joined by gloo, as `torchrun` would."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

_TIMEOUT_S = 300
_IMPORTED = [
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel"),
    *(f"tafkir.train.{name}" for name in ("parallel.many_ranks", "stages", "preference_stages", "trm_stage")),
    *(f"tests.parallel.{name}jobs" for name in ("", "chain_", "rlvr_", "trm_")),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(function: Callable[[], Any], rank: int, world: int, port: int, out: Queue) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        result = function()
    except BaseException:
        out.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None
    from tafkir.train.parallel.world import leave_world

    leave_world()
    # Pickled here: what torch would do with tensors in a queue needs this process to stay.
    out.put((rank, pickle.dumps(result), None))


def run_ranks(world: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """What `function(*args, **options)` returns on each rank, which imports it. Fails with the first traceback."""
    context = multiprocessing.get_context("forkserver")
    # The imports are paid once: every process is a fork of one that has them.
    context.set_forkserver_preload(_IMPORTED)
    out = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(partial(function, *args, **options), rank, world, port, out))
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        for _ in processes:
            rank, value, failure = out.get(timeout=_TIMEOUT_S)
            assert failure is None, f"rank {rank}:\n{failure}"
            results[rank] = pickle.loads(value)
        for process in processes:
            process.join(_TIMEOUT_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
