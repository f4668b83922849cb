"""The mismatch laboratory: one task, rollouts in several number formats, several losses, with and without replay.

Source: arXiv 2510.18855, section 2.4 and figure 12: what survives the mismatch of sampling and training engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.packing import Document
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import RecipeError
from tafkir.models.build import build_decoder
from tafkir.ops.native import select_kernels
from tafkir.protocols import Completer
from tafkir.recipe.lab import LAB_LOSSES, LabLoss, LabRollout, MismatchLabConfig, lab_variant_name
from tafkir.recipe.rollout import RolloutConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.records import Example, SamplingParams
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import StageDir
from tafkir.tasks.reversal import Reversal
from tafkir.train.lab import fit_variant, run_variants
from tafkir.train.language import language_step
from tafkir.train.loop import FitResult, Trainer, fit
from tafkir.train.rlvr import RlvrStep
from tafkir.train.rollout import SynchronousRollouts, collect_rollouts

__all__ = ["MismatchVariant", "list_variants", "run_mismatch_lab", "steps_survived"]

_VOCABULARY = 300
_HELDOUT = 100
# Steps over which rewards are averaged before a run is called collapsed.
_WINDOW = 10
# A run has collapsed when its reward falls to half of the best that it had.
_COLLAPSE = 0.5


@dataclass(frozen=True, slots=True)
class MismatchVariant:
    """One training of the lab."""

    rollout: LabRollout
    loss: LabLoss
    replay: bool
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder below the stage's `variants`."""
        return lab_variant_name(self.rollout, self.loss, self.replay, self.seed)

    @property
    def group(self) -> str:
        """Its rollouts: how long a step takes."""
        return self.rollout

    @property
    def size(self) -> float:
        """Every variant has as many steps."""
        return 1.0


def list_variants(config: MismatchLabConfig) -> list[MismatchVariant]:
    """All variants in the order in which they run, repeat by repeat."""
    return [MismatchVariant(*variant) for variant in config.variants()]


def run_mismatch_lab(ctx: StageContext, config: MismatchLabConfig) -> dict[str, Any]:
    """Warm-start a model for each repeat, and train every variant of it that is not finished yet.

    Returns:
        The variants' results and their totals. A variant whose gradient stops being finite is not an error: its result
        says at which step it diverged.

    Raises:
        RecipeError: the model's vocabulary is too small.
    """
    torch.set_num_threads(ctx.recipe.threads)
    select_kernels(ctx.recipe.kernels)
    tokenizer = Tokenizer.train(["0123456789="], _VOCABULARY)
    if tokenizer.vocab_size > ctx.recipe.model.vocab_size:
        raise RecipeError(
            f"model.vocab_size={ctx.recipe.model.vocab_size}",
            where="lab",
            expected=f"{tokenizer.vocab_size} or more: the bytes and the special tokens",
        )

    def train_variant(variant: MismatchVariant, stage: StageDir, place: str) -> dict[str, Any]:
        start = ctx.stage.path / "starts" / f"seed{variant.seed}"
        if not start.is_dir():
            _warm_start(ctx, config, tokenizer, variant.seed, start)
        return _train_variant(ctx, config, tokenizer, variant, (start, stage, place))

    return run_variants(ctx, list_variants(config), train_variant)


def _task(ctx: StageContext, config: MismatchLabConfig, seed: int) -> Reversal:
    return Reversal(config.digits, derive_seed(ctx.seed, "lab", "problems", seed))


def _warm_start(ctx: StageContext, config: MismatchLabConfig, tokenizer: Tokenizer, seed: int, path: Path) -> None:
    """Supervised steps on solved problems, so that reinforcement has something to reinforce."""
    steps, rate = config.warm_start_steps, config.warm_start_learning_rate
    table = config.model_copy(update={"steps": steps, "learning_rate": rate, "schedule": "cosine"})
    task, count = _task(ctx, config, seed), config.warm_start_batch

    def documents(step: int) -> Sequence[Document]:
        examples = (task.example("train", step * count + i) for i in range(count))
        return [_solved(example, tokenizer) for example in examples]

    decoder = build_decoder(ctx.recipe.model, derive_seed(ctx.seed, "lab", "weights", seed))
    trainer = Trainer(decoder, table)
    step = language_step(trainer, documents, label=f"lab start {seed}")
    for i in range(table.steps):
        trainer.set_step(i)
        step(i)
    save_checkpoint(path, decoder, tokenizer=tokenizer, extra={"stage": "lab", "seed": seed})


def _solved(example: Example, tokenizer: Tokenizer) -> Document:
    question, answer = tokenizer.encode(example.question), tokenizer.encode(example.answer)
    ids = [*question, *answer, tokenizer.turn_end_id]
    return ids, [i >= len(question) for i in range(len(ids))]


def _train_variant(
    ctx: StageContext,
    config: MismatchLabConfig,
    tokenizer: Tokenizer,
    variant: MismatchVariant,
    where: tuple[Path, StageDir, str],
) -> dict[str, Any]:
    start, stage, place = where
    rollout = config.rollout_of(variant.rollout, replay=variant.replay)
    table = config.model_copy(update={"rollout": rollout, "acceptance": LAB_LOSSES[variant.loss]})
    task = _task(ctx, config, variant.seed)
    trainer = Trainer(load_checkpoint(start).decoder, table)

    def prompts(step: int) -> list[tuple[Example, list[int]]]:
        # Behind the problems of the warm start.
        first = config.warm_start_steps * config.warm_start_batch + step * config.prompts_per_step
        examples = [task.example("train", first + i) for i in range(config.prompts_per_step)]
        return [(example, tokenizer.encode(example.question)) for example in examples]

    rollouts = SynchronousRollouts(
        ctx.build_completer(start, rollout),
        tokenizer,
        task,
        prompts,
        table,
        weights=lambda: trainer.decoder.state_dict().items(),
        # The seeds know nothing of formats and losses: twins share weights, problems and draws.
        seed=derive_seed(ctx.seed, "lab", "rollouts", variant.seed),
    )
    step = RlvrStep(trainer, rollouts, table, reference=None)

    def run() -> FitResult:
        return fit(trainer, stage, step, label=f"lab {place} {variant.name}")

    per_step = config.prompts_per_step * config.group_size * (config.digits + 1)
    totals = fit_variant(run, stage, variant.name, lambda steps: steps * per_step)
    rewards = [float(row["rollout/reward_mean"]) for row in read_jsonl(stage.metrics_path)]
    exact = ctx.build_completer(start, RolloutConfig())
    exact.load_weights(trainer.decoder.state_dict().items(), config.steps)
    return {
        "rollout": variant.rollout,
        "loss": variant.loss,
        "replay": variant.replay,
        "seed": variant.seed,
        **totals,
        "survived": steps_survived(rewards) * config.log_every if rewards else 0,
        "heldout_reward": _heldout_reward(exact, tokenizer, task, table),
    }


def _heldout_reward(completer: Completer, tokenizer: Tokenizer, task: Reversal, config: MismatchLabConfig) -> float:
    """Mean reward on held-out problems, sampled as in training, but with the weights as they are."""
    examples = task.examples("validation")[:_HELDOUT]
    params = SamplingParams(
        temperature=config.temperature,
        max_tokens=config.max_completion_tokens,
        stop_token_ids=(tokenizer.turn_end_id,),
    )
    prompts = [(example, tokenizer.encode(example.question)) for example in examples]
    groups = collect_rollouts(completer, tokenizer, task, prompts, group_size=4, params=params, seed=0)
    return fmean(rollout.verdict.reward for group in groups for rollout in group.rollouts)


def steps_survived(rewards: Sequence[float]) -> int:
    """Rows before the mean reward of ten falls below half of the best that it was; all where it never does."""
    best = 0.0
    for end in range(_WINDOW, len(rewards) + 1):
        mean = fmean(rewards[end - _WINDOW : end])
        if mean < _COLLAPSE * best:
            return end - 1
        best = max(best, mean)
    return len(rewards)
