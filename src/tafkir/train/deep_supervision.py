"""Deep supervision of the tiny recursive model (arXiv 2510.04871, section 4): one optimiser step a supervision step.

A batch of puzzles stays from step to step with its states y and z. A puzzle whose halting head says solved, or whose
steps are used up, makes room for the next one, whose states begin anew.

Shapes: B batch, L cells, S positions, D hidden, V symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.data.puzzles.format import PAD
from tafkir.data.puzzles.sets import Samples
from tafkir.models.trm import Trm, TrmOutput, TrmState
from tafkir.ops.stable_max import IGNORE_INDEX, stable_max_loss
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.trm import TrmConfig
from tafkir.runlog.metrics import Metric
from tafkir.train.ema import WeightAverage
from tafkir.train.loop import StepOutput, check_norm, set_learning_rates
from tafkir.train.optim import SparseSignSgd, build_optimizers
from tafkir.train.state import latest_state, load_state, load_totals, save_state

__all__ = ["Carry", "RecursiveTrainer", "TakeSamples", "deep_supervision_step", "token_losses"]

TakeSamples = Callable[[int, int], Samples]
"""The training samples from a number on, so many of them; a function of the two numbers alone."""

_PUZZLE_TABLE = "puzzle_table.weight"


class Carry(nn.Module):
    """What goes from one step to the next: the puzzles of the batch, their states, and how many were drawn.

    Buffers, so that a training state holds them bit for bit.
    """

    y: Tensor
    z: Tensor
    steps: Tensor
    halted: Tensor
    inputs: Tensor
    labels: Tensor
    puzzle_ids: Tensor
    drawn: Tensor

    def __init__(self, model: Trm, batch_size: int) -> None:
        super().__init__()
        for name, value in zip("yz", model.start(batch_size), strict=True):
            self.register_buffer(name, value.clone())
        self.register_buffer("steps", torch.zeros(batch_size, dtype=torch.int64))
        self.register_buffer("halted", torch.ones(batch_size, dtype=torch.bool))
        for name in ("inputs", "labels"):
            self.register_buffer(name, torch.zeros(batch_size, model.shape.sequence_length, dtype=torch.uint8))
        self.register_buffer("puzzle_ids", torch.zeros(batch_size, dtype=torch.int64))
        self.register_buffer("drawn", torch.tensor(0))

    @torch.no_grad()
    def refill(self, model: Trm, take: TakeSamples) -> None:
        """Put the next samples in the places of halted ones, with fresh states."""
        places = self.halted.nonzero().squeeze(1)
        if not len(places):
            return
        samples = take(int(self.drawn), len(places))
        for own, new in ((self.inputs, samples.inputs), (self.labels, samples.labels), (self.puzzle_ids, samples[2])):
            own[places] = torch.from_numpy(new).to(own.device)
        for own, start in zip((self.y, self.z), model.start(len(places)), strict=True):
            own[places] = start
        self.steps[places] = 0
        self.drawn += len(places)


class RecursiveTrainer:
    """A recursive model with its carry, its optimisers, the average of its weights and the best of them so far.

    Args:
        model: on its device.
        config: the recipe's `[trm]`.
    """

    def __init__(self, model: Trm, config: TrmConfig) -> None:
        self.model, self._config = model, config
        model.dtype, model.recompute = getattr(torch, config.precision), config.recompute
        device = model.y_init.device
        self.module = nn.ModuleDict({"model": model, "carry": Carry(model, config.batch_size)}).to(device)
        # The reference decays the one bias, too.
        self.optimizers = build_optimizers(model, config, decay_vectors=True)
        if model.puzzle_table is not None:
            table = model.puzzle_table
            rate = config.puzzle_learning_rate
            self.optimizers.append(SparseSignSgd(table.weight, table.touched, rate, config.puzzle_weight_decay))
            self.optimizers[-1].param_groups[0]["peak_lr"] = rate
        ema = config.ema
        self.average = WeightAverage(model, ema.decay, warmup=ema.warmup, skip={_PUZZLE_TABLE}) if ema else None
        self._best: nn.Module | None = None
        if config.select == "best":
            self._best = _Snapshot(model)
            self.module["best"] = self._best

    @property
    def config(self) -> TrmConfig:
        return self._config

    @property
    def is_main(self) -> bool:
        return True

    @property
    def carry(self) -> Carry:
        carry = self.module["carry"]
        assert isinstance(carry, Carry)
        return carry

    def set_step(self, step: int) -> float:
        return set_learning_rates(self.optimizers, step, self._config)

    def load_state(self, folder: Path) -> tuple[int, dict[str, float], dict[str, Any]]:
        path = latest_state(folder)
        if path is None:
            return 0, {}, {}
        return load_state(path, self.module, self.optimizers, self.average), load_totals(path), {}

    def save_state(self, folder: Path, step: int, totals: Mapping[str, float], carried: Mapping[str, Any]) -> None:
        save_state(folder, self.module, self.optimizers, step, totals, self.average, carried)

    def update(self, where: str) -> float:
        """Clip, step the optimisers, average; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._config.max_grad_norm)
        check_norm(float(norm), where)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return float(norm)

    def keep_if_best(self, score: tuple[float, float]) -> None:
        """Remember the present weights where no earlier ones scored as high; the average's, inside `applied()`."""
        if isinstance(self._best, _Snapshot) and score > self._best.found():
            self._best.take(self.model, score)

    def use_best(self) -> None:
        """Give the model the weights that scored best, where they are kept and there was a score."""
        if isinstance(self._best, _Snapshot):
            self._best.give(self.model)


class _Snapshot(nn.Module):
    """A copy of a model's weights, with the score that it was taken at."""

    score: Tensor

    def __init__(self, model: Trm) -> None:
        super().__init__()
        self.register_buffer("score", torch.full((2,), -1.0, dtype=torch.float64))
        self._names = {name: name.replace(".", "/") for name in model.state_dict()}
        for name, value in model.state_dict().items():
            self.register_buffer(self._names[name], value.detach().clone())

    def found(self) -> tuple[float, float]:
        first, second = self.score.tolist()
        return first, second

    @torch.no_grad()
    def take(self, model: Trm, score: tuple[float, float]) -> None:
        self.score.copy_(torch.tensor(score, dtype=torch.float64))
        for name, value in model.state_dict().items():
            self.get_buffer(self._names[name]).copy_(value)

    @torch.no_grad()
    def give(self, model: Trm) -> None:
        if self.found()[0] >= 0:
            for name, value in model.state_dict().items():
                value.copy_(self.get_buffer(self._names[name]))


def token_losses(config: TrmConfig, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """The mean loss over the labelled cells of each puzzle, float32 [B]; labels are int64 with IGNORE_INDEX."""
    if config.loss == "stable_max":
        loss_BL = stable_max_loss(logits_BLV, labels_BL)
    else:
        logits_BVL = logits_BLV.float().transpose(1, 2)
        loss_BL = F.cross_entropy(
            logits_BVL, labels_BL, ignore_index=IGNORE_INDEX, label_smoothing=config.label_smoothing, reduction="none"
        )
    return loss_BL.sum(1) / (labels_BL != IGNORE_INDEX).sum(1).clamp(min=1)


def deep_supervision_step(
    trainer: RecursiveTrainer, take: TakeSamples, *, seed: int, label: str
) -> Callable[[int], StepOutput]:
    """A step function: one supervision step of every puzzle in the carry, its loss back, one update, halting.

    Args:
        take: training samples by number.
        seed: of the exploration in halting.
        label: named in errors.
    """
    config, model, carry = trainer.config, trainer.model, trainer.carry

    def step(step: int) -> StepOutput:
        model.train()
        carry.refill(model, take)
        sums: dict[str, float] = {}
        q_halt_B = torch.empty(config.batch_size)
        right_B = torch.empty(config.batch_size, dtype=torch.bool)
        for rows in torch.arange(config.batch_size, device=carry.y.device).chunk(config.micro_batches):
            out, labels_BL = _forward(model, carry, rows, config.depth_at(step))
            solved, found = _backward(config, out, labels_BL)
            carry.y[rows], carry.z[rows] = out.state
            q_halt_B[rows], right_B[rows] = out.q_halt.detach().cpu(), solved.cpu()
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
        norm = trainer.update(f"{label} step {step + 1}")
        means = {name: value / config.batch_size for name, value in sums.items()}
        means = {name: value / config.batch_size for name, value in sums.items()}
        metrics: dict[str, Metric] = {f"train/{name}": value for name, value in means.items()}
        metrics |= {"train/grad_norm": norm, **_halt(config, model, carry, q_halt_B, right_B, derive_seed(seed, step))}
        shown = {"loss": means["loss"], "cells": means["cells"]}
        return StepOutput(metrics=metrics, tokens=carry.inputs.numel(), shown=shown)

    return step


def _forward(model: Trm, carry: Carry, rows: Tensor, depth: tuple[int, int]) -> tuple[TrmOutput, Tensor]:
    """One supervision step of some rows of the carry, and their labels."""
    labels_BL = carry.labels[rows].long()
    state = TrmState(carry.y[rows], carry.z[rows])
    out = model(state, carry.inputs[rows].long(), carry.puzzle_ids[rows], depth=depth)
    return out, labels_BL.where(labels_BL != PAD, IGNORE_INDEX)


def _backward(config: TrmConfig, out: TrmOutput, labels_BL: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Send the loss back; returns which puzzles are solved [B], and sums over them."""
    with torch.no_grad():
        known_BL = labels_BL != IGNORE_INDEX
        right_BL = out.logits.argmax(-1) == labels_BL
        solved_B = (right_BL | ~known_BL).all(1)
        cells = (right_BL.sum(1) / known_BL.sum(1).clamp(min=1)).sum()
    token_B = token_losses(config, out.logits, labels_BL)
    q_B = F.binary_cross_entropy_with_logits(out.q_halt, solved_B.float(), reduction="none")
    loss = (token_B + config.q_loss_weight * q_B).sum()
    (loss / config.batch_size).backward()
    sums = {"loss": loss, "token_loss": token_B.sum(), "q_loss": q_B.sum(), "cells": cells}
    return solved_B, {name: value.item() for name, value in sums.items()}


@torch.no_grad()
def _halt(
    config: TrmConfig, model: Trm, carry: Carry, q_halt_B: Tensor, solved_B: Tensor, seed: int
) -> dict[str, Metric]:
    """Decide which puzzles are done: out of steps, or taken for solved and not kept on by exploration."""
    most = model.shape.max_supervision_steps
    carry.steps += 1
    steps_B = carry.steps.cpu()
    halted_B = steps_B >= most
    if config.act and most > 1:
        generator = torch.Generator().manual_seed(seed)
        explores_B = torch.rand(len(q_halt_B), generator=generator) < config.halt_exploration
        least_B = explores_B * torch.randint(2, most + 1, q_halt_B.shape, generator=generator)
        halted_B = (halted_B | (q_halt_B > 0)) & (steps_B >= least_B)
    carry.halted.copy_(halted_B)
    count = int(halted_B.sum())
    metrics: dict[str, Metric] = {"train/halted": count}
    if count:
        metrics["train/exact"] = float(solved_B[halted_B].float().mean())
        metrics["train/supervision_steps"] = float(steps_B[halted_B].float().mean())
    return metrics
