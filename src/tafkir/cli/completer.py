"""Builds the in-process engine of a checkpoint, exact or quantized; what stages get as `build_completer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tafkir.errors import CheckpointError
from tafkir.records import POLICY_STAGES, StageName

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine
    from tafkir.recipe.rollout import RolloutConfig
    from tafkir.recipe.schema import Recipe

__all__ = ["CompleterBuilder", "build_completer", "checkpoint_of", "completer_builder"]

# Stages hand over whole batches of rollouts; nobody waits for a single one.
_MAX_BATCH = 256


@dataclass(frozen=True, slots=True)
class CompleterBuilder:
    """What a stage gets to build completers with: `rollout` is what its own table says, for calls without one.

    With `served`, checkpoints compute as engines serve them: inputs of matrices are rounded where theirs say so.
    `kv_cache` is the number format of their caches.
    """

    rollout: RolloutConfig | None
    seed: int
    served: bool = False
    kv_cache: Literal["auto", "fp8", "nvfp4"] = "auto"

    def __call__(self, checkpoint: Path, rollout: RolloutConfig | None = None) -> Engine:
        return build_completer(
            checkpoint, rollout or self.rollout, seed=self.seed, served=self.served, kv_cache=self.kv_cache
        )


def completer_builder(recipe: Recipe, kind: StageName) -> CompleterBuilder:
    """The builder of a stage; a stage that does not roll out has exact engines."""
    served = kind == "eval" and recipe.eval is not None and recipe.eval.activations == "quantized"
    kv_cache = recipe.eval.kv_cache if kind == "eval" and recipe.eval is not None else "auto"
    return CompleterBuilder(getattr(getattr(recipe, kind), "rollout", None), recipe.seed, served, kv_cache)


def build_completer(
    checkpoint: Path,
    rollout: RolloutConfig | None = None,
    *,
    seed: int = 0,
    served: bool = False,
    kv_cache: Literal["auto", "fp8", "nvfp4"] = "auto",
) -> Engine:
    """An engine with the weights and the tokenizer of a checkpoint folder.

    Args:
        rollout: what its weights become on their way in; None leaves them as they are.
        seed: of the noise in them.
        served: round the inputs of matrices that the checkpoint has in NVFP4 together with them; not for rollouts.
        kv_cache: number format of the cache; not for rollouts, which keep theirs exact.

    Raises:
        CheckpointError: the folder is missing or damaged.
        DataError: it has no tokenizer.
        RecipeError: the model cannot do what `rollout` asks for.
    """
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.serve.loading import build_engine

    tokenizer = Tokenizer.load(checkpoint)
    if rollout is None or (rollout.is_exact and not rollout.replay_experts):
        return build_engine(checkpoint, tokenizer, None, max_batch=_MAX_BATCH, served=served, kv_cache=kv_cache)
    return _build_rollout_engine(checkpoint, tokenizer, rollout, seed)


def _build_rollout_engine(checkpoint: Path, tokenizer: Tokenizer, rollout: RolloutConfig, seed: int) -> Engine:
    from tafkir.checkpoint.load import load_checkpoint
    from tafkir.engine.engine import Engine
    from tafkir.quant.fake import FakeQuantizer
    from tafkir.quant.rollout import RolloutWeights, prepare_decoder

    decoder = prepare_decoder(load_checkpoint(checkpoint).decoder, rollout)
    quantizer = FakeQuantizer(decoder, rollout.quantize) if rollout.quantize else None
    engine = Engine(
        decoder,
        eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
        max_batch=_MAX_BATCH,
        tokenizer=tokenizer,
        prepare_weights=None if rollout.is_exact else RolloutWeights(rollout, seed, quantizer),
        record_experts=True,
    )
    engine.load_weights(decoder.state_dict().items(), 0)
    return engine


def checkpoint_of(name: str) -> Path:
    """The checkpoint folder that a person means: a folder, a bundled name, or a run, whose last one is taken.

    Raises:
        CheckpointError: there is none.
    """
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.runlog.rundir import RunDir

    folder = find_checkpoint(name)
    run = RunDir(folder)
    if not run.stages_dir.is_dir():
        return folder
    for kind in reversed(POLICY_STAGES):
        if (checkpoint := run.stage(kind).checkpoint_dir).is_dir():
            return checkpoint
    raise CheckpointError("this run has no checkpoint yet", where=name, fix="finish it with `tafkir run`")
