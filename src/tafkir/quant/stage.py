"""The `quantize` stage: the checkpoint of the last training stage in fewer bits, and what that has cost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tafkir.errors import RecipeError
from tafkir.ops.native import select_kernels
from tafkir.quant.auto import auto_quantize, read_auto_text
from tafkir.quant.calibrated import write_quantized
from tafkir.quant.texts import familiar_problems
from tafkir.quant.verify import audit_checkpoint, compare_logits, summarize_audit
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.stage import StageContext
from tafkir.records import STAGES
from tafkir.runlog.atomic import write_text

__all__ = ["run_quantize"]

# Problems that no stage draws: training counts their seeds from 0.
_FIRST_STORY, _TOKENS = 2 * 10**9, 4096


def _before_qat(ctx: StageContext) -> Path:
    """The policy that `qat` began with."""
    for kind in reversed(STAGES[: STAGES.index("qat")]):
        if kind not in ("tokenizer", "reward") and getattr(ctx.recipe, kind) is not None:
            return ctx.run.stage(kind).checkpoint_dir
    assert ctx.recipe.base is not None
    return find_checkpoint(ctx.recipe.base)


def run_quantize(ctx: StageContext) -> dict[str, Any]:
    """Quantize the checkpoint before, as the recipe's `[quantize]` says; a killed stage goes on with its shards.

    Returns:
        Bytes before and after, the audit by component, the divergence of both models' predictions on solutions of
        made-up word problems, and what calibration read and found, where there is one. What it does to answers is the
        `eval` stage's business: name `quantize` in `eval.stages`.

    Raises:
        RecipeError: there is no checkpoint before.
        CheckpointError: as `quantize_checkpoint`.
    """
    config = ctx.recipe.quantize
    assert config is not None
    if ctx.previous is None:
        raise RecipeError(
            "there is nothing to quantize", where="quantize", expected="a base, or a stage that trains, before it"
        )
    torch.set_num_threads(ctx.recipe.threads)
    select_kernels(ctx.recipe.kernels)
    began, began_cpu = time.perf_counter(), time.process_time()
    out = ctx.stage.checkpoint_dir
    # Finished, but killed before its result was written: made of the same inputs, and cheap to make again.
    shutil.rmtree(out, ignore_errors=True)
    lineage = {"stage": "quantize", "recipe": ctx.recipe.name}
    chosen = None
    if config.auto is not None:
        chosen = auto_quantize(ctx.previous, config, read_auto_text(ctx.previous, config.auto))
        config = chosen.config
        write_text(ctx.stage.path / "auto.toml", chosen.rules_file(ctx.recipe.name))
    _, calibration = write_quantized(ctx.previous, out, config, lineage=lineage)
    if ctx.recipe.qat is not None and ctx.recipe.qat.baseline:
        untrained = ctx.stage.path / "ptq"
        shutil.rmtree(untrained, ignore_errors=True)
        write_quantized(_before_qat(ctx), untrained, config, lineage=lineage)
    summary = summarize_audit(audit_checkpoint(ctx.previous, out))
    passages = familiar_problems(ctx.previous, _TOKENS, _FIRST_STORY)
    return {
        "preset": config.preset,
        "scheme": config.scheme,
        "scales": config.scale_choice,
        "layout": config.layout,
        **summary,
        "calibration": calibration,
        "auto": chosen.to_dict() if chosen else None,
        "logits": dict(compare_logits(ctx.previous, out, passages)),
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
    }
