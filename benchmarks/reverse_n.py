"""CPU-seconds to 90 % reward: GRPO on "write N digits backwards", ours against TRL's GRPOTrainer.

Both sides start from the same weights (a small Qwen3 of two layers in one Hugging Face folder, warmed up by
supervised steps until about 0.4 of its samples are right), see the same problems in the same order as the same tokens,
draw 16 x 8 samples a step at temperature 1, get 1 for the exact answer and 0 otherwise, and take one AdamW step. What
counts are the CPU-seconds from the beginning of the first step to the end of the first step at which the mean reward of
the last five is 0.9; imports and loading are left out. The learning rate is tuned alike for each side: a run of every
one on the list, the fastest stays. Then the sides run in turn with other seeds, each of these in a process of its own.

`ours` computes TRL's loss (`dapo`); `ours, as shipped` is what a recipe's `[rlvr]` does: IcePop, the mean over
completions, groups of equal rewards left out; both with the monitor on and every rollout logged.

    python benchmarks/reverse_n.py --out benchmarks/results/reverse_n.json

About seven minutes. TRL needs `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
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

DIGITS, PROMPTS, GROUP, GOAL, WINDOW = 6, 16, 8, 0.9, 5
MAX_NEW = DIGITS + 2
SIDES = ("ours", "ours, as shipped", "trl")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
MODEL = ModelConfig(
    model_type="qwen3",
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=192,
    num_experts=0,
    num_shared_experts=0,
    partial_rotary_factor=1.0,
    max_position_embeddings=64,
)


class Exact:
    """The task with a reward of all or nothing."""

    name = "reversal"

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        right = finished and text == example.answer
        return Verdict("correct" if right else "wrong", float(right), text, example.answer)


def problem(seed: int, index: int) -> Example:
    """Problem number `index` of a run."""
    from tafkir.tasks.reversal import Reversal

    return Reversal(DIGITS, seed).example("train", index)


def prepare(folder: str, target: float) -> dict[str, Any]:
    """The weights that both sides start from, and what share of their samples is right."""
    from tafkir.checkpoint.save import save_checkpoint
    from tafkir.data.chat import encode_prompt
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.models.build import build_decoder
    from tafkir.recipe.schema import SftConfig
    from tafkir.records import SamplingParams
    from tafkir.train.language import language_step
    from tafkir.train.loop import Trainer
    from tafkir.train.rollout import collect_rollouts

    tokenizer = Tokenizer.train([problem(0, i).question for i in range(200)], MODEL.vocab_size)
    decoder = build_decoder(MODEL, seed=0)
    trainer = Trainer(
        decoder, SftConfig(steps=2000, learning_rate=1e-3, warmup_steps=20, schedule="constant", weight_decay=0.0)
    )

    def documents(step: int) -> list[tuple[list[int], list[bool]]]:
        rows = []
        for example in (problem(1, step * 64 + i) for i in range(64)):
            prompt = encode_prompt(tokenizer, example.question)
            body = [*tokenizer.encode(example.answer), tokenizer.turn_end_id]
            rows.append((prompt + body, [False] * len(prompt) + [True] * len(body)))
        return rows

    engine = Engine(build_decoder(MODEL, 0), eos_ids=(tokenizer.turn_end_id,), tokenizer=tokenizer)
    prompts = [(example, encode_prompt(tokenizer, example.question)) for example in (problem(2, i) for i in range(128))]
    params = SamplingParams(max_tokens=MAX_NEW, stop_token_ids=(tokenizer.turn_end_id,))

    def accuracy() -> float:
        engine.load_weights(decoder.state_dict().items(), 0)
        groups = collect_rollouts(engine, tokenizer, Exact(), prompts, group_size=4, params=params, seed=0)  # type: ignore[arg-type]  # grades
        return statistics.mean(rollout.verdict.reward for group in groups for rollout in group.rollouts)

    step_function = language_step(trainer, documents, label="warm start")
    for step in range(trainer.config.steps):
        trainer.set_step(step)
        step_function(step)
        if step % 4 == 3 and (right := accuracy()) >= target:
            break
    else:
        raise SystemExit(f"the warm start does not reach {target}")
    save_checkpoint(Path(folder) / "model", decoder, tokenizer=tokenizer)
    save_tokenizer(tokenizer, Path(folder) / "model")
    return {"warm_start_steps": step + 1, "warm_start_accuracy": right, "parameters": MODEL.num_parameters()}


# --- one run ----------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """The goal is reached."""


class Race:
    """Notes the reward of every step and the CPU-seconds when the goal is reached."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.steps_cpu_s: list[float] = []
        self.began = time.process_time()

    def start(self) -> None:
        self.began = time.process_time()

    def step_ended(self, reward: float) -> None:
        """Raises Reached at the goal."""
        self.rewards.append(reward)
        self.steps_cpu_s.append(time.process_time() - self.began)
        if len(self.rewards) >= WINDOW and statistics.mean(self.rewards[-WINDOW:]) >= GOAL:
            raise Reached

    def result(self, reached: bool) -> dict[str, Any]:
        return {
            "reached": reached,
            "steps": len(self.rewards),
            "cpu_s": self.steps_cpu_s[-1],
            "cpu_s_per_step": self.steps_cpu_s[-1] / len(self.rewards),
            "first_reward": self.rewards[0],
            "last_rewards": statistics.mean(self.rewards[-WINDOW:]),
        }


def run_ours(folder: str, rate: float, seed: int, steps: int, shipped: bool) -> dict[str, Any]:
    """Our RL step, as a stage would run it."""
    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.data.chat import encode_prompt
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.recipe.rl import IcePop, NoAcceptance, RlvrConfig
    from tafkir.runlog.rollouts import RolloutLog
    from tafkir.train.loop import Trainer
    from tafkir.train.monitor import MismatchMonitor
    from tafkir.train.rlvr import RlvrStep
    from tafkir.train.rollout import SynchronousRollouts

    place = Path(folder) / "model"
    tokenizer = Tokenizer.load(place)
    config = RlvrConfig(
        steps=steps,
        learning_rate=rate,
        warmup_steps=0,
        schedule="constant",
        beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_completion_tokens=MAX_NEW,
        acceptance=IcePop() if shipped else NoAcceptance(),
        reduction="sequence_mean" if shipped else "token_mean",
        drop_zero_variance=shipped,
    )

    def prompts(step: int) -> list[tuple[Example, list[int]]]:
        examples = [problem(10 + seed, step * PROMPTS + i) for i in range(PROMPTS)]
        return [(example, encode_prompt(tokenizer, example.question)) for example in examples]

    trainer = Trainer(load_checkpoint(place).decoder, config)
    engine = Engine(load_checkpoint(place).decoder, eos_ids=(tokenizer.turn_end_id,), tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as kept:
        rollouts = SynchronousRollouts(
            engine,
            tokenizer,
            Exact(),  # type: ignore[arg-type]  # grades
            prompts,
            config,
            weights=lambda: trainer.decoder.state_dict().items(),
            seed=seed,
        )
        monitor = MismatchMonitor(config.monitor, config.acceptance, path=Path(kept) / "mismatch.jsonl")
        log = RolloutLog(Path(kept) / "rollouts")
        step_function = RlvrStep(trainer, rollouts, config, reference=None, log=log, monitor=monitor)
        race = Race()
        try:
            for step in range(steps):
                trainer.set_step(step)
                race.step_ended(float(step_function(step).metrics["rollout/reward_mean"]))  # type: ignore[arg-type]  # one number
        except Reached:
            return race.result(True)
        return race.result(False)


def run_trl(folder: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """TRL's GRPOTrainer with the keys of the same step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tafkir.data.chat import render_chat

    place = Path(folder) / "model"
    keys = trl_grpo_keys(
        Path(folder) / "trl-output",
        prompts=PROMPTS,
        group=GROUP,
        max_new=MAX_NEW,
        steps=steps,
        learning_rate=rate,
        seed=seed,
    )
    config = GRPOConfig(model_init_kwargs={"dtype": "float32"}, **keys)
    race, newest = Race(), [0.0]

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        rewards = [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]
        newest[0] = statistics.mean(rewards)
        return rewards

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            race.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            race.step_ended(newest[0])

    def rows() -> Iterator[dict[str, str]]:
        for index in range(steps * PROMPTS):
            example = problem(10 + seed, index)
            yield {"prompt": render_chat([Message("user", example.question)], True), "answer": example.answer}

    trainer = GRPOTrainer(
        model=str(place),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(list(rows())),
        processing_class=AutoTokenizer.from_pretrained(place),
        callbacks=[Watch()],
    )
    try:
        trainer.train()
    except Reached:
        return race.result(True)
    return race.result(False)


def work(side: str, folder: str, rates: Sequence[float] = (), **spec: Any) -> dict[str, Any]:
    """The child process: one run for every learning rate."""
    if side == "prepare":
        return prepare(folder, **spec)
    if side == "trl":
        return {f"{rate:g}": run_trl(folder, rate, **spec) for rate in rates}
    return {f"{rate:g}": run_ours(folder, rate, **spec, shipped=side != "ours") for rate in rates}


# --- the comparison ---------------------------------------------------------------------------------------------------


def tune(folder: str, side: str, args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """The learning rate with which a side is fastest there on a seed that does not count, and what each took.

    Where there is one rate only there is nothing to try.
    """
    if len(args.rates) == 1:
        return args.rates[0], {}
    say(f"{side}: trying learning rates of {', '.join(f'{rate:g}' for rate in args.rates)}")
    spec = {"side": side, "folder": folder, "rates": args.rates, "seed": 100, "steps": args.steps}
    found = in_child(__file__, spec, threads=args.threads)
    say(f"{side}: {[(rate, run['steps'], round(run['cpu_s'], 1)) for rate, run in found.items()]}")
    best = min(args.rates, key=lambda rate: (not found[f"{rate:g}"]["reached"], found[f"{rate:g}"]["cpu_s"]))
    return best, found


def compare(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tune every side, then alternate them."""
    tuned = {side: tune(folder, side, args) for side in SIDES}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(args.seeds):
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            say(f"seed {seed + 1} of {args.seeds}: {side}")
            rate = tuned[side][0]
            spec = {"side": side, "folder": folder, "rates": [rate], "seed": seed, "steps": args.steps}
            runs[side].append(in_child(__file__, spec, threads=args.threads)[f"{rate:g}"])
            say(f"seed {seed + 1}, {side}: {runs[side][-1]}")
    theirs = [run["cpu_s"] for run in runs["trl"]]
    ratios = {side: pair_ratios([run["cpu_s"] for run in runs[side]], theirs) for side in SIDES if side != "trl"}
    return {
        "learning_rates": {side: {"best": best, "tried": tried} for side, (best, tried) in tuned.items()},
        "runs": runs,
        "cpu_s_to_goal_ratio": ratios,
    }


def render(found: dict[str, Any]) -> str:
    lines = [f"{'side':18}{'rate':>8}{'CPU-s to 0.9':>14}{'steps':>8}{'CPU-s/step':>12}   of TRL's CPU-s (range)"]
    for side, runs in found["runs"].items():
        ratio = found["cpu_s_to_goal_ratio"].get(side)
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "1"
        cells = [statistics.median(run[key] for run in runs) for key in ("cpu_s", "steps", "cpu_s_per_step")]
        reached = "" if all(run["reached"] for run in runs) else "   NOT REACHED by all"
        best = found["learning_rates"][side]["best"]
        lines.append(f"{side:18}{best:8g}{cells[0]:14.2f}{cells[1]:8.0f}{cells[2]:12.4f}   {shown}{reached}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="measured runs of each side")
    parser.add_argument("--steps", type=int, default=150, help="a run that is not there by then ends")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="learning rates to tune over")
    parser.add_argument("--start", type=float, default=0.4, help="share of right samples that the warm start goes to")
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("warm start")
        spec = {"side": "prepare", "folder": folder, "target": args.start}
        prepared = in_child(__file__, spec, threads=args.threads)
        say(f"warm start: {prepared}")
        measured = compare(folder, args)
    found = describe("reverse_n", digits=DIGITS, goal=GOAL, threads=args.threads, **prepared, **measured)
    deliver(found, render(found), args)


if __name__ == "__main__":
    if is_child():
        serve_child(work)
    else:
        main()
