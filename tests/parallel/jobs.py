"""What the test processes do: the same tiny training, whatever the number of ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from tafkir.checkpoint.load import load_checkpoint, load_config, outline_checkpoint
from tafkir.data.packing import Document
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.schema import ParallelConfig, PretrainConfig
from tafkir.runlog.metrics import read_jsonl
from tafkir.runlog.rundir import StageDir
from tafkir.train.language import language_step, validation_loss
from tafkir.train.loop import StepOutput, Trainer, fit
from tafkir.train.mtp import measure_mtp
from tafkir.train.ranks import open_ranks

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
    stop: int | None = None,
    model: ModelConfig = MODEL,
    source: Path | None = None,
    longest: int = 19,
) -> dict[str, Any]:
    """Train, resuming from `folder`; returns the metric rows, the totals and (on rank 0) the weights that came out.

    Args:
        stop: end before this step, counted from 0, and return nothing.
        source: checkpoint to start from; several ranks read their parts of it.
        longest: tokens of a document.
    """
    config = PretrainConfig.model_validate(
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
        trainer = Trainer(build_decoder(model, seed=3), config, ranks)
    elif ranks.sizes.world == 1:
        trainer = Trainer(load_checkpoint(source).decoder, config, ranks)
    else:
        trainer = Trainer(outline_checkpoint(source), config, ranks, source)
    heldout = documents(1000)[:5]
    stage = StageDir(folder, "pretrain")
    one_step = language_step(trainer, partial(documents, longest=longest), label="pretrain")

    def step(number: int) -> StepOutput:
        if number == stop:
            raise _Stop
        return one_step(number)

    def validate() -> dict[str, float]:
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
