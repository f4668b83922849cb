"""The one training loop: resume, step, log, save. A method brings a step function; everything else is here."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tafkir.errors import TrainingError
from tafkir.models.decoder import Decoder, update_expert_bias
from tafkir.native.memory import keep_freed_memory
from tafkir.recipe.schema import TrainTable
from tafkir.runlog.metrics import Metric
from tafkir.runlog.progress import Progress
from tafkir.runlog.rundir import StageDir
from tafkir.train.ema import WeightAverage
from tafkir.train.optim import build_optimizers
from tafkir.train.ranks import OneProcess, Ranks
from tafkir.train.schedule import scheduled_share
from tafkir.train.state import Carried

__all__ = [
    "FitResult",
    "Resumable",
    "StepOutput",
    "Trainer",
    "add_loads",
    "check_norm",
    "fit",
    "peak_rss_bytes",
    "router_metrics",
    "set_learning_rates",
]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step function reports: deterministic numbers, clock-dependent ones, and what to show beside the bar.

    With a `stop`, the loop saves the state after this step and raises it, unless the step was the last.
    """

    metrics: Mapping[str, Metric]
    timings: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    shown: Mapping[str, float] = field(default_factory=dict)
    stop: TrainingError | None = None


class Resumable(Protocol):
    """What `fit` needs of a model with its optimisers: learning rates by step, and a state to go on from."""

    @property
    def config(self) -> TrainTable: ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        ...

    def set_step(self, step: int) -> float:
        """Set the learning rates of step `step`; returns the main one."""
        ...

    def load_state(self, folder: Path) -> tuple[int, dict[str, float], dict[str, Any]]:
        """Restore the newest state, if there is one; returns finished steps, what they came to, what they carried."""
        ...

    def save_state(self, folder: Path, step: int, totals: Mapping[str, float], carried: Mapping[str, Any]) -> None:
        """Write the resumable state after `step` steps."""
        ...


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], step: int, config: TrainTable) -> float:
    """Every group's learning rate of step `step`, from its peak; returns that of the recipe's `learning_rate`."""
    share = scheduled_share(step, config.steps, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
    return config.learning_rate * share


def check_norm(norm: float, where: str) -> float:
    """The gradient norm, which must be finite.

    Raises:
        TrainingError: it is not; `where` is named.
    """
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm is {norm}", where=where, fix="lower the learning rate, then run the command again"
        )
    return norm


class Trainer:
    """A decoder with its optimisers, and the average of its weights where one is asked for: what a step changes.

    Args:
        source: where a decoder on the meta device is read from; see `Ranks.shard`.
    """

    def __init__(
        self, decoder: Decoder, config: TrainTable, ranks: Ranks | None = None, source: Path | None = None
    ) -> None:
        self.decoder = decoder
        self.config = config
        self.ranks: Ranks = ranks or OneProcess()
        self.ranks.shard(decoder, source)
        self.optimizers = self.ranks.adapt(build_optimizers(decoder, config))
        self.average = WeightAverage(decoder, config.ema.decay, warmup=config.ema.warmup) if config.ema else None

    def set_step(self, step: int) -> float:
        """Set the learning rates of step `step`; returns AdamW's."""
        return set_learning_rates(self.optimizers, step, self.config)

    @property
    def is_main(self) -> bool:
        return self.ranks.is_main

    def load_state(self, folder: Path) -> tuple[int, dict[str, float], dict[str, Any]]:
        done, totals = self.ranks.load_state(folder, self.decoder, self.optimizers, self.average)
        return done, totals, self.ranks.load_carried(folder)

    def save_state(self, folder: Path, step: int, totals: Mapping[str, float], carried: Mapping[str, Any]) -> None:
        self.ranks.save_state(folder, self.decoder, self.optimizers, self.average, step, totals, carried)

    def update(self, loads: list[Tensor], *, where: str) -> float:
        """Clip, step the optimiser, balance the routers, average; returns the gradient norm before clipping.

        Args:
            loads: tokens per expert, one tensor (E,) per MoE layer, counted over the whole optimiser step; none
                leaves the decoder's routers as they are.
            where: named in the error when the gradient is not finite.
        """
        norm = check_norm(self.ranks.clip_gradients(self.decoder, self.config.max_grad_norm), where)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if loads and self.config.expert_bias_update_rate > 0:
            update_expert_bias(self.decoder, loads, self.config.expert_bias_update_rate)
        if self.average is not None:
            self.average.update()
        return norm


@dataclass(frozen=True, slots=True)
class FitResult:
    """Totals of a stage, what processes that were killed did up to their last state included."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had when it started this process, too
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_loads(total: list[Tensor], loads: list[Tensor]) -> list[Tensor]:
    """Sum of expert loads over micro-batches, layer by layer; an empty total is zero."""
    return [a + b for a, b in zip(total, loads, strict=True)] if total else list(loads)


def router_metrics(loads: list[Tensor]) -> dict[str, Metric]:
    """Load shares per MoE layer, their entropy as a share of the uniform one, and how far the fullest expert is over.

    `max_violation` is (largest load - mean load) / mean load (MaxVio of arXiv 2408.15664): 0 when all experts share
    alike. It stands per layer and as the mean over layers; `load_max` is the worst layer's load factor.
    """
    metrics: dict[str, Metric] = {}
    entropies, peaks = [], []
    for layer, load in enumerate(loads):
        share = load.cpu().double() / load.sum().clamp(min=1)
        metrics[f"router/load/{layer}"] = [round(float(x), 6) for x in share]
        entropies.append(float(torch.special.entr(share).sum() / math.log(load.numel())))
        peaks.append(float(share.max() * load.numel()))
        metrics[f"router/load_entropy/{layer}"] = entropies[-1]
        metrics[f"router/max_violation/{layer}"] = peaks[-1] - 1
    if loads:
        metrics["router/load_entropy"] = sum(entropies) / len(entropies)
        metrics["router/load_max"] = max(peaks)
        metrics["router/max_violation"] = sum(peaks) / len(peaks) - 1
    return metrics


def _timings_row(output: StepOutput, step_s: float, cpu_s: float) -> dict[str, float]:
    return {
        "time/step_s": step_s,
        "time/cpu_s": cpu_s,
        "time/tokens_per_s": output.tokens / step_s,
        "memory/peak_rss_bytes": peak_rss_bytes(),
        **output.timings,
    }


def _save_state(trainer: Resumable, stage: StageDir, carriers: Mapping[str, Carried], so_far: FitResult) -> None:
    carried = {name: state for name, each in carriers.items() if (state := each.state()) is not None}
    trainer.save_state(stage.state_dir, so_far.steps, asdict(so_far), carried)


class _Rows:
    """Where the numbers of a stage go: what equal runs share, what depends on the clock, and both to trackers."""

    def __init__(self, stage: StageDir, start: int) -> None:
        self._metrics, self._timings = stage.metrics(), stage.timings()
        self._metrics.truncate_to(start)
        self._timings.truncate_to(start)
        self._trackers = stage.trackers(start)

    def write(self, done: int, metrics: Mapping[str, Metric], timings: Mapping[str, float]) -> None:
        self._metrics.write(done, metrics)
        self._timings.write(done, timings)
        for tracker in self._trackers:
            tracker.write(done, {**metrics, **timings})

    def close(self) -> None:
        for each in (self._metrics, self._timings, *self._trackers):
            each.close()


def fit(
    trainer: Resumable,
    stage: StageDir,
    train_step: Callable[[int], StepOutput],
    *,
    validate: Callable[[], Mapping[str, Metric]] | None = None,
    keep: Callable[[int], None] | None = None,
    carried: Mapping[str, Carried] | None = None,
    label: str,
) -> FitResult:
    """Run `train_step` for every step that is still to do; resumable at `config.save_every` steps, bit for bit.

    `train_step(step)` must be a function of the step number, the model, the optimiser and what it `carried` over
    from the step before alone. `keep(done)` puts the model away every `config.checkpoint_every` steps.
    """
    config = trainer.config
    keep_freed_memory()
    start, before, kept = trainer.load_state(stage.state_dir)
    earlier = FitResult(**before)  # type: ignore[arg-type]  # ints stay ints
    carriers = carried or {}
    for name, state in kept.items():
        carriers[name].load_state(state)
    rows = _Rows(stage, start) if trainer.is_main else None
    tokens = 0
    began, began_cpu = time.perf_counter(), time.process_time()

    def totals(done: int) -> FitResult:
        return FitResult(
            steps=done,
            tokens=earlier.tokens + tokens,
            wall_s=earlier.wall_s + time.perf_counter() - began,
            cpu_s=earlier.cpu_s + time.process_time() - began_cpu,
            peak_rss_bytes=max(earlier.peak_rss_bytes, peak_rss_bytes()),
        )

    with Progress(label, total=config.steps, start=start) as progress:
        for step in range(start, config.steps):
            step_began, step_cpu = time.perf_counter(), time.process_time()
            rate = trainer.set_step(step)
            output = train_step(step)
            tokens += output.tokens
            done = step + 1
            row: dict[str, Metric] = {}
            last = done == config.steps or output.stop is not None
            if done % config.log_every == 0 or last:
                row = {**output.metrics, "train/learning_rate": rate}
            if validate and (done == config.steps or (config.validate_every and done % config.validate_every == 0)):
                row |= validate()
            step_s = time.perf_counter() - step_began
            if row and rows:
                rows.write(done, row, _timings_row(output, step_s, time.process_time() - step_cpu))
            progress.update(done, tokens=output.tokens, **output.shown)
            # Before the state: a kill in between repeats these steps, and so what is kept of them.
            if keep and config.checkpoint_every and done % config.checkpoint_every == 0:
                keep(done)
            if done % config.save_every == 0 or last:
                _save_state(trainer, stage, carriers, totals(done))
            if output.stop and done < config.steps:
                raise output.stop
    if rows:
        rows.close()
    return totals(config.steps)
