"""Memory, time and money of training a decoder on a layout, and what failures take of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.hardware import Chip
from tafkir.plan.serving import Term
from tafkir.plan.shapes import ModelShape

__all__ = [
    "RECOMPUTE",
    "TRAIN_ENGINES",
    "Failures",
    "TrainJob",
    "TrainLayout",
    "TrainOption",
    "goodput",
    "search_training",
    "train_flops_per_token",
    "train_memory",
    "train_step",
]

RECOMPUTE = ("none", "selective", "full")
"""Activations kept; without SwiGLU's product and the norms' results; the layers' inputs alone."""

# Share of the bfloat16 peak that training kernels reach before bubbles and communication, by software: Megatron's
# published DeepSeek-V3 runs are the unit, TorchTitan's lie at a quarter (256 B200) to a half (8 H100) of them, and
# Pangu Ultra MoE on 6,000 Ascend (MFU 30 %, arXiv 2505.04519) at two thirds.
TRAIN_ENGINES = {"megatron": 1.0, "torchtitan": 0.35, "mindspeed": 0.67}
"""Factors on the reached share of the peak, by software."""

_COMPUTE_SHARE = 0.5
# TorchTitan, DeepSeek-V3 on 256 B200: 859 tokens/s in bfloat16, 918 with MXFP8 in the matrices.
_FP8_GAIN = 918 / 859
_NETWORK_SHARE = 0.8
# Of communication that pipelining hides behind computing.
_OVERLAP = 0.5
_OTHER_BYTES = 3.5e9
_MEMORY_SHARE = 0.94
# arXiv 2512.24880: 6.7 % at four streams with fused kernels.
_STREAMS_OVERHEAD = 0.067 / 4
# AdamW: weights, gradients, float32 master copy and two moments, bytes of a parameter.
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12
# Dispatch in one byte, combine in two, and the same backwards.
_A2A_BYTES = 6


@dataclass(frozen=True, slots=True)
class Failures:
    """How often nodes fail and what it costs; as Llama-3's (arXiv 2407.21783: 419 in 54 days on 2,048 nodes).

    Attributes:
        per_node_day: failures. checkpoint_s: writing one. restart_s: from the failure until training goes on.
    """

    per_node_day: float = 419 / (54 * 2048)
    checkpoint_s: float = 30.0
    restart_s: float = 300.0


@dataclass(frozen=True, slots=True)
class TrainLayout:
    """Chips of a training job: `tp` x `pp` x data parallelism; experts over `ep` of the chips of a pipeline stage.

    Attributes:
        shard: `fsdp` (weights, gradients and states over the data-parallel group) or `zero1` (states only).
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    shard: str = "fsdp"
    recompute: str = "selective"
    micro_batch: int = 1

    def __str__(self) -> str:
        sizes = " ".join(
            f"{name}{size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("EP", self.ep)) if size > 1
        )
        return f"{sizes or 'data parallel'} {self.shard}, recompute {self.recompute}"


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What is trained, and on what.

    Attributes:
        chips: of all. tokens: of the whole run. sequence: tokens of one. batch_tokens: of one step.
        fp8: matrices in FP8, as DeepSeek-V3. mfu: share of the bfloat16 peak, given instead of computed.
        engine: one of `TRAIN_ENGINES`.
    """

    shape: ModelShape
    chip: Chip
    chips: int
    tokens: float
    sequence: int = 4096
    batch_tokens: float = 16e6
    fp8: bool = False
    mfu: float | None = None
    engine: str = "megatron"
    failures: Failures = field(default_factory=Failures)


@dataclass(frozen=True, slots=True)
class TrainOption:
    """A layout with its costs.

    Attributes:
        memory: bytes of the fullest chip by part. step: terms of one step. mfu: of the bfloat16 peak, causal attention.
        days: by the clock, failures included. chip_hours: the same times chips. dollars: low, mid, high.
    """

    layout: TrainLayout
    memory: dict[str, float]
    step: tuple[Term, ...]
    tokens_per_s_per_chip: float
    mfu: float
    goodput: float
    checkpoint_every_s: float
    days: float
    chip_hours: float
    dollars: tuple[float, float, float] | None


def train_flops_per_token(shape: ModelShape, sequence: int) -> float:
    """Forward and backward of one token, attention causal, multi-token prediction not included."""
    return 3 * shape.forward_flops(sequence / 2)


def goodput(failures: Failures, nodes: float) -> tuple[float, float]:
    """Share of the time that becomes progress, and the seconds between checkpoints that make it largest.

    Young's interval sqrt(2 C M), with M the mean time between failures of all nodes; what is lost is writing, half an
    interval a failure, and restarting.
    """
    between = 86400 / (nodes * failures.per_node_day)
    every = math.sqrt(2 * failures.checkpoint_s * between)
    lost = failures.checkpoint_s / every + every / (2 * between) + failures.restart_s / between
    return max(0.0, 1 - lost), every


def train_memory(job: TrainJob, layout: TrainLayout) -> dict[str, float]:
    """Bytes on the fullest chip (the first pipeline stage's), by what they are for."""
    shape = job.shape
    per_stage = shape.total + shape.mtp - shape.routed, shape.routed
    dense, routed = per_stage[0] / (layout.tp * layout.pp), per_stage[1] / layout.pp
    data = job.chips // (layout.tp * layout.pp)
    expert_copies = max(1, job.chips // (layout.pp * layout.ep))
    weights = dense, routed / layout.ep
    if layout.shard == "fsdp":
        kept = dense / data + routed / layout.ep / expert_copies
        states = {"weights": _WEIGHT * kept, "gradients": _GRADIENT * kept}
        largest = (dense + routed / layout.ep) / max(1, shape.num_layers / layout.pp)
        states["gathered layers"] = 2 * _WEIGHT * largest
    else:
        states = {"weights": _WEIGHT * sum(weights), "gradients": _GRADIENT * sum(weights)}
    states["optimizer"] = _OPTIMIZER * (dense / data + routed / layout.ep / expert_copies)
    tokens = layout.micro_batch * job.sequence
    in_flight = min(layout.pp, _micro_batches(job, layout))
    states["activations"] = tokens * _activations(shape, layout) * shape.num_layers / layout.pp * in_flight
    states["logits"] = tokens * shape.vocab * 6 / layout.tp / layout.pp
    states["runtime"] = _OTHER_BYTES
    return states


def _activations(shape: ModelShape, layout: TrainLayout) -> float:
    """Bytes that the mean layer keeps of a token for the backward pass (arXiv 2205.05198, with SwiGLU and experts)."""
    hidden, layers = shape.hidden, shape.num_layers
    streams = 2 * 2 * (shape.streams - 1) * hidden
    if layout.recompute == "full":
        return (2 * hidden + streams / max(1, math.sqrt(layers))) / layout.tp
    width = shape.num_heads * (shape.qk_dim + shape.v_dim) + shape.num_kv_heads * (shape.qk_dim + shape.v_dim)
    attention = 2 * hidden + 2 * width
    intermediate = shape.dense / (3 * hidden) / layers + shape.shared / (3 * hidden) / layers
    copies = 1.0
    if shape.num_experts:
        share = shape.num_moe_layers / layers
        intermediate += share * shape.top_k * shape.expert / (3 * hidden)
        copies += share * shape.top_k
    keep = 4 if layout.recompute == "selective" else 6
    norms = 0 if layout.recompute == "selective" else 4 * hidden
    return (attention + norms + 2 * hidden * copies + keep * intermediate + streams) / layout.tp


def _micro_batches(job: TrainJob, layout: TrainLayout) -> int:
    data = job.chips // (layout.tp * layout.pp)
    return max(1, round(job.batch_tokens / (data * layout.micro_batch * job.sequence)))


def train_step(job: TrainJob, layout: TrainLayout) -> list[Term]:
    """Seconds of one step, by part."""
    shape, chip = job.shape, job.chip
    data = job.chips // (layout.tp * layout.pp)
    mine = job.batch_tokens / data
    peak = chip.peak("bf16")
    share = _COMPUTE_SHARE * TRAIN_ENGINES[job.engine]
    passes = 4 if layout.recompute == "full" else 3
    matrices = 2 * shape.active_without_input * passes * mine / (layout.tp * layout.pp)
    gain = _FP8_GAIN if job.fp8 else 1.0
    seen = shape.attention_flops(job.sequence / 2) * passes * mine / (layout.tp * layout.pp)
    source = f"{chip.source}; {job.engine}"
    rate = share * peak
    terms = [
        Term(
            "matrices",
            matrices / (rate * gain),
            f"{matrices / 1e12:.4g} TFLOP at {rate * gain / 1e12:.0f} TFLOPS",
            source,
        ),
        Term("attention", seen / rate, f"{seen / 1e12:.4g} TFLOP at {rate / 1e12:.0f} TFLOPS", source),
    ]
    if shape.mtp:
        extra = 2 * (shape.mtp_active + shape.table * shape.mtp_depth) * passes * mine / (layout.tp * layout.pp)
        terms.append(Term("multi-token prediction", extra / (rate * gain), f"{extra / 1e12:.4g} TFLOP", source))
    terms += _train_communication(job, layout, mine, data)
    busy = sum(term.seconds for term in terms)
    if shape.streams > 1:
        share_of = _STREAMS_OVERHEAD * shape.streams
        terms.append(Term("residual streams", share_of * busy, f"{share_of:.1%} of the rest", "arXiv 2512.24880"))
        busy += terms[-1].seconds
    if layout.pp > 1:
        count = _micro_batches(job, layout)
        # Interleaved stages of two layers each divide 1F1B's bubble by their number.
        stages = max(1, shape.num_layers // (2 * layout.pp))
        bubble = (layout.pp - 1) / (count * stages)
        formula = f"{layout.pp - 1} over {count} micro-batches x {stages} stages"
        terms.append(Term("pipeline bubble", bubble * busy, formula, "interleaved 1F1B"))
    return terms


def _train_communication(job: TrainJob, layout: TrainLayout, mine: float, data: int) -> list[Term]:
    shape, chip = job.shape, job.chip
    layers = shape.num_layers / layout.pp
    shown = 1 - _OVERLAP
    terms = []
    if layout.tp > 1:
        rate = (chip.link if layout.tp <= chip.domain_size else chip.network) * _NETWORK_SHARE
        volume = 4 * layers * mine * shape.hidden * 2 * 2 * (layout.tp - 1) / layout.tp
        terms.append(
            Term("tensor parallelism", shown * volume / rate, f"{volume / 1e9:.3g} GB, half hidden", chip.source)
        )
    if layout.ep > 1 and shape.num_experts:
        inside = layout.ep <= chip.domain_size
        rate = (chip.link if inside else chip.network) * _NETWORK_SHARE
        nodes = layout.ep / chip.domain_size
        copies = float(shape.top_k) if inside else nodes * (1 - (1 - 1 / nodes) ** shape.top_k)
        copies = min(copies, shape.routing_groups or copies)
        volume = mine / layout.tp * copies * shape.hidden * _A2A_BYTES * shape.num_moe_layers / layout.pp
        terms.append(
            Term("expert parallelism", shown * volume / rate, f"{volume / 1e9:.3g} GB, half hidden", chip.source)
        )
    if data > 1:
        inside = job.chips <= chip.domain_size
        rate = (chip.link if inside else chip.network) * _NETWORK_SHARE
        held = (shape.total - shape.routed) / (layout.tp * layout.pp)
        experts = shape.routed / (layout.pp * layout.ep) if job.chips > layout.pp * layout.ep else 0.0
        count = _micro_batches(job, layout) if layout.shard == "fsdp" else 1
        volume = (held + experts) * (2 * 2 * count + _GRADIENT)
        terms.append(
            Term("data parallelism", shown * volume / rate, f"{volume / 1e9:.3g} GB, half hidden", chip.source)
        )
    return terms


def search_training(job: TrainJob, *, memory_share: float = _MEMORY_SHARE) -> list[TrainOption]:
    """Layouts that fit, fastest first.

    Raises:
        CapacityError: none fits; the message says what the smallest lacks and how many chips would hold it.
        RecipeError: the job asks for what there is not.
    """
    if job.engine not in TRAIN_ENGINES:
        raise RecipeError("no such training engine", where=job.engine, expected=f"one of {', '.join(TRAIN_ENGINES)}")
    usable = job.chip.memory_bytes * memory_share
    best: list[TrainOption] = []
    least, smallest = math.inf, TrainLayout()
    for layout in _train_layouts(job):
        memory = train_memory(job, layout)
        size = sum(memory.values())
        if size < least:
            least, smallest = size, layout
        if size <= usable:
            best.append(_train_option(job, layout, memory))
    if not best:
        floor = (job.shape.total + job.shape.mtp) * (_WEIGHT + _GRADIENT + _OPTIMIZER)
        raise CapacityError(
            f"training does not fit: the leanest layout ({smallest}) takes {least / 1e9:.0f} GB of a chip's "
            f"{usable / 1e9:.0f} usable",
            where=f"{job.chips} x {job.chip.name}",
            fix=f"states take {floor / 1e12:.2f} TB: at least {math.ceil(floor / usable)} chips, or a smaller model",
        )
    return sorted(best, key=lambda option: option.days)


def _train_layouts(job: TrainJob) -> Iterator[TrainLayout]:
    chip, shape = job.chip, job.shape
    fast = min(chip.domain_size, 8)
    for tp in (size for size in (1, 2, 4, 8) if size <= fast and shape.num_heads % size == 0):
        for pp in (size for size in (1, 2, 4, 8, 16) if size <= shape.num_layers):
            if job.chips % (tp * pp) or job.chips // (tp * pp) * job.sequence > job.batch_tokens * tp:
                continue
            inner = job.chips // pp
            eps = [size for size in (1, 8, 16, 32, 64) if inner % size == 0 and size <= max(1, shape.num_experts)]
            for ep in eps if shape.num_experts else [1]:
                for shard in ("fsdp", "zero1"):
                    for recompute in RECOMPUTE:
                        yield TrainLayout(tp, pp, ep, shard, recompute)


def _train_option(job: TrainJob, layout: TrainLayout, memory: dict[str, float]) -> TrainOption:
    step = train_step(job, layout)
    seconds = sum(term.seconds for term in step)
    peak = job.chip.peak("bf16")
    per_token = train_flops_per_token(job.shape, job.sequence)
    rate = job.batch_tokens / seconds / job.chips
    if job.mfu is not None:
        rate = job.mfu * peak / per_token
        step = [
            Term("given MFU", job.batch_tokens / rate / job.chips, f"{job.mfu:.1%} of {peak / 1e12:g} TFLOPS", "given")
        ]
    share, every = goodput(job.failures, max(1.0, job.chips / min(8, job.chip.domain_size)))
    if share <= 0:
        raise CapacityError("nodes fail faster than training goes on", where=f"{job.chips} chips", fix="write faster")
    hours = job.tokens / (rate * job.chips) / 3600 / share
    dollars = job.chip.price.scaled(hours * job.chips) if job.chip.price else None
    return TrainOption(
        layout=layout,
        memory=memory,
        step=tuple(step),
        tokens_per_s_per_chip=rate,
        mfu=rate * per_token / peak,
        goodput=share,
        checkpoint_every_s=every,
        days=hours / 24,
        chip_hours=hours * job.chips,
        dollars=dollars,
    )
