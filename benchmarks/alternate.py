"""Two sides in turn, every run in a process of its own: what the comparisons with TRL have in common.

Imports no torch: a child's peak memory would start from its parent's.
"""

from __future__ import annotations

import argparse
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

__all__ = [
    "ChildFailed",
    "Spread",
    "add_common_arguments",
    "deliver",
    "describe",
    "in_child",
    "is_child",
    "pair_ratios",
    "save_tokenizer",
    "say",
    "serve_child",
    "trl_grpo_keys",
    "trl_keys",
]

Spread = dict[str, Any]
"""The median of paired values, their range, and the values."""


class ChildFailed(SystemExit):
    """A child process ended with an error; the message is the end of what it wrote."""


def in_child(script: str, spec: dict[str, Any], *, threads: int = 1) -> dict[str, Any]:
    """What `serve_child` of the script makes of `spec`, JSON both ways; TRL stays off line.

    Raises:
        ChildFailed: it ended with an error.
    """
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
            raise ChildFailed(f"{spec} failed:\n{done.stderr[-3000:]}")
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


def trl_keys(output: Path, *, learning_rate: float, seed: int) -> dict[str, Any]:
    """What every trainer of TRL is told here; comments give defaults that would slow it down or change the loss."""
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,  # True
        "gradient_checkpointing": False,  # True
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",  # linear
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def trl_grpo_keys(output: Path, *, prompts: int, group: int, max_new: int, steps: int, **shared: Any) -> dict[str, Any]:
    """`trl_keys` and those of a GRPO step as ours computes it: every sample in one batch, one update, DAPO's loss."""
    return {
        **trl_keys(output, **shared),
        "use_vllm": False,
        "per_device_train_batch_size": prompts * group,
        "gradient_accumulation_steps": 1,
        "num_generations": group,
        "max_completion_length": max_new,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "max_steps": steps,
        "shuffle_dataset": False,
    }


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


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--threads`, `--json` and `--out`."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def deliver(found: dict[str, Any], table: str, args: argparse.Namespace) -> None:
    """Print table and JSON line, and write the file, as `add_common_arguments` says."""
    if not args.json:
        print(table)
    print(json.dumps(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
