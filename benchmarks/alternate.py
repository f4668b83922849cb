"""Two sides in turn, every run in a process of its own: what the comparisons with TRL have in common.

Imports no torch: a child's peak memory would start from its parent's.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Spread", "describe", "in_child", "is_child", "pair_ratios", "save_tokenizer", "say", "serve_child"]

Spread = dict[str, Any]
"""The median of paired values, their range, and the values."""


def in_child(script: str, spec: dict[str, Any], *, threads: int = 1) -> dict[str, Any]:
    """What `serve_child` of the script makes of `spec`, JSON both ways; TRL stays off line."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, script, "--child", json.dumps({**spec, "threads": threads}), str(result)]
        done = subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{spec} failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(result.read_text()))


def is_child() -> bool:
    """Whether this process was started by `in_child`."""
    return sys.argv[1:2] == ["--child"]


def serve_child(work: Callable[..., dict[str, Any]]) -> None:
    """The child's side of `in_child`: `work(**spec)` with that many threads."""
    import torch

    spec = json.loads(sys.argv[2])
    torch.set_num_threads(spec.pop("threads"))
    Path(sys.argv[3]).write_text(json.dumps(work(**spec)))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer of ours into a checkpoint folder, as transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    ).save_pretrained(folder)


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, run by run."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def describe(name: str, **result: Any) -> dict[str, Any]:
    """A result with what it was made by and on."""
    return {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        **result,
    }


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
