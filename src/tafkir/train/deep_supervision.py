"""Deep supervision of the tiny recursive model (arXiv 2510.04871, section 4): one optimiser step a supervision step.

A batch of puzzles stays from step to step with its states y and z. A puzzle whose halting head says solved, or whose
steps are used up, makes room for the next one, whose states begin anew.

Shapes: B batch, L cells, S positions, D hidden, V symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from tafkir.train.replicas import OneReplica, Replicas
from tafkir.train.state import latest_state, load_state, load_totals, save_state
from tafkir.train.teacher import SoftTeacher

__all__ = ["Carry", "RecursiveTrainer", "TakeSamples", "deep_supervision_step", "token_losses"]

TakeSamples = Callable[[int, int], Samples]
"""The training samples from a number on, so many of them; a function of the two numbers alone."""

_PUZZLE_TABLE = "puzzle_table.weight"
_BY_ROW = ("y", "z", "inputs", "labels", "puzzle_ids", "targets")


class Carry(nn.Module):
    """What goes from one step to the next: the puzzles of the batch, their states, and how many were drawn.

    Buffers, so that a training state holds them bit for bit. Puzzles and states are those of this process's rows; the
    steps that each puzzle took and which are done, everyone knows of all rows, and so draws the same samples.

    Args:
        batch_size: rows of all processes together.
        replicas: the processes that share them.
        teacher: what it says of each puzzle stays with the puzzle, float32 [B, L, V].
        stagger: the first puzzles have some of their steps behind them. Where none halts early, rows that begin
            together would stay together, and each optimiser step would train one supervision step alone.
    """

    y: Tensor
    z: Tensor
    steps: Tensor
    halted: Tensor
    inputs: Tensor
    labels: Tensor
    puzzle_ids: Tensor
    drawn: Tensor
    targets: Tensor | None

    def __init__(
        self,
        model: Trm,
        batch_size: int,
        replicas: Replicas | None = None,
        teacher: SoftTeacher | None = None,
        *,
        stagger: bool = False,
    ) -> None:
        super().__init__()
        self._teacher, self._stagger = teacher, stagger
        self._replicas: Replicas = replicas or OneReplica()
        self.batch_size, self.rows = batch_size, self._replicas.rows(batch_size)
        own = self.rows.stop - self.rows.start
        for name, value in zip("yz", model.start(own), strict=True):
            self.register_buffer(name, value.clone())
        self.register_buffer("steps", torch.zeros(batch_size, dtype=torch.int64))
        self.register_buffer("halted", torch.ones(batch_size, dtype=torch.bool))
        for name in ("inputs", "labels"):
            self.register_buffer(name, torch.zeros(own, model.shape.sequence_length, dtype=torch.uint8))
        self.register_buffer("puzzle_ids", torch.zeros(own, dtype=torch.int64))
        self.register_buffer("drawn", torch.tensor(0))
        shape = model.shape
        targets = torch.zeros(own, shape.sequence_length, shape.vocab_size) if teacher is not None else None
        self.register_buffer("targets", targets)

    @torch.no_grad()
    def refill(self, model: Trm, take: TakeSamples) -> None:
        """Put the next samples in the places of halted ones, with fresh states."""
        halted = self.halted.nonzero().squeeze(1)
        places = halted[(halted >= self.rows.start) & (halted < self.rows.stop)] - self.rows.start
        if len(places):
            # Samples go to the halted rows in their order, whoever holds them.
            before = (halted < self.rows.start).sum()
            samples = take(int(self.drawn + before), len(places))
            for own, new in (
                (self.inputs, samples.inputs),
                (self.labels, samples.labels),
                (self.puzzle_ids, samples.puzzle_ids),
            ):
                own[places] = torch.from_numpy(new).to(own.device)
            for own, start in zip((self.y, self.z), model.start(len(places)), strict=True):
                own[places] = start
            if self._teacher is not None and self.targets is not None:
                self.targets[places] = self._teacher.logits(self.inputs[places])
        self.steps[halted] = 0
        if self._stagger and not self.drawn:
            self.steps += torch.arange(self.batch_size, device=self.steps.device) % model.shape.max_supervision_steps
        self.drawn += len(halted)

    @contextmanager
    def whole(self, *, read: bool) -> Iterator[None]:
        """Within the block the rows of all processes are there, as a state holds them.

        Args:
            read: the block fills the rows, and each process keeps its own of them; otherwise it writes them.
        """
        if self._replicas.count == 1:
            yield
            return
        kept = {name: own for name, own in self.named_buffers() if name in _BY_ROW}
        for name, own in kept.items():
            fresh = own.new_empty(self.batch_size, *own.shape[1:])
            setattr(self, name, fresh if read else self._replicas.gather_rows(own, self.batch_size))
        try:
            yield
        finally:
            for name, own in kept.items():
                setattr(self, name, self.get_buffer(name)[self.rows].clone() if read else own)


class RecursiveTrainer:
    """A recursive model with its carry, its optimisers, the average of its weights and the best of them so far.

    Args:
        model: on its device.
        config: the recipe's `[trm]`.
        replicas: the processes that train together, each with a copy of the model.
        teacher: whom the model imitates.
    """

    def __init__(
        self, model: Trm, config: TrmConfig, replicas: Replicas | None = None, teacher: SoftTeacher | None = None
    ) -> None:
        self.model, self._config, self.teacher = model, config, teacher
        self.replicas: Replicas = replicas or OneReplica()
        model.dtype, model.recompute = getattr(torch, config.precision), config.recompute
        device = model.y_init.device
        if teacher is not None:
            teacher.to(device)
        carry = Carry(model, config.batch_size, self.replicas, teacher, stagger=not config.act)
        self.module = nn.ModuleDict({"model": model, "carry": carry}).to(device)
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
        return self.replicas.is_main

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
        with self.carry.whole(read=True):
            return load_state(path, self.module, self.optimizers, self.average), load_totals(path), {}

    def save_state(self, folder: Path, step: int, totals: Mapping[str, float], carried: Mapping[str, Any]) -> None:
        # One file, whoever wrote it: any number of processes goes on from it.
        with self.carry.whole(read=False):
            if self.is_main:
                save_state(folder, self.module, self.optimizers, step, totals, self.average, carried)

    def update(self, where: str) -> float:
        """Sum over the processes, clip, step the optimisers, average; returns the gradient norm before clipping."""
        self.replicas.sum_gradients(self.model.parameters())
        self._share_touched()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._config.max_grad_norm)
        check_norm(float(norm), where)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return float(norm)

    def _share_touched(self) -> None:
        """Let every process move all rows of the table of puzzle vectors that the batch has touched."""
        table = self.model.puzzle_table
        if table is None or self.replicas.count == 1:
            return
        rows, copies = zip(*table.touched, strict=True)
        gathered = [
            self.replicas.gather_rows(torch.cat(own), self._config.batch_size)
            for own in (rows, [copy.grad for copy in copies])
        ]
        stand_in = torch.empty_like(gathered[1])
        stand_in.grad = gathered[1]
        table.touched[:] = [(gathered[0], stand_in)]

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
    config, model, carry, replicas = trainer.config, trainer.model, trainer.carry, trainer.replicas

    def step(step: int) -> StepOutput:
        model.train()
        carry.refill(model, take)
        sums: dict[str, float] = {}
        own = len(carry.y)
        q_halt_B = torch.empty(own)
        right_B = torch.empty(own, dtype=torch.bool)
        for rows in torch.arange(own, device=carry.y.device).chunk(config.micro_batches):
            out, labels_BL = _forward(model, carry, rows, config.depth_at(step))
            solved, found = _backward(config, out, labels_BL, _imitation(trainer, out, rows))
            carry.y[rows], carry.z[rows] = out.state
            q_halt_B[rows], right_B[rows] = out.q_halt.detach().cpu(), solved.cpu()
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
        norm = trainer.update(f"{label} step {step + 1}")
        sums = dict(zip(sums, replicas.sum(list(sums.values())), strict=True))
        means = {name: value / config.batch_size for name, value in sums.items()}
        q_halt_B, right_B = (replicas.gather_rows(value, config.batch_size) for value in (q_halt_B, right_B))
        metrics: dict[str, Metric] = {f"train/{name}": value for name, value in means.items()}
        metrics |= {"train/grad_norm": norm, **_halt(config, model, carry, q_halt_B, right_B, derive_seed(seed, step))}
        shown = {"loss": means["loss"], "cells": means["cells"]}
        return StepOutput(metrics=metrics, tokens=config.batch_size * carry.inputs.shape[1], shown=shown)

    return step


def _forward(model: Trm, carry: Carry, rows: Tensor, depth: tuple[int, int]) -> tuple[TrmOutput, Tensor]:
    """One supervision step of some rows of the carry, and their labels."""
    labels_BL = carry.labels[rows].long()
    state = TrmState(carry.y[rows], carry.z[rows])
    out = model(state, carry.inputs[rows].long(), carry.puzzle_ids[rows], depth=depth)
    return out, labels_BL.where(labels_BL != PAD, IGNORE_INDEX)


def _imitation(trainer: RecursiveTrainer, out: TrmOutput, rows: Tensor) -> tuple[float, Tensor] | None:
    """How much the distance to the teacher counts, and what it is [B]; None without a teacher."""
    teacher, targets = trainer.teacher, trainer.carry.targets
    if teacher is None or targets is None:
        return None
    return teacher.weight, teacher.distance(out.logits, targets[rows], trainer.carry.inputs[rows])


def _backward(
    config: TrmConfig, out: TrmOutput, labels_BL: Tensor, imitation: tuple[float, Tensor] | None
) -> tuple[Tensor, dict[str, float]]:
    """Send the loss back; returns which puzzles are solved [B], and sums over them."""
    with torch.no_grad():
        known_BL = labels_BL != IGNORE_INDEX
        right_BL = out.logits.argmax(-1) == labels_BL
        solved_B = (right_BL | ~known_BL).all(1)
        cells = (right_BL.sum(1) / known_BL.sum(1).clamp(min=1)).sum()
    token_B = token_losses(config, out.logits, labels_BL)
    q_B = F.binary_cross_entropy_with_logits(out.q_halt, solved_B.float(), reduction="none")
    sums = {"token_loss": token_B.sum(), "q_loss": q_B.sum(), "cells": cells}
    if imitation is not None:
        weight, distance_B = imitation
        token_B = (1 - weight) * token_B + weight * distance_B
        sums["teacher_loss"] = distance_B.sum()
    loss = (token_B + config.q_loss_weight * q_B).sum()
    (loss / config.batch_size).backward()
    sums["loss"] = loss
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
