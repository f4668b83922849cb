"""The residual laboratory: twins with another residual at growing depth, their losses, gradients and gains.

Source: arXiv 2512.24880, figures 2, 3 and 5 to 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tafkir.data.packing import Document, pack_documents
from tafkir.data.text import TextStream, heldout_windows, read_text, split_text
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.residual import Gains, composed_gains, observe_res_maps, single_gains
from tafkir.ops.device import choose_device
from tafkir.recipe.lab import ResidualLabConfig
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.runlog.metrics import Metric
from tafkir.runlog.rundir import StageDir
from tafkir.train.lab import fit_variant, run_variants
from tafkir.train.language import language_loss, language_step, validation_loss
from tafkir.train.loop import FitResult, Trainer, fit
from tafkir.train.ranks import OneProcess

__all__ = ["Variant", "gain_metrics", "list_variants", "run_residual_lab"]

# Held-out windows whose tokens the gains are averaged over; the paper takes one sequence.
_GAIN_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Variant:
    """One training of the lab."""

    kind: str
    depth: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder below the stage's `variants`."""
        return f"{self.kind}-{self.depth:03d}-seed{self.seed}"

    @property
    def group(self) -> str:
        """Its residual: how long a block takes."""
        return self.kind

    @property
    def size(self) -> float:
        """Its blocks."""
        return self.depth

    def shape(self, model: ModelConfig) -> ModelConfig:
        """The recipe's model with the variant's depth and residual."""
        residual = model.residual.model_copy(update={"kind": self.kind})
        return model.model_copy(update={"num_hidden_layers": self.depth, "residual": residual})


def list_variants(config: ResidualLabConfig) -> list[Variant]:
    """All variants in the order in which they run: shallow ones first, twins one after the other."""
    return [
        Variant(kind, depth, seed)
        for seed in range(config.seeds)
        for depth in sorted(config.depths)
        for kind in config.kinds
    ]


def run_residual_lab(ctx: StageContext, config: ResidualLabConfig) -> dict[str, Any]:
    """Train every variant that is not finished yet; each leaves a folder `variants/<name>` of its own.

    Returns:
        The variants' results and their totals. A variant whose loss or gradient stops being finite is not an error:
        its result says at which step it diverged.

    Raises:
        DataError: the text is missing or too short.
    """
    torch.set_num_threads(ctx.recipe.threads)
    train, rest = split_text(read_text(config.text))
    heldout = heldout_windows(rest, sequence_length=config.sequence_length, count=config.validation_sequences)

    def train_variant(variant: Variant, stage: StageDir, place: str) -> dict[str, Any]:
        return _train_variant(ctx, config, variant, (train, heldout), (stage, place))

    return run_variants(ctx, list_variants(config), train_variant)


def _train_variant(
    ctx: StageContext,
    config: ResidualLabConfig,
    variant: Variant,
    text: tuple[bytes, Sequence[Document]],
    where: tuple[StageDir, str],
) -> dict[str, Any]:
    train, heldout = text
    stage, place = where
    # The seeds know nothing of kind and depth: twins share their data and every weight but the residual's.
    decoder = build_decoder(variant.shape(ctx.recipe.model), derive_seed(ctx.seed, "lab", "weights", variant.seed))
    stream = TextStream(
        train,
        sequence_length=config.sequence_length,
        batch_sequences=config.batch_sequences,
        seed=derive_seed(ctx.seed, "lab", "text", variant.seed),
    )
    trainer = Trainer(decoder, config, OneProcess(choose_device(ctx.recipe.parallel.device)))
    step = language_step(trainer, stream.batch_at, label=f"lab {variant.name}")

    def measure() -> dict[str, Metric]:
        return {"validation/loss": validation_loss(decoder, heldout), **gain_metrics(decoder, heldout[:_GAIN_WINDOWS])}

    def run() -> FitResult:
        return fit(trainer, stage, step, validate=measure, label=f"lab {place} {variant.name}")

    return {
        "kind": variant.kind,
        "depth": variant.depth,
        "seed": variant.seed,
        "parameters": decoder.config.num_parameters(),
        **fit_variant(run, stage, variant.name, lambda steps: steps * config.batch_sequences * config.sequence_length),
    }


@torch.no_grad()
def gain_metrics(decoder: Decoder, documents: Sequence[Document]) -> dict[str, Metric]:
    """By how much the residual mappings amplify, averaged over the documents' tokens; nothing for a plain residual.

    Returns:
        `gain/{single,composed}_{forward,backward}`: one number per sublayer, the largest absolute row or column sum
        of its H_res, or of the product from it to the end. `gain/single`, `gain/composed`: the largest of those.
        `gain/log_column`: the largest |ln| of a composed mapping's absolute column sum, which also sees gradients
        that vanish.
    """
    with observe_res_maps(decoder) as res_maps:
        language_loss(decoder, pack_documents(documents))
    if not res_maps:
        return {}
    res_maps = [res.cpu() for res in res_maps]
    composed = composed_gains(res_maps)
    sums = [*composed.backward, *composed.attenuation]
    logs = [abs(math.log(value)) for value in sums if value > 0]
    metrics: dict[str, Metric] = {"gain/log_column": max(logs, default=math.inf)}
    for name, gains in (("single", single_gains(res_maps)), ("composed", composed)):
        metrics |= _named(name, gains)
    return metrics


def _named(name: str, gains: Gains) -> dict[str, Metric]:
    return {
        f"gain/{name}": max(*gains.forward, *gains.backward),
        f"gain/{name}_forward": gains.forward,
        f"gain/{name}_backward": gains.backward,
    }
