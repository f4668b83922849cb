"""Learning from preference pairs, ours against TRL's: pairs per CPU-second of DPO and of a reward model.

Both sides start from the same weights (one Hugging Face folder of a small Qwen3), see the same pairs as the same
tokens (which is checked), a whole epoch of them, and take AdamW steps on the same loss; half precision, gradient
checkpointing and evaluation are off. DPO is measured twice: with the reference policy's pass over the pairs counted
(TRL: in every step; ours: once before the first one), and with reference log-probabilities that are there already
(TRL: `precompute_ref_log_probs`). Made-up pairs share long prompts and are short; the others are of the bundled
`dpo_en_demo`, cut to a length. The sides run in turn, each in a process of its own, one thread.

    python benchmarks/preference_vs_trl.py --out benchmarks/results/preference_vs_trl.json

About six minutes. TRL needs `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alternate import (
    Spread,
    add_common_arguments,
    deliver,
    describe,
    in_child,
    is_child,
    pair_ratios,
    save_tokenizer,
    say,
    serve_child,
    trl_keys,
)

from tafkir.recipe.model import ModelConfig

if TYPE_CHECKING:
    from tafkir.data.preference import EncodedPair
    from tafkir.data.tokenizer import Tokenizer

BATCH, SEED, LEARNING_RATE = 16, 0, 1e-4
MODEL = ModelConfig(
    model_type="qwen3",
    vocab_size=2048,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=384,
    num_experts=0,
    num_shared_experts=0,
    partial_rotary_factor=1.0,
    max_position_embeddings=1024,
)
DATA = {"made_up": {"sources": (), "made_up": 320}, "dpo_en_demo": {"max_length": 320}}
"""Keys of `[preferences]`."""
METHODS = ("dpo", "dpo_precomputed", "reward")


# --- what both sides read ---------------------------------------------------------------------------------------------


def prepare(folder: str) -> dict[str, Any]:
    """Weights under one name for both, and a tokenizer trained on the pairs."""
    from tafkir.checkpoint.save import save_checkpoint
    from tafkir.data.preference import read_preferences
    from tafkir.data.stories import make_story
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.models.build import build_decoder
    from tafkir.models.reward import reward_model_from

    pairs, _ = read_preferences("dpo_en_demo")
    texts = [text for pair in pairs for text in (pair.prompt[-1].content, pair.chosen)]
    texts += [make_story(seed).question for seed in range(500)]
    tokenizer = Tokenizer.train(texts, MODEL.vocab_size)
    decoder = build_decoder(MODEL, SEED)
    for name, model in (("policy", decoder), ("reward", reward_model_from(decoder, SEED))):
        save_checkpoint(Path(folder) / name, model, tokenizer=tokenizer)
        save_tokenizer(tokenizer, Path(folder) / name)
    return {"parameters": MODEL.num_parameters()}


def load_pairs(tokenizer: Tokenizer, data: str, limit: int) -> Sequence[EncodedPair]:
    """Whole batches of the data's training pairs."""
    from tafkir.data.preference import load_preferences
    from tafkir.recipe.rlhf import PreferencesConfig

    pairs = load_preferences(PreferencesConfig.model_validate(DATA[data]), tokenizer, SEED).train
    return pairs[: min(limit, len(pairs)) // BATCH * BATCH]


# --- one measured run -------------------------------------------------------------------------------------------------


def result(pairs: Sequence[EncodedPair], cpu_s: float, rows: list[list[list[int]]], losses: list[float]) -> dict:
    from hashlib import sha256

    return {
        "pairs_per_cpu_s": len(pairs) / cpu_s,
        "pairs": len(pairs),
        "prompt_tokens": statistics.mean(len(pair.prompt_ids) for pair in pairs),
        "answer_tokens": statistics.mean(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)),
        "tokens_hash": sha256(json.dumps(sorted(rows)).encode()).hexdigest(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def run_ours(folder: str, method: str, data: str, limit: int) -> dict[str, Any]:
    """An epoch of our steps."""
    from tafkir.checkpoint.load import load_checkpoint, load_reward_model
    from tafkir.data.preference import PairStream
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.recipe.rlhf import DpoConfig, RewardConfig
    from tafkir.train.dpo import dpo_step, reference_logprobs
    from tafkir.train.loop import Trainer
    from tafkir.train.reward_model import reward_step

    place = Path(folder) / ("reward" if method == "reward" else "policy")
    tokenizer = Tokenizer.load(place)
    pairs = load_pairs(tokenizer, data, limit)
    keys: dict[str, Any] = {
        "steps": len(pairs) // BATCH,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0,
        "schedule": "constant",
        "beta2": 0.999,
        "weight_decay": 0.0,
        "batch_pairs": BATCH,
    }
    stream = PairStream(pairs, batch_pairs=BATCH, seed=SEED)
    losses: list[float] = []
    if method == "reward":
        config: Any = RewardConfig(**keys)
        trainer = Trainer(load_reward_model(place).model, config)
        step = reward_step(trainer, stream.batch_at, config)
        began = time.process_time()
    else:
        config = DpoConfig(**keys)
        trainer = Trainer(load_checkpoint(place).decoder, config)
        began = time.process_time()
        reference = reference_logprobs(trainer.decoder, pairs)
        if method == "dpo_precomputed":
            began = time.process_time()
        step = dpo_step(trainer, stream, reference, config)
    for number in range(config.steps):
        trainer.set_step(number)
        losses.append(float(step(number).metrics["train/loss"]))  # type: ignore[arg-type]  # one number
    cpu_s = time.process_time() - began
    rows = [[list(p.prompt_ids + p.chosen_ids), list(p.prompt_ids + p.rejected_ids)] for p in pairs]
    return result(pairs, cpu_s, rows, losses)


def run_trl(folder: str, method: str, data: str, limit: int) -> dict[str, Any]:
    """An epoch of TRL's."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    from tafkir.data.chat import render_chat
    from tafkir.data.tokenizer import Tokenizer

    place = Path(folder) / ("reward" if method == "reward" else "policy")
    pairs = load_pairs(Tokenizer.load(place), data, limit)
    texts = [
        {"prompt": render_chat(p.pair.prompt, True), "chosen": p.pair.chosen, "rejected": p.pair.rejected}
        for p in pairs
    ]
    keys = trl_keys(Path(folder) / "trl-output", learning_rate=LEARNING_RATE, seed=SEED) | {
        "model_init_kwargs": {"dtype": "float32"},
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "max_length": MODEL.max_position_embeddings,
        "logging_steps": 1,
    }
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.process_time())

    shared = {"train_dataset": Dataset.from_list(texts), "callbacks": [Clock()]}
    tokenizer = AutoTokenizer.from_pretrained(place)
    if method == "reward":
        trainer: Any = RewardTrainer(str(place), RewardConfig(**keys), processing_class=tokenizer, **shared)
        rows = [[row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset]
    else:
        keys |= {"beta": 0.1, "loss_type": ["sigmoid"], "precompute_ref_log_probs": method == "dpo_precomputed"}
        trainer = DPOTrainer(str(place), args=DPOConfig(**keys), processing_class=tokenizer, **shared)
        rows = [
            [row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]]
            for row in trainer.train_dataset
        ]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return result(pairs, clock[-1] - clock[0], rows, losses)


def work(side: str, folder: str, tasks: Sequence[tuple[str, str]] = (), limit: int = 0) -> dict[str, Any]:
    """The child process: prepare, or one side's epoch of every method on every data set."""
    if side == "prepare":
        return prepare(folder)
    run = run_ours if side == "ours" else run_trl
    return {f"{method} {data}": run(folder, method, data, limit) for method, data in tasks}


# --- the comparison ---------------------------------------------------------------------------------------------------


def measure(folder: str, tasks: Sequence[tuple[str, str]], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Alternate the sides."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for repeat in range(args.repeats):
        for side in ("ours", "trl")[:: 1 if repeat % 2 == 0 else -1]:
            say(f"repeat {repeat + 1} of {args.repeats}: {side}")
            spec = {"side": side, "folder": folder, "tasks": tasks, "limit": args.pairs}
            runs[side].append(in_child(__file__, spec, threads=args.threads))
    return runs


def compare(method: str, data: str, measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One row; the sides' first losses, of equal weights, differ by the order of the pairs alone."""
    runs = {side: [run[f"{method} {data}"] for run in own] for side, own in measured.items()}
    hashes = {run.pop("tokens_hash") for own in runs.values() for run in own}
    if len(hashes) != 1:
        raise SystemExit(f"{method}, {data}: the sides did not read the same tokens")
    speeds = {side: [run["pairs_per_cpu_s"] for run in own] for side, own in runs.items()}
    ratio: Spread = pair_ratios(speeds["ours"], speeds["trl"])
    facts = {key: runs["ours"][0][key] for key in ("pairs", "prompt_tokens", "answer_tokens")}
    losses = {side: [own[0]["first_loss"], own[0]["last_loss"]] for side, own in runs.items()}
    medians = {f"{side}_pairs_per_cpu_s": statistics.median(values) for side, values in speeds.items()}
    return {"method": method, "data": data, **facts, **medians, "ratio": ratio, "first_and_last_loss": losses}


def render(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'method':17}{'data':13}{'prompt':>7}{'answer':>7}{'ours':>9}{'TRL':>9}   pairs/CPU-s, ratio (range)"]
    for row in rows:
        ratio = row["ratio"]
        lines.append(
            f"{row['method']:17}{row['data']:13}{row['prompt_tokens']:7.0f}{row['answer_tokens']:7.0f}"
            f"{row['ours_pairs_per_cpu_s']:9.1f}{row['trl_pairs_per_cpu_s']:9.1f}"
            f"   {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--pairs", type=int, default=64, help="pairs of an epoch, at most")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each side")
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = in_child(__file__, {"side": "prepare", "folder": folder}, threads=args.threads)
        tasks = [(method, data) for method in args.methods for data in args.data]
        measured = measure(folder, tasks, args)
    rows = [compare(method, data, measured) for method, data in tasks]
    found = describe("preference_vs_trl", threads=args.threads, repeats=args.repeats, **prepared, rows=rows)
    deliver(found, render(rows), args)


if __name__ == "__main__":
    if is_child():
        serve_child(work)
    else:
        main()
