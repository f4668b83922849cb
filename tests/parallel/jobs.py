"""What the test processes do: the same tiny training, whatever the number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

from tafkir.checkpoint.load import load_checkpoint, load_config, outline_checkpoint
from tafkir.data.packing import Document
from tafkir.data.preference import EncodedPair, PairStream, PreferencePair
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.reward import RewardModel, reward_model_from
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rlhf import DpoConfig, RewardConfig
from tafkir.recipe.schema import MtpStageConfig, ParallelConfig, PretrainConfig, TrainTable
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import StageDir
from tafkir.train.dpo import KtoReference, dpo_step, measure_dpo, reference_logprobs
from tafkir.train.language import language_step, validation_loss
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.mtp import measure_mtp
from tafkir.train.mtp_distill import distill_step, freeze_all_but_mtp
from tafkir.train.ranks import open_ranks
from tafkir.train.reward_model import reward_step, score_pairs

LEARNING_RATE = 1e-2
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
    n_group=4,
    topk_group=2,
)


LATENT = MODEL.model_copy(
    update={
        "model_type": "deepseek_v3",
        "attention_type": "mla",
        "num_key_value_heads": 4,
        "head_dim": 12,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "rope_interleave": True,
        "use_qk_norm": False,
    }
)
"""The same with latent attention."""


def documents(step: int, longest: int = 19) -> list[Document]:
    """Nine documents of unequal length, some with masked targets; a function of the step."""
    draw = Random(step)
    made: list[Document] = []
    for index in range(9):
        ids = [draw.randrange(MODEL.vocab_size) for _ in range(draw.randrange(3, longest + 1))]
        made.append((ids, [draw.random() < 0.7 for _ in ids] if index % 3 == 0 else None))
    return made


def pairs(step: int, count: int = 9) -> list[EncodedPair]:
    """Preference pairs of unequal length; a function of the step."""
    draw = Random(step)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(MODEL.vocab_size) for _ in range(draw.randrange(2, longest)))

    named = (PreferencePair(f"{step}-{index}", "made", "train", (), "", "") for index in range(count))
    return [EncodedPair(pair, ids(12), ids(9), ids(9)) for pair in named]


Method = Literal["pretrain", "mtp_distill", "reward", "dpo"]
TABLES: dict[Method, type[TrainTable]] = {
    "pretrain": PretrainConfig,
    "mtp_distill": MtpStageConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
}


def fresh(method: Method, model: ModelConfig) -> Decoder:
    decoder = build_decoder(model, seed=3)
    if method == "mtp_distill":
        freeze_all_but_mtp(decoder)
    return reward_model_from(decoder, seed=4) if method == "reward" else decoder


def prefer(trainer: Trainer, config: DpoConfig) -> Callable[[int], StepOutput]:
    """Steps on seven pairs; every second metric row also says what they and two others came to."""
    ranks, made, heldout = trainer.ranks, pairs(5, 7), pairs(6, 2)
    reference_P2, heldout_P2 = (reference_logprobs(trainer.decoder, each, ranks) for each in (made, heldout))
    kto = KtoReference(trainer.decoder, made, ranks) if config.loss == "kto" else None
    one_step = dpo_step(trainer, PairStream(made, batch_pairs=5, seed=1), reference_P2, config, kto)

    def step(number: int) -> StepOutput:
        done = one_step(number)
        told = measure_dpo(trainer.decoder, heldout, heldout_P2, config.model_copy(update={"loss": "ipo"}), None, ranks)
        seen = {f"heldout/{i}": float(value) for i, value in enumerate(torch.cat(told))}
        return replace(done, metrics={**done.metrics, **seen})

    return step


def train_in_float32(folder: Path, parallel: dict[str, int], table: dict[str, Any]) -> dict[str, Any]:
    """`train`, with Muon's iteration in the gradients' own dtype."""
    bfloat16, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.float  # type: ignore[method-assign]
    try:
        return train(folder, parallel, table)
    finally:
        torch.Tensor.bfloat16 = bfloat16  # type: ignore[method-assign]


def read_shards(source: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """Read this rank's part of a checkpoint; bytes read, entries held, and (on rank 0) all weights.

    What is read is counted where the operating system is asked for it.
    """
    model = load_config(source)
    ranks = open_ranks(ParallelConfig.model_validate(parallel), model)
    counted, ask = [0], os.preadv

    def count(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = ask(descriptor, buffers, offset)
        counted[0] += got
        return got

    from torch.distributed.tensor import DTensor

    decoder = outline_checkpoint(source)
    os.preadv = count  # type: ignore[assignment]
    try:
        ranks.shard(decoder, source)
    finally:
        os.preadv = ask
    held = {k: (v.to_local() if isinstance(v, DTensor) else v).numel() for k, v in decoder.state_dict().items()}
    whole = ranks.whole(decoder)
    weights = {k: v.detach().clone() for k, v in whole.state_dict().items()} if whole is not None else None
    return {"bytes": counted[0], "held": held, "weights": weights}


class _Stop(Exception):
    """Ends a training as a kill would, without the wait."""


def train(
    folder: Path,
    parallel: dict[str, int],
    table: dict[str, Any],
    *,
    method: Method = "pretrain",
    stop: int | None = None,
    model: ModelConfig = MODEL,
    source: Path | None = None,
    longest: int = 19,
) -> dict[str, Any]:
    """Train, resuming from `folder`; returns the metric rows, the totals and (on rank 0) the weights that came out.

    Args:
        method: what is trained on what.
        stop: end before this step, counted from 0, and return nothing.
        source: checkpoint to start from; several ranks read their parts of it.
        longest: tokens of a document.
    """
    config = TABLES[method].model_validate(
        {
            "steps": 4,
            "warmup_steps": 1,
            "learning_rate": LEARNING_RATE,
            "micro_batches": 2,
            "log_every": 1,
            "validate_every": 2,
            "save_every": 2,
            **table,
        }
    )
    ranks = open_ranks(ParallelConfig.model_validate(parallel), model)
    if source is None:
        trainer = Trainer(fresh(method, model), config, ranks)
    elif ranks.sizes.world == 1:
        trainer = Trainer(load_checkpoint(source).decoder, config, ranks)
    else:
        trainer = Trainer(outline_checkpoint(source), config, ranks, source)
    heldout = documents(1000)[:5]
    stage = StageDir(folder, "pretrain")
    if isinstance(config, RewardConfig):
        one_step = reward_step(trainer, pairs, config)
    elif isinstance(config, DpoConfig):
        one_step = prefer(trainer, config)
    else:
        build = distill_step if method == "mtp_distill" else language_step
        one_step = build(trainer, partial(documents, longest=longest), label="pretrain")

    def step(number: int) -> StepOutput:
        if number == stop:
            raise _Stop
        return one_step(number)

    def validate() -> dict[str, float]:
        if isinstance(trainer.decoder, RewardModel):
            scored = score_pairs(trainer.decoder, pairs(1000, 5), ranks)
            return {f"validation/{pair.id}": pair.chosen_reward - pair.rejected_reward for pair in scored}
        row = {"validation/loss": validation_loss(trainer.decoder, heldout, batch_size=2, ranks=ranks)}
        return row | (measure_mtp(trainer.decoder, heldout) if model.mtp is not None else {})

    try:
        result = fit(trainer, stage, step, validate=validate, label="pretrain")
    except _Stop:
        return {}
    whole = ranks.whole(trainer.decoder)
    return {
        "rows": list(read_jsonl(stage.metrics_path)) if ranks.is_main else None,
        "tokens": result.tokens,
        "weights": {k: v.detach().clone() for k, v in whole.state_dict().items()} if whole is not None else None,
    }
