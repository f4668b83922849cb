"""A GRPO step (rollout, grading, training) of ours against TRL's GRPOTrainer, on the CPU.

Both start from the same weights (ours under Ling 2.0's names, TRL's under those of Glm4MoeForCausalLM, which computes
the same function), read the same prompts in the same order with the same tokenizer, sample at temperature 1 without
cuts, call the same reward function, and take one AdamW step on the same loss. The task: write a number's digits from
the last to the first; a supervised warm start, shared by both, leaves it half learnt. Our side runs as a recipe's stage
does: the mismatch monitor is on, and every rollout is logged.

First TRL's own variants (expert backends, continuous batching) are tried and the fastest is kept. Then the sides run
in turn, each repeat in a process of its own; its median step after the warm-up counts, in CPU-seconds of all threads.
The ratio is the median of the pairwise ones. At the end one longer run of each side shows that both learn: reward in
the first and in the last pass over the same problems.

    python benchmarks/rl_vs_trl.py --threads 1 --out benchmarks/results/rl_vs_trl.json

TRL needs `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alternate import (
    ChildFailed,
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
from tafkir.recipe.rl import IcePop, NoAcceptance, RlvrConfig
from tafkir.recipe.schema import DataConfig, SftConfig
from tafkir.records import Completion, Example, Message, Request, Split, Verdict

# The parent process stays free of torch: a child's peak memory would start from its parent's.
if TYPE_CHECKING:
    from torch import Tensor

    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.models.decoder import Decoder

STEPS_PER_EPOCH = 10
SIDES = ("ours", "ours+icepop", "trl")
EXPERT_BACKENDS = ("eager", "grouped_mm", "batched_mm")
# By itself TRL's continuous batching takes half of the machine's memory for its cache, and is slower by far.
CONTINUOUS_BATCHING = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 2048}


@dataclass(frozen=True)
class Size:
    """A model, the length of the numbers that it reverses, how both phases train it, and what a step samples."""

    model: ModelConfig
    digits: tuple[int, int]
    warm_start_steps: int
    warm_start_lr: float
    learning_rate: float
    steps: int
    prompts: int = 16
    group: int = 8
    max_new: int = 32


SIZES = {
    "small": Size(
        ModelConfig(
            vocab_size=1024,
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_experts=8,
            n_group=2,
            topk_group=1,
        ),
        digits=(6, 12),
        warm_start_steps=300,
        warm_start_lr=5e-3,
        learning_rate=2e-4,
        steps=6,
    ),
    "dense": Size(
        ModelConfig(
            vocab_size=1024,
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=256,
            num_experts=8,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=2,
        ),
        digits=(6, 12),
        warm_start_steps=300,
        warm_start_lr=5e-3,
        learning_rate=2e-4,
        steps=6,
    ),
    "tiny": Size(
        ModelConfig(vocab_size=1024),
        digits=(12, 24),
        warm_start_steps=150,
        warm_start_lr=3e-3,
        learning_rate=1e-4,
        steps=3,
    ),
    # Says nothing of speed: whether both sides run, and do the same.
    "trial": Size(
        ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_experts=4,
            n_group=2,
            topk_group=1,
        ),
        digits=(2, 3),
        warm_start_steps=2,
        warm_start_lr=1e-3,
        learning_rate=1e-3,
        steps=1,
        prompts=2,
        group=2,
        max_new=4,
    ),
}


# --- the task, the same for both ---------------------------------------------------------------------------------


def step_problems(size: Size, step: int) -> list[tuple[str, str]]:
    """The problems of a step; every epoch asks the same ones in the same order."""
    first = step % STEPS_PER_EPOCH * size.prompts
    return [make_problem(size, index) for index in range(first, first + size.prompts)]


def make_problem(size: Size, index: int) -> tuple[str, str]:
    """Question and answer number `index`; problems of the warm start have negative indices."""
    draw = random.Random(index)
    digits = "".join(draw.choice("0123456789") for _ in range(draw.randint(*size.digits)))
    return f"Sara wrote the number {digits} on a card. What are its digits from the last to the first?", digits[::-1]


def reward_of(text: str, answer: str) -> float:
    """1 for the exact answer, else half the share of the answer that the text starts with."""
    if text == answer:
        return 1.0
    right = next((i for i, (a, b) in enumerate(zip(text, answer, strict=False)) if a != b), min(len(text), len(answer)))
    return 0.5 * right / len(answer)


class Reversal:
    """The task as our RL step sees it."""

    name = "reversal"

    def examples(self, split: Split) -> Sequence[Example]:
        raise NotImplementedError("problems are made by their index")

    def prompt(self, example: Example) -> list[Message]:
        return [Message("user", example.question)]

    def grade(self, example: Example, text: str, *, finished: bool = True) -> Verdict:
        reward = reward_of(text, example.answer)
        return Verdict("correct" if reward == 1 else "wrong", reward, text, example.answer)


# --- preparation: tokenizer, warm start, both layouts -----------------------------------------------------------------


def prepare(name: str, folder: Path, warm_start_steps: int | None) -> dict[str, float]:
    """Write `ours/` and `glm/` with the same weights; the last loss, and how far the logits of the two differ."""
    import torch

    from tafkir.checkpoint.save import save_checkpoint
    from tafkir.data.corpus import load_corpus
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.models.build import build_decoder
    from tafkir.train.language import language_step
    from tafkir.train.loop import Trainer

    size = SIZES[name]
    corpus = load_corpus(DataConfig())
    tokenizer = Tokenizer.train([problem.question for problem in corpus.train], size.model.vocab_size)
    decoder = build_decoder(size.model, seed=0)
    config = SftConfig(
        steps=warm_start_steps or size.warm_start_steps,
        learning_rate=size.warm_start_lr,
        warmup_steps=20,
        schedule="linear",
        weight_decay=0.0,
    )
    trainer = Trainer(decoder, config)
    batch = 32

    def documents(step: int) -> list[tuple[list[int], list[bool]]]:
        return [_conversation(tokenizer, size, -1 - i) for i in range(step * batch, (step + 1) * batch)]

    step_function = language_step(trainer, documents, label="warm start")
    for step in range(config.steps):
        trainer.set_step(step)
        loss = step_function(step).metrics["train/loss"]
    assert isinstance(loss, float)
    save_checkpoint(folder / "ours", decoder, tokenizer=tokenizer)
    glm = save_glm(decoder, tokenizer, folder / "glm")
    ids = torch.tensor([_conversation(tokenizer, size, 0)[0]])
    with torch.no_grad():
        difference = (glm(ids).logits[0] - _logits(decoder, ids[0])).abs().max()
    return {"warm_start_loss": loss, "max_logit_difference": float(difference)}


def _conversation(tokenizer: Tokenizer, size: Size, index: int) -> tuple[list[int], list[bool]]:
    from tafkir.data.chat import encode_prompt

    question, answer = make_problem(size, index)
    prompt, body = encode_prompt(tokenizer, question), [*tokenizer.encode(answer), tokenizer.turn_end_id]
    return prompt + body, [False] * len(prompt) + [True] * len(body)


def _logits(decoder: Decoder, ids_N: Tensor) -> Tensor:
    import torch

    from tafkir.models.attention import VarlenCausal

    out = decoder(ids_N, torch.arange(len(ids_N)), VarlenCausal([0, len(ids_N)]))
    return decoder.logits(out.hidden_ND)


def save_glm(decoder: Decoder, tokenizer: Tokenizer, folder: Path) -> Any:
    """The decoder as a transformers checkpoint with its tokenizer; returns the model."""
    from moe_train_step import copy_weights, glm_config
    from transformers import Glm4MoeForCausalLM

    config = glm_config(decoder.config)
    config.use_cache = True
    model = Glm4MoeForCausalLM(config).eval()
    copy_weights(decoder, model)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model


# --- one measured run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one process does; travels as JSON."""

    side: str
    size: str
    folder: str
    steps: int
    warmup_steps: int
    seed: int
    experts: str = "eager"
    continuous_batching: bool = False


@dataclass
class Meter:
    """CPU and wall clock at the end of every step, and what the rollouts were like."""

    ends: list[tuple[float, float]] = field(default_factory=list)
    rollout_cpu_s: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    first_prompts: list[list[int]] = field(default_factory=list)

    def step_ended(self) -> None:
        self.ends.append((time.process_time(), time.perf_counter()))

    def result(self, run: Run) -> dict[str, Any]:
        """The steps after the warm-up; their median is the run's speed, which a burst of other work hardly moves."""
        timed = list(pairwise(self.ends[run.warmup_steps :]))
        samples = SIZES[run.size].prompts * SIZES[run.size].group
        cpu_s = [after[0] - before[0] for before, after in timed]
        wall_s = [after[1] - before[1] for before, after in timed]
        return {
            "side": run.side,
            "seed": run.seed,
            "samples_per_cpu_s": samples / statistics.median(cpu_s),
            "samples_per_s": samples / statistics.median(wall_s),
            "cpu_s_per_step": statistics.median(cpu_s),
            "fastest_step_cpu_s": min(cpu_s),
            "rollout_share": sum(self.rollout_cpu_s[run.warmup_steps :]) / sum(cpu_s),
            "completion_tokens": statistics.mean(self.lengths[run.warmup_steps :]),
            "rewards": self.rewards,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "first_prompts": self.first_prompts,
        }


class MeteredEngine:
    """Our engine as a completer whose CPU time is noted."""

    def __init__(self, engine: Engine, meter: Meter, group: int) -> None:
        self.engine, self.meter, self.group = engine, meter, group

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        began = time.process_time()
        done = list(self.engine.complete(requests))
        self.meter.rollout_cpu_s.append(time.process_time() - began)
        self.meter.lengths.append(statistics.mean(len(completion.token_ids) for completion in done))
        self.meter.first_prompts = self.meter.first_prompts or [list(r.prompt_ids) for r in requests[:: self.group]]
        return iter(done)

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return self.engine.score(token_ids)

    def load_weights(self, weights: Any, version: int) -> None:
        self.engine.load_weights(weights, version)


def run_ours(run: Run) -> dict[str, Any]:
    """Our RL step on the engine."""
    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.data.chat import encode_prompt
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.runlog.rollouts import RolloutLog
    from tafkir.train.loop import Trainer
    from tafkir.train.monitor import MismatchMonitor
    from tafkir.train.rlvr import RlvrStep
    from tafkir.train.rollout import SynchronousRollouts

    size, folder, meter = SIZES[run.size], Path(run.folder) / "ours", Meter()
    tokenizer = Tokenizer.load(folder)
    config = RlvrConfig(
        steps=run.warmup_steps + run.steps,
        learning_rate=size.learning_rate,
        warmup_steps=0,
        schedule="constant",
        beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        expert_bias_update_rate=0.0,
        prompts_per_step=size.prompts,
        group_size=size.group,
        max_completion_tokens=size.max_new,
        acceptance=IcePop() if run.side == "ours+icepop" else NoAcceptance(),
        reduction="token_mean",
        drop_zero_variance=False,
    )

    def prompts(step: int) -> list[tuple[Example, list[int]]]:
        return [(Example(q, "made", "train", q, a), encode_prompt(tokenizer, q)) for q, a in step_problems(size, step)]

    trainer = Trainer(load_checkpoint(folder).decoder, config)
    engine = Engine(load_checkpoint(folder).decoder, eos_ids=(tokenizer.turn_end_id,), tokenizer=tokenizer)
    rollouts = SynchronousRollouts(
        MeteredEngine(engine, meter, size.group),
        tokenizer,
        Reversal(),
        prompts,
        config,
        weights=lambda: trainer.decoder.state_dict().items(),
        seed=run.seed,
    )
    kept = Path(run.folder) / "kept"
    monitor = MismatchMonitor(
        config.monitor,
        config.acceptance,
        path=kept / "mismatch.jsonl",
        decode=lambda ids: tokenizer.decode(list(ids)),
    )
    log = RolloutLog(kept / "rollouts")
    step_function = RlvrStep(trainer, rollouts, config, reference=None, log=log, monitor=monitor)
    meter.step_ended()
    for step in range(config.steps):
        trainer.set_step(step)
        output = step_function(step)
        meter.rewards.append(float(output.metrics["rollout/reward_mean"]))  # type: ignore[arg-type]  # one number
        meter.step_ended()
    return meter.result(run)


def trl_config(run: Run) -> Any:
    """TRL's keys for the same step."""
    from trl import GRPOConfig

    size = SIZES[run.size]
    keys = trl_grpo_keys(
        Path(run.folder) / "trl-output",
        prompts=size.prompts,
        group=size.group,
        max_new=size.max_new,
        steps=run.warmup_steps + run.steps,
        learning_rate=size.learning_rate,
        seed=run.seed,
    )
    return GRPOConfig(
        use_transformers_continuous_batching=run.continuous_batching,
        transformers_continuous_batching_config=CONTINUOUS_BATCHING if run.continuous_batching else None,
        model_init_kwargs={"experts_implementation": run.experts, "dtype": "float32"},
        router_aux_loss_coef=0.0,
        log_completions=False,
        **keys,
    )


def run_trl(run: Run) -> dict[str, Any]:
    """TRL's GRPOTrainer."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from tafkir.data.chat import render_chat

    size, folder, meter = SIZES[run.size], Path(run.folder) / "glm", Meter()
    problems = [problem for step in range(STEPS_PER_EPOCH) for problem in step_problems(size, step)]
    rows = [{"prompt": render_chat([Message("user", q)], True), "answer": answer} for q, answer in problems]

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        rewards = [reward_of(text, wanted) for text, wanted in zip(completions, answer, strict=True)]
        meter.rewards.append(statistics.mean(rewards))
        meter.lengths.append(statistics.mean(map(len, completion_ids)))
        return rewards

    class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.step_ended()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_ended()

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=trl_config(run),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[StepClock()],
    )
    generate = trainer._generate

    def metered_generate(prompts: list[str]) -> Any:
        began = time.process_time()
        output = generate(prompts)
        meter.rollout_cpu_s.append(time.process_time() - began)
        meter.first_prompts = meter.first_prompts or [list(ids) for ids in output[0][:: size.group]]
        return output

    trainer._generate = metered_generate
    trainer.train()
    return meter.result(run)


def work(**spec: Any) -> dict[str, Any]:
    """The child process: prepare a size, or do one run."""
    import torch

    if "prepare" in spec:
        return prepare(spec["prepare"], Path(spec["folder"]), spec["warm_start_steps"])
    run = Run(**spec)
    torch.manual_seed(run.seed)
    return run_trl(run) if run.side == "trl" else run_ours(run)


# --- the comparison -----------------------------------------------------------------------------------------------


def fastest_trl(base: Run, backends: Sequence[str], try_batching: bool, threads: int) -> tuple[Run, dict[str, str]]:
    """TRL with its fastest expert backend and way of sampling, and what each variant took."""
    notes: dict[str, str] = {}
    best: tuple[float, Run] | None = None
    if len(backends) == 1 and not try_batching:
        return replace(base, side="trl", experts=backends[0]), {backends[0]: "not compared with others"}

    def attempt(run: Run, name: str) -> None:
        nonlocal best
        say(f"{run.size}: trying TRL with {name}")
        try:
            cpu_s = in_child(__file__, asdict(run), threads=threads)["fastest_step_cpu_s"]
        except ChildFailed as error:
            notes[name] = f"does not run: {str(error).splitlines()[-1]}"
            return
        notes[name] = f"{cpu_s:.2f} CPU-s a step"
        if best is None or cpu_s < best[0]:
            best = (cpu_s, run)

    for backend in backends:
        attempt(replace(base, side="trl", experts=backend), backend)
    if best is None:
        raise SystemExit(f"TRL does not run here: {notes}")
    if try_batching:
        attempt(replace(best[1], continuous_batching=True), f"{best[1].experts}, continuous batching")
    return best[1], notes


def compare(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prepare one size, alternate the sides, and summarise."""
    size = SIZES[name]
    folder.mkdir(parents=True)
    spec = {"prepare": name, "folder": str(folder), "warm_start_steps": args.warm_start_steps}
    say(f"{name}: warm start")
    prepared = in_child(__file__, spec, threads=args.threads)
    base = Run("ours", name, str(folder), args.steps or size.steps, args.warmup_steps, seed=0)
    trial = replace(base, steps=min(base.steps, 2), warmup_steps=min(base.warmup_steps, 1))
    trl, notes = fastest_trl(trial, args.backends, not args.no_continuous_batching, args.threads)
    repeats = []
    for seed in range(args.repeats):
        order = SIDES if seed % 2 == 0 else SIDES[::-1]
        say(f"{name}: repeat {seed + 1} of {args.repeats}: {', '.join(order)}")
        repeats.append({side: measure(side, replace(base, seed=seed), trl, args.threads) for side in order})
    learnt: dict[str, tuple[float, float]] = {}
    if args.learning_steps and name == args.sizes[0]:
        for side in SIDES:
            say(f"{name}: {args.learning_steps} steps of {side}, to see it learn")
            run = replace(base, steps=args.learning_steps, seed=len(repeats))
            rewards = measure(side, run, trl, args.threads)["rewards"]
            epochs = [rewards[i : i + STEPS_PER_EPOCH] for i in range(0, len(rewards), STEPS_PER_EPOCH)]
            whole = [epoch for epoch in epochs if len(epoch) == STEPS_PER_EPOCH]
            learnt[side] = (statistics.mean(whole[0]), statistics.mean(whole[-1]))
    return {
        "size": name,
        "parameters": size.model.num_parameters(),
        "active_parameters": size.model.num_parameters(active=True),
        "samples_per_step": size.prompts * size.group,
        "steps": base.steps,
        **prepared,
        "trl_experts": trl.experts,
        "trl_continuous_batching": trl.continuous_batching,
        "trl_variants": notes,
        "sides": {side: summarise([repeat[side] for repeat in repeats]) for side in SIDES},
        "ratios": {side: ratios_to_trl(repeats, side) for side in SIDES if side != "trl"},
        "rewards_first_and_last_epoch": learnt,
    }


def measure(side: str, run: Run, trl: Run, threads: int) -> dict[str, Any]:
    """One run of one side; the prompts must be those of every other run."""
    run = replace(run, side=side, experts=trl.experts, continuous_batching=trl.continuous_batching)
    result = in_child(__file__, asdict(run), threads=threads)
    prompts = json.dumps(result.pop("first_prompts"))
    seen = Path(run.folder) / "prompts.json"
    if seen.exists() and seen.read_text() != prompts:
        raise SystemExit("the two sides did not get the same prompt tokens")
    seen.write_text(prompts)
    return result


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the repeats."""
    keys = (
        "samples_per_cpu_s", "samples_per_s", "cpu_s_per_step", "rollout_share", "completion_tokens", "peak_rss_mib",
    )  # fmt: skip
    return {key: statistics.median(result[key] for result in results) for key in keys}


def ratios_to_trl(repeats: Sequence[dict[str, dict[str, Any]]], side: str) -> dict[str, Any]:
    """Median and range of the pairwise ratios; above 1 we make more samples (or, for memory, take more)."""
    keys = ("samples_per_cpu_s", "samples_per_s", "peak_rss_mib")
    return {key: pair_ratios(*([repeat[of][key] for repeat in repeats] for of in (side, "trl"))) for key in keys}


def render(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'size':7}{'side':13}{'samples/cpu-s':>14}{'ratio (range)':>19}{'wall ratio':>12}{'RSS MiB':>9}"
        f"{'rollout':>9}{'tokens':>8}{'reward first > last epoch':>27}"
    ]
    for row in rows:
        for side in SIDES:
            own, ratio = row["sides"][side], row["ratios"].get(side)
            cpu = ratio["samples_per_cpu_s"] if ratio else None
            shown = f"{cpu['median']:.2f} ({cpu['min']:.2f}-{cpu['max']:.2f})" if cpu else "1"
            wall = f"{ratio['samples_per_s']['median']:.2f}" if ratio else "1"
            learnt = row["rewards_first_and_last_epoch"].get(side)
            lines.append(
                f"{row['size']:7}{side:13}{own['samples_per_cpu_s']:14.1f}{shown:>19}{wall:>12}"
                f"{own['peak_rss_mib']:9.0f}{own['rollout_share']:9.0%}{own['completion_tokens']:8.1f}"
                + (f"{f'{learnt[0]:.3f} > {learnt[1]:.3f}':>27}" if learnt else "")
            )
        lines.append(f"{row['size']:7}TRL variants: {row['trl_variants']}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "dense", "tiny"])
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each side")
    parser.add_argument("--steps", type=int, help="timed steps of a run (default: by size)")
    parser.add_argument("--warmup-steps", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--warm-start-steps", type=int, help="supervised steps (default: by size)")
    parser.add_argument("--learning-steps", type=int, default=39, help="steps of the last runs, first size; 0: none")
    parser.add_argument("--backends", nargs="+", choices=EXPERT_BACKENDS, default=EXPERT_BACKENDS)
    parser.add_argument("--no-continuous-batching", action="store_true", help="do not try TRL's continuous batching")
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(name, Path(folder) / name, args) for name in args.sizes]
    found = describe("rl_vs_trl", threads=args.threads, repeats=args.repeats, rows=rows)
    deliver(found, render(rows), args)


if __name__ == "__main__":
    if is_child():
        serve_child(work)
    else:
        main()
