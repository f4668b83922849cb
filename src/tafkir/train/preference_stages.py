"""The stages that learn from preference pairs: `reward`, `dpo` and `rlhf`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch

from tafkir.checkpoint.load import load_reward_model
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.corpus import load_corpus
from tafkir.data.loader import PromptStream, repeat_sources
from tafkir.data.preference import EncodedPair, PairStream, PreferenceSet, load_preferences
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError, RecipeError
from tafkir.intervals import accuracy
from tafkir.models.decoder import Decoder
from tafkir.models.reward import reward_model_from
from tafkir.recipe.parallel import world_size
from tafkir.recipe.rlhf import RlhfConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.runlog.atomic import write_text
from tafkir.runlog.metrics import Metric
from tafkir.runlog.rollouts import Keep, RolloutLog
from tafkir.runlog.rundir import StageDir
from tafkir.tasks.arena import PairwiseJudge
from tafkir.tasks.judge import RubricJudge
from tafkir.tasks.math import WordProblems
from tafkir.train.copies import open_copies
from tafkir.train.dpo import KtoReference, dpo_step, measure_dpo, reference_logprobs
from tafkir.train.long_tail import open_rollouts
from tafkir.train.loop import FitResult, Trainer, fit
from tafkir.train.monitor import MismatchMonitor
from tafkir.train.ranks import Ranks, open_ranks
from tafkir.train.reward_guard import RewardGuard
from tafkir.train.reward_model import ScoredPair, reward_step, score_pairs
from tafkir.train.reward_quality import measure_reward_model, reward_scale
from tafkir.train.rlhf import (
    GradedRollouts,
    Grader,
    OpenPrompts,
    OpenTask,
    PairwiseGrader,
    RewardModelGrader,
    RlhfStep,
    RubricGrader,
)
from tafkir.train.rlvr import RlvrStep
from tafkir.train.stages import as_written, finish_policy, keep_checkpoints, open_policy
from tafkir.train.state import Carried

__all__ = ["JUDGE", "run_dpo", "run_reward", "run_rlhf"]

JUDGE = "judge"
"""Where in its folder the reward stage leaves the second model."""


def run_reward(ctx: StageContext) -> dict[str, Any]:
    """Train the reward model, and the guard's judge on pairs of its own; measure both on held-out pairs.

    Writes the checkpoints `checkpoint/` and `judge/checkpoint/`, and `heldout.jsonl` with the rewards of every pair.
    """
    config = ctx.recipe.reward
    assert config is not None
    decoder, tokenizer = open_policy(ctx)
    pairs = _load(ctx, tokenizer)
    own, judged = _share_out(pairs.train, config.judge_share, derive_seed(ctx.seed, "judge pairs"))
    result, scored = _fit_reward(ctx, ctx.stage, decoder, tokenizer, own, pairs.heldout)
    result["pairs"] = pairs.counts() | {"judge": len(judged)}
    if judged:
        folder = StageDir(ctx.stage.path / JUDGE, "reward")
        result["judge"], judge_scored = _fit_reward(ctx, folder, decoder, tokenizer, judged, pairs.heldout)
        if scored:
            result["judge"]["agreement"] = _agreement(scored, judge_scored)
    return result


def run_dpo(ctx: StageContext) -> dict[str, Any]:
    """Learn from the preference pairs directly; the reference is the policy that the stage starts from."""
    config = ctx.recipe.dpo
    assert config is not None
    decoder, tokenizer = open_policy(ctx, shared=world_size() > 1)
    pairs = _load(ctx, tokenizer)
    source = ctx.previous if decoder.embed_tokens.weight.is_meta else None
    ranks = open_ranks(ctx.recipe.parallel, ctx.recipe.model)
    trainer = Trainer(decoder, config, ranks, source)
    # Once, before the first step changes the weights: no second model is kept.
    reference_P2 = reference_logprobs(decoder, pairs.train, ranks)
    heldout_reference_P2 = reference_logprobs(decoder, pairs.heldout, ranks)
    is_kto = config.loss == "kto"
    kto = KtoReference(decoder, pairs.train, ranks) if is_kto else None
    heldout_kto = KtoReference(decoder, pairs.heldout, ranks) if is_kto and pairs.heldout else None
    stream = PairStream(pairs.train, batch_pairs=config.batch_pairs, seed=derive_seed(ctx.seed, "dpo"))

    def measured() -> tuple[torch.Tensor, torch.Tensor]:
        return measure_dpo(decoder, pairs.heldout, heldout_reference_P2, config, heldout_kto, ranks)

    def validate() -> Mapping[str, Metric]:
        losses_P, margins_P = measured()
        return {
            "validation/loss": float(losses_P.mean()),
            "validation/accuracy": float((margins_P > 0).float().mean()),
        }

    result = fit(
        trainer,
        ctx.stage,
        dpo_step(trainer, stream, reference_P2, config, kto),
        validate=validate if pairs.heldout else None,
        keep=keep_checkpoints(ctx, trainer, tokenizer),
        label="dpo",
    )
    finished = finish_policy(ctx, config, trainer, tokenizer, result) | {"loss": config.loss, "pairs": pairs.counts()}
    if pairs.heldout:
        with as_written(trainer, config):
            losses_P, margins_P = measured()
        right = accuracy([margin > 0 for margin in margins_P.tolist()])
        finished["heldout"] = {"accuracy": right.to_dict(), "loss": float(losses_P.mean())}
    return finished


def run_rlhf(ctx: StageContext) -> dict[str, Any]:
    """Reinforcement learning on the prompts of the preference pairs, graded by the reward model or by a judge.

    Raises:
        RecipeError: the recipe trains no reward model, or no judge, that the stage needs.
    """
    config = ctx.recipe.rlhf
    assert config is not None and ctx.previous is not None
    _check_rlhf(ctx, config)
    decoder, tokenizer = open_policy(ctx)
    prompts = _open_prompts(ctx, config, tokenizer)
    ranks = open_copies(ctx.recipe.parallel)
    trainer = Trainer(decoder, config, ranks)
    source = open_rollouts(
        ctx.build_completer(ctx.previous),
        tokenizer,
        OpenTask(WordProblems()),
        prompts.batch_at,
        config,
        weights=lambda: trainer.decoder.state_dict().items(),
        seed=derive_seed(ctx.seed, "rlhf"),
        ranks=ranks,
    )
    watched = bool(config.guard.kl_budget)
    reference = copy.deepcopy(decoder).requires_grad_(False) if watched or config.kl.coef > 0 else None
    grader, judge = _graders(ctx, config, tokenizer, ranks)
    rollouts = GradedRollouts(
        source, grader, config, judge=judge, reference=reference if watched else None, ranks=ranks
    )
    guard = RewardGuard(config.guard)
    log = RolloutLog(ctx.stage.rollouts_dir, Keep.parse(config.keep_rollouts if ranks.is_main else "none"))
    monitor = MismatchMonitor(
        config.monitor,
        config.acceptance,
        path=ctx.stage.path / "mismatch.jsonl" if ranks.is_main else None,
        decode=lambda ids: tokenizer.decode(list(ids)),
    )
    inner = RlvrStep(trainer, rollouts, config, reference=reference, log=log, monitor=monitor)
    step = RlhfStep(trainer, rollouts, inner, guard)
    carried: dict[str, Carried] = {"rollouts": rollouts, "monitor": monitor, "guard": guard}
    if isinstance(grader, RubricGrader | PairwiseGrader):
        carried["judge"] = grader.judge
    keep = keep_checkpoints(ctx, trainer, tokenizer)
    result = fit(trainer, ctx.stage, step, keep=keep, carried=carried, label="rlhf")
    told = finish_policy(ctx, config, trainer, tokenizer, result)
    told |= {"prompts": len(prompts.prompts), "overlong_prompts": prompts.overlong}
    told["guard"] = {"stopped": guard.stopped, "rate": guard.rate, "trips": guard.trips}
    if isinstance(grader, RubricGrader | PairwiseGrader):
        told["judge"] = grader.judge.state()
        grader.judge.close()
    return told


def _check_rlhf(ctx: StageContext, config: RlhfConfig) -> None:
    reward = ctx.recipe.reward
    if config.grader == "reward_model" and reward is None:
        raise RecipeError(
            "there is no reward model", where="rlhf.grader", fix='add a [reward] stage, or set it to "judge"'
        )
    if config.guard.judge and (reward is None or not reward.judge_share):
        raise RecipeError(
            "there is no judge to watch", where="rlhf.guard.judge", fix="set reward.judge_share, for example to 0.5"
        )


def _open_prompts(ctx: StageContext, config: RlhfConfig, tokenizer: Tokenizer) -> OpenPrompts:
    """The training pairs' prompts; in the joint stage with word problems beside them."""
    num_verifiable = round(config.verifiable_share * config.prompts_per_step)
    verifiable = None
    if num_verifiable:
        verifiable = PromptStream(
            repeat_sources(load_corpus(ctx.recipe.data).train, ctx.recipe.data.repeat),
            tokenizer,
            ctx.recipe.data.augment,
            prompts_per_step=num_verifiable,
            seed=derive_seed(ctx.seed, "rlhf", "verifiable"),
        ).batch_at
    return OpenPrompts(
        _load(ctx, tokenizer).train,
        prompts_per_step=max(1, config.prompts_per_step - num_verifiable),
        max_prompt_tokens=ctx.recipe.model.max_position_embeddings - config.max_completion_tokens,
        seed=derive_seed(ctx.seed, "rlhf", "prompts"),
        verifiable=verifiable,
    )


def _graders(ctx: StageContext, config: RlhfConfig, tokenizer: Tokenizer, ranks: Ranks) -> tuple[Grader, Grader | None]:
    """What grades the open prompts, and the held-out judge where the guard watches one."""
    folder = ctx.run.stage("reward").path

    def reward_model(path: Path) -> RewardModelGrader:
        return RewardModelGrader(load_reward_model(path), tokenizer, config)

    judge = reward_model(folder / JUDGE / "checkpoint") if config.guard.judge else None
    if config.grader == "judge":
        assert config.judge is not None
        cache = ctx.stage.path / "judgements.jsonl" if ranks.is_main else None
        if config.judge.mode == "pairwise":
            return PairwiseGrader(PairwiseJudge(config.judge, cache)), judge
        return RubricGrader(RubricJudge(config.judge, cache)), judge
    return reward_model(folder / "checkpoint"), judge


def _load(ctx: StageContext, tokenizer: Tokenizer) -> PreferenceSet:
    config = ctx.recipe.preferences
    longest = ctx.recipe.model.max_position_embeddings
    if config.max_length > longest:
        raise RecipeError(
            f"preferences.max_length = {config.max_length} exceeds the model's context of {longest} tokens",
            where=f"stage {ctx.stage.kind}",
            fix="lower it, or raise model.max_position_embeddings",
        )
    return load_preferences(config, tokenizer, derive_seed(ctx.seed, "preferences"))


def _share_out(pairs: Sequence[EncodedPair], share: float, seed: int) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """The reward model's pairs and the judge's; pairs with equal prompts go the same way."""
    own: list[EncodedPair] = []
    judged: list[EncodedPair] = []
    for pair in pairs:
        mine = Random(derive_seed(seed, *pair.prompt_ids)).random() >= share
        (own if mine else judged).append(pair)
    if share > 0 and (not own or not judged):
        raise DataError(
            f"{len(pairs)} pairs do not suffice for a reward model and a judge",
            where="reward.judge_share",
            fix="add pairs, or set it nearer to 0.5",
        )
    return own, judged


def _fit_reward(
    ctx: StageContext,
    stage: StageDir,
    decoder: Decoder,
    tokenizer: Tokenizer,
    pairs: Sequence[EncodedPair],
    heldout: Sequence[EncodedPair],
) -> tuple[dict[str, Any], list[ScoredPair]]:
    """Fit one reward model in a folder of its own; its numbers, and the scores of the held-out pairs."""
    config = ctx.recipe.reward
    assert config is not None
    label = stage.path.name if stage is not ctx.stage else "reward"
    seed = derive_seed(ctx.seed, label)
    model = reward_model_from(decoder, derive_seed(seed, "head"))
    trainer = Trainer(model, config, open_ranks(ctx.recipe.parallel, ctx.recipe.model))
    stream = PairStream(pairs, batch_pairs=config.batch_pairs, seed=seed)

    def validate() -> Mapping[str, Metric]:
        scored = score_pairs(model, heldout, trainer.ranks)
        right = sum(pair.chosen_reward > pair.rejected_reward for pair in scored)
        return {"validation/accuracy": right / len(scored), "validation/loss": _mean_loss(scored)}

    step = reward_step(trainer, stream.batch_at, config)
    result = fit(trainer, stage, step, validate=validate if heldout else None, label=label)
    with as_written(trainer, config):
        mean, std = reward_scale(score_pairs(model, pairs, trainer.ranks))
        _save_reward(ctx, stage.checkpoint_dir, trainer, tokenizer, result, mean, std)
        scored = score_pairs(model, heldout, trainer.ranks)
    told: dict[str, Any] = {**asdict(result), "reward_mean": mean, "reward_std": std, "train_pairs": len(pairs)}
    if scored:
        told["heldout"] = measure_reward_model(scored, config.num_bins)
        if trainer.is_main:
            write_text(stage.path / "heldout.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in scored))
    return told, scored


def _save_reward(
    ctx: StageContext, path: Path, trainer: Trainer, tokenizer: Tokenizer, result: FitResult, mean: float, std: float
) -> None:
    lineage = {"recipe": ctx.recipe.name, "stage": "reward", "steps": result.steps, "seed": ctx.seed}
    lineage |= {"reward_mean": mean, "reward_std": std}
    model = trainer.ranks.whole(trainer.decoder)
    if model is None:
        return
    dtype = getattr(torch, trainer.config.checkpoint_dtype)
    save_checkpoint(path, model, tokenizer=tokenizer, extra=lineage, dtype=dtype)


def _mean_loss(scored: Sequence[ScoredPair]) -> float:
    margins = torch.tensor([pair.chosen_reward - pair.rejected_reward for pair in scored])
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def _agreement(first: Sequence[ScoredPair], second: Sequence[ScoredPair]) -> dict[str, Any]:
    """Share of pairs that two models order alike."""
    alike = [
        (a.chosen_reward > a.rejected_reward) == (b.chosen_reward > b.rejected_reward)
        for a, b in zip(first, second, strict=True)
    ]
    return accuracy(alike).to_dict()
