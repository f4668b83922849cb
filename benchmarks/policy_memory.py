"""Peak memory of a GRPO step at a vocabulary of 151,936, ours against TRL's GRPOTrainer.

A batch of eight completions of one prompt with 256 tokens each (the model is untrained and hardly ever ends one),
Qwen's vocabulary, and a small Qwen3 around it, whose weights both sides read from one folder: what a step takes beyond
weights is then logits and what is made of them. A step is whole: sampling, log-probabilities, loss, backward, AdamW.
Each run is a process of its own. The kernel's high-water mark of resident memory is set back when the model is loaded;
what counts is the mark at the end of a step less what was resident then: our engine's copy of the weights, gradients,
moments, caches and logits are all in it. TRL computes log-probabilities in chunks of its own.

    python benchmarks/policy_memory.py --out benchmarks/results/policy_memory.json

About four minutes and 4 GB. TRL needs `pip install -e '.[dev]'`. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from alternate import (
    add_common_arguments,
    deliver,
    describe,
    in_child,
    is_child,
    pair_ratios,
    save_tokenizer,
    say,
    serve_child,
    trl_grpo_keys,
)

from tafkir.recipe.model import ModelConfig
from tafkir.records import Example, Message, Verdict

GROUP, TOKENS, SIDES = 8, 256, ("ours", "trl")
QUESTION = "Write a long story."
MODEL = ModelConfig(
    model_type="qwen3",
    vocab_size=151_936,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=384,
    num_experts=0,
    num_shared_experts=0,
    partial_rotary_factor=1.0,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)


class Lengths:
    """Rewards that differ within a group, whatever was sampled."""

    name = "lengths"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        return Verdict("graded", float(len(text) % 7), text, "")


class Memory:
    """Resident memory of this process beyond what it was when the model was loaded."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        self.before = self._read("VmRSS")
        self.began = time.process_time()
        self.steps: list[float] = []

    def step_ended(self) -> None:
        self.steps.append((self._read("VmHWM") - self.before) / 2**20)

    def result(self, lengths: list[int]) -> dict[str, Any]:
        return {
            "peak_above_model_mib": self.steps[-1],
            "after_first_step_mib": self.steps[0],
            "resident_before_mib": self.before / 2**20,
            "cpu_s": time.process_time() - self.began,
            "tokens": statistics.mean(lengths),
        }

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


def prepare(folder: str) -> dict[str, Any]:
    """Fresh weights in one folder, with a tokenizer that knows some of the vocabulary."""
    from tafkir.checkpoint.save import save_checkpoint
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.models.build import build_decoder

    tokenizer = Tokenizer.train([QUESTION], 280)
    save_checkpoint(Path(folder) / "model", build_decoder(MODEL, 0), tokenizer=tokenizer)
    save_tokenizer(tokenizer, Path(folder) / "model")
    counts = MODEL.parameter_counts()
    return {"parameters": counts.total, "model_mib": 4 * counts.total / 2**20}


def run_ours(folder: str, steps: int) -> dict[str, Any]:
    """The step of `[rlvr]` with its monitor."""
    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.data.chat import encode_prompt
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.recipe.rl import RlvrConfig
    from tafkir.train.loop import Trainer
    from tafkir.train.rlvr import RlvrStep
    from tafkir.train.rollout import SynchronousRollouts

    place = Path(folder) / "model"
    tokenizer = Tokenizer.load(place)
    config = RlvrConfig(
        steps=steps,
        warmup_steps=0,
        learning_rate=1e-6,
        weight_decay=0.0,
        prompts_per_step=1,
        group_size=GROUP,
        max_completion_tokens=TOKENS,
        reduction="token_mean",
        drop_zero_variance=False,
    )
    decoder = load_checkpoint(place).decoder
    memory = Memory()
    trainer = Trainer(decoder, config)
    engine = Engine(load_checkpoint(place).decoder, eos_ids=(tokenizer.turn_end_id,), tokenizer=tokenizer)
    prompt = (Example("story", "made", "train", QUESTION, ""), encode_prompt(tokenizer, QUESTION))
    rollouts = SynchronousRollouts(
        engine,
        tokenizer,
        Lengths(),  # type: ignore[arg-type]  # grades
        lambda _: [prompt],
        config,
        weights=lambda: trainer.decoder.state_dict().items(),
        seed=0,
    )
    step_function = RlvrStep(trainer, rollouts, config, reference=None)
    lengths = []
    for step in range(steps):
        trainer.set_step(step)
        lengths.append(step_function(step).tokens // GROUP)
        memory.step_ended()
    return memory.result(lengths)


def run_trl(folder: str, steps: int) -> dict[str, Any]:
    """TRL's step with the same shapes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tafkir.data.chat import render_chat

    place = Path(folder) / "model"
    keys = trl_grpo_keys(
        Path(folder) / "trl-output", prompts=1, group=GROUP, max_new=TOKENS, steps=steps, learning_rate=1e-6, seed=0
    )
    config = GRPOConfig(**keys)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = [{"prompt": render_chat([Message("user", QUESTION)], True)}] * steps
    memory = Memory()
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(i % 7) for i, _ in enumerate(completions)]

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_step_end(self, *_: Any, **__: Any) -> None:
            memory.step_ended()

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()
    return memory.result(lengths)


def work(side: str, **spec: Any) -> dict[str, Any]:
    """The child process."""
    return {"prepare": prepare, "ours": run_ours, "trl": run_trl}[side](**spec)


def compare(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
            say(f"repeat {repeat + 1} of {args.repeats}: {side}")
            spec = {"side": side, "folder": folder, "steps": args.steps}
            runs[side].append(in_child(__file__, spec, threads=args.threads))
    peaks = {side: [run["peak_above_model_mib"] for run in own] for side, own in runs.items()}
    return {"runs": runs, "ratio": pair_ratios(peaks["ours"], peaks["trl"])}


def render(found: dict[str, Any]) -> str:
    lines = [f"{'side':6}{'above the model, MiB':>22}{'CPU-s':>9}{'tokens':>8}"]
    for side, runs in found["runs"].items():
        cells = [statistics.median(run[key] for run in runs) for key in ("peak_above_model_mib", "cpu_s", "tokens")]
        lines.append(f"{side:6}{cells[0]:22.0f}{cells[1]:9.1f}{cells[2]:8.0f}")
    ratio = found["ratio"]
    lines.append(f"ours / TRL: {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run: the second has moments from the start")
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = in_child(__file__, {"side": "prepare", "folder": folder}, threads=args.threads)
        measured = compare(folder, args)
    shape = {"batch": GROUP, "tokens": TOKENS, "vocabulary": MODEL.vocab_size}
    found = describe("policy_memory", threads=args.threads, **shape, **prepared, **measured)
    deliver(found, render(found), args)


if __name__ == "__main__":
    if is_child():
        serve_child(work)
    else:
        main()
