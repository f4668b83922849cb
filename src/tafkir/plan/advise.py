"""Which layouts carry a workload: what fits, what keeps its promises, what it costs, and why others do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tafkir.errors import RecipeError
from tafkir.plan.hardware import Chip
from tafkir.plan.layout import Layout, cache_bytes, check_layout, weight_bytes_per_chip
from tafkir.plan.load import CHUNK_TOKENS, Fleet, Point, predict_point
from tafkir.plan.precision import Precision, mtp_bytes, part_bytes
from tafkir.plan.serving import Deployment, Term
from tafkir.plan.shapes import ModelShape
from tafkir.plan.workload import Workload

__all__ = [
    "OBJECTIVES",
    "Memory",
    "Option",
    "Refusal",
    "advise",
    "memory_of",
    "minimum_chips",
    "nearest_change",
    "replica_layouts",
]

OBJECTIVES = ("cost", "latency", "chips")
"""`cost`: most tokens a second of a chip; `latency`: shortest time per token; `chips`: fewest chips."""

# Share of the memory that an engine takes; NCCL's buffers, the CUDA context and graphs besides.
MEMORY_SHARE, OTHER_BYTES = 0.9, 3.5e9
# The rule of thumb of `minimum_chips`: a quarter of what is usable is for caches.
_FOR_CACHES = 0.25
_MOST_SEQUENCES = 4096

Passes = dict[int, tuple[list[Term], float]]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one chip, by what they are for.

    Attributes:
        weights: by part. activations: of one chunk of prompts. other: of the runtime.
        usable: what an engine may take in all. free: what is left for caches; negative, what is missing.
        sequence: cache of one sequence of the workload's full length.
    """

    weights: dict[str, float]
    activations: float
    other: float
    usable: float
    free: float
    sequence: float

    @property
    def sequences(self) -> int:
        """That fit at once, of one data-parallel group."""
        return max(0, int(self.free / self.sequence)) if self.sequence else _MOST_SEQUENCES


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve, at the highest load that keeps the workload's promises.

    Attributes:
        fleet: one replica. replicas: how many fit on the chips. unused: chips left over.
        batch: sequences of a data-parallel group. limit: what keeps it from being larger.
        dollars_in: low, mid, high for a million prompt tokens. dollars_out: for a million of the answers.
        headroom: share of the cache that stays free at that load.
    """

    fleet: Fleet
    replicas: int
    unused: int
    batch: int
    point: Point
    memory: Memory
    limit: str
    headroom: float
    dollars_in: tuple[float, float, float] | None
    dollars_out: tuple[float, float, float] | None

    @property
    def tokens_per_s(self) -> float:
        """Of the answers, of all replicas."""
        return self.point.tokens_per_s * self.replicas

    @property
    def tokens_per_s_per_chip(self) -> float:
        return self.point.tokens_per_s / self.fleet.chips

    @property
    def name(self) -> str:
        """The layout in words."""
        split = ""
        if self.fleet.prompts:
            split = f", prompts on {self.fleet.num_prefill} x {self.fleet.prompts.layout}"
        answers = f"{self.fleet.num_decode} x " if self.fleet.num_decode > 1 else ""
        return f"{answers}{self.fleet.decode.layout}{split}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A layout that does not do: the limit, and by how much it is missed."""

    layout: Layout
    limit: str
    missing: float
    why: str


def memory_of(deployment: Deployment, workload: Workload) -> Memory:
    """What lies on one chip of a deployment that serves a workload."""
    d, layout = deployment, deployment.layout
    weights = weight_bytes_per_chip(d.shape, d.precision, layout, speculative=d.speculation.tokens > 0)
    # Hidden states in and out, and the widest intermediate, of one chunk; logits of its last positions are small.
    routed = d.shape.top_k * d.shape.hidden / max(1, layout.ep // max(1, layout.dp)) if d.shape.num_experts else 0
    activations = CHUNK_TOKENS * 2 * (6 * d.shape.hidden + routed)
    usable = d.chip.memory_bytes * MEMORY_SHARE
    free = usable - sum(weights.values()) - activations - OTHER_BYTES
    tokens = workload.prompt_tokens + workload.output_tokens
    return Memory(
        weights, activations, OTHER_BYTES, usable, free, cache_bytes(d.shape, layout, tokens, d.cache_dtype_bytes)
    )


def minimum_chips(shape: ModelShape, precision: Precision, chip: Chip, *, speculative: bool = False) -> int:
    """Chips that hold the weights with a tenth of the memory in reserve and a quarter of the rest for caches."""
    size = sum(part_bytes(shape, precision).values()) + (mtp_bytes(shape, precision) if speculative else 0)
    return math.ceil(size / (chip.memory_bytes * MEMORY_SHARE * (1 - _FOR_CACHES)))


def replica_layouts(shape: ModelShape, chip: Chip, chips: int, *, contexts: bool = False) -> Iterator[Layout]:
    """Ways to lay one replica over so many chips; tensor parallelism stays in the fast domain, and is a power of two.

    Experts are either split like the other matrices, or divided among all chips.

    Args:
        contexts: split caches, too, where tensor parallelism would hold copies of them (`_splits_caches`).
    """
    fast = min(chip.domain_size, 8)
    for pp in (1, 2, 4):
        if chips % pp or (pp > 1 and chips // pp < min(fast, chips)):
            continue
        inner = chips // pp
        for tp, cp in ((2**power, 2**more) for power in range(4) for more in range(4 if contexts else 1)):
            if inner % (tp * cp) or tp * cp > fast or (cp > 1 and not _splits_caches(shape, tp)):
                continue
            dp = inner // (tp * cp)
            eps = sorted({1, inner}) if shape.num_experts else [1]
            for ep in eps:
                # Attention in copies pays where experts are shared; a dense model is served in replicas instead.
                if dp > 1 and (ep == 1 or cp > 1):
                    continue
                layout = Layout(tp=tp, pp=pp, dp=dp, ep=ep, cp=cp)
                try:
                    check_layout(shape, layout)
                except RecipeError:
                    continue
                yield layout


def _splits_caches(shape: ModelShape, tp: int) -> bool:
    """Latents lie on every tensor-parallel chip, and so do heads of keys when there are more chips than heads."""
    heads = 1 if shape.mixer == "mla" else shape.num_kv_heads
    return tp == heads and not shape.num_linear_layers and not shape.num_windowed_layers


def advise(
    deployment: Deployment,
    workload: Workload,
    chips: int,
    *,
    objective: str = "cost",
    split: bool = True,
    only: Layout | None = None,
) -> tuple[list[Option], list[Refusal]]:
    """Every layout of `chips` chips that carries the workload, best first, and why the others do not.

    Args:
        deployment: model, chip, precision, engine; its layout is what is sought.
        workload: what is asked.
        chips: that there are.
        objective: one of `OBJECTIVES`.
        split: look at separate workers for prompts, too.
        only: look at this layout alone.

    Raises:
        RecipeError: that layout does not divide, or takes more chips.
    """
    options: list[Option] = []
    refusals: list[Refusal] = []
    if only:
        check_layout(deployment.shape, only)
        if only.chips > chips:
            raise RecipeError(f"{only} takes {only.chips} chips", where="--layout", expected=f"at most {chips}")
    for layout in [only] if only else _all_layouts(deployment, chips):
        found = _try(Fleet(replace(deployment, layout=layout)), workload, chips)
        (options if isinstance(found, Option) else refusals).append(found)  # type: ignore[arg-type]
    if split and options and only is None:
        options += _split(options, deployment, workload, chips)
    if workload.requests_per_s:
        options, short = _demanded(options, workload)
        refusals += short
    return sorted(options, key=lambda option: _rank(option, objective)), refusals


def _all_layouts(deployment: Deployment, chips: int) -> Iterator[Layout]:
    for size in _replica_sizes(deployment.chip, chips):
        # Of the engines, vLLM splits caches.
        contexts = deployment.engine == "vllm"
        yield from replica_layouts(deployment.shape, deployment.chip, size, contexts=contexts)


def _replica_sizes(chip: Chip, chips: int) -> list[int]:
    small = [size for size in (1, 2, 4, 8) if size <= chips]
    node = min(8, chip.domain_size)
    large = [
        node * count for count in range(2, chips // node + 1) if chips // (node * count) * node * count > 0.8 * chips
    ]
    sizes = [*small, *large, chips]
    return sorted({size for size in sizes if size == chips or size <= 8 or size % node == 0})


def _rank(option: Option, objective: str) -> tuple[float, ...]:
    used = option.replicas * option.fleet.chips
    speed = -option.tokens_per_s / (used + option.unused)
    if objective == "latency":
        return (option.point.tpot_s, speed)
    if objective == "chips":
        return (option.fleet.chips, speed)
    return (speed, option.point.tpot_s)


def _try(fleet: Fleet, workload: Workload, chips: int) -> Option | Refusal:
    """The fleet at the largest batch that memory and both promises allow."""
    memory = memory_of(fleet.decode, workload)
    layout = fleet.decode.layout
    if memory.sequences < 1:
        missing = memory.sequence - memory.free
        why = f"one chip lacks {missing / 1e9:.1f} GB of {memory.usable / 1e9:.0f} GB usable"
        return Refusal(layout, "memory", missing / memory.usable, why)
    most = min(memory.sequences, _MOST_SEQUENCES)
    passes: Passes = {}
    first = _point(fleet, 1, workload, passes)
    if first.tpot_s > workload.tpot_s:
        why = f"{first.tpot_s * 1e3:.0f} ms a token for one user, {workload.tpot_s * 1e3:.0f} ms allowed"
        return Refusal(layout, "time per token", first.tpot_s / workload.tpot_s - 1, why)
    if first.ttft_s > workload.ttft_s:
        why = f"{first.ttft_s:.2f} s to the first token of one user, {workload.ttft_s:.2f} s allowed"
        return Refusal(layout, "time to first token", first.ttft_s / workload.ttft_s - 1, why)
    batch, point, limit = _largest(fleet, workload, most, first, passes)
    return _option(fleet, workload, chips, batch, point, memory, limit)


def _largest(fleet: Fleet, workload: Workload, most: int, first: Point, passes: Passes) -> tuple[int, Point, str]:
    low, high = 1, most
    point, limit = first, "memory"
    top = _point(fleet, most, workload, passes)
    if _keeps(top, workload):
        return most, top, "memory" if most < _MOST_SEQUENCES else "engine's limit of sequences"
    # A tenth is close enough: the model is not finer.
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        tried = _point(fleet, middle, workload, passes)
        if _keeps(tried, workload):
            low, point = middle, tried
        else:
            high = middle
            limit = "time per token" if tried.tpot_s > workload.tpot_s else "time to first token"
    return low, point, limit


def _keeps(point: Point, workload: Workload) -> bool:
    return point.tpot_s <= workload.tpot_s and point.ttft_s <= workload.ttft_s


def _point(fleet: Fleet, batch: int, workload: Workload, passes: Passes | None = None) -> Point:
    return predict_point(
        fleet, batch, workload.prompt_tokens, workload.output_tokens, cached=workload.cached, passes=passes
    )


def _option(
    fleet: Fleet, workload: Workload, chips: int, batch: int, point: Point, memory: Memory, limit: str
) -> Option:
    replicas = chips // fleet.chips
    price = fleet.decode.chip.price
    dollars_in = dollars_out = None
    if price:
        # Chips work on prompts for `busy / (1 + busy)` of the time, and on answers for the rest.
        share = point.busy / (1 + point.busy)
        if fleet.prompts:
            share = fleet.prompts.layout.chips * fleet.num_prefill / fleet.chips
        prompts = point.tokens_per_s * workload.prompt_tokens / workload.output_tokens
        per_second = fleet.chips / 3600 / workload.utilization
        dollars_in = price.scaled(per_second * share / prompts * 1e6)
        dollars_out = price.scaled(per_second * (1 - share) / point.tokens_per_s * 1e6)
    headroom = 1 - batch / memory.sequences if memory.sequences else 0.0
    return Option(
        fleet, replicas, chips - replicas * fleet.chips, batch, point, memory, limit, headroom, dollars_in, dollars_out
    )


def _split(options: Sequence[Option], deployment: Deployment, workload: Workload, chips: int) -> list[Option]:
    """The best decoding layouts with workers of their own for prompts, as many as keep the answers fed."""
    best = sorted(options, key=lambda option: -option.tokens_per_s_per_chip)[:2]
    workers = sorted(options, key=lambda option: (option.fleet.chips, option.point.ttft_s))[:2]
    found = []
    for answers in best:
        for prompts in workers:
            size = prompts.fleet.chips
            for count in _worker_counts(chips, answers.fleet.chips, size):
                fleet = Fleet(answers.fleet.decode, 1, replace(deployment, layout=prompts.fleet.decode.layout), count)
                tried = _try(fleet, workload, chips)
                if isinstance(tried, Option):
                    found.append(tried)
    return found


def _worker_counts(chips: int, decode: int, prefill: int) -> list[int]:
    most = (chips - decode) // prefill
    return sorted({count for count in (1, 2, 4, most) if 1 <= count <= most})


def _demanded(options: Sequence[Option], workload: Workload) -> tuple[list[Option], list[Refusal]]:
    """Options that carry the demanded rate."""
    needed = workload.requests_per_s * workload.output_tokens / workload.utilization
    enough, short = [], []
    for option in options:
        if option.tokens_per_s >= needed:
            enough.append(option)
            continue
        more = math.ceil(needed / option.point.tokens_per_s) * option.fleet.chips
        why = f"{option.tokens_per_s:,.0f} of {needed:,.0f} tokens/s; {more} chips would do"
        missing = needed / option.tokens_per_s - 1 if option.tokens_per_s else math.inf
        short.append(Refusal(option.fleet.decode.layout, "throughput", missing, why))
    return enough, short


def nearest_change(
    deployment: Deployment, workload: Workload, chips: int, precisions: Sequence[Precision]
) -> list[str]:
    """What would make an infeasible plan feasible: fewer bytes, more chips, or a longer wait. Smallest first.

    Args:
        precisions: others that the chip computes in.
    """
    ways = []
    for precision in precisions:
        if advise(replace(deployment, precision=precision), workload, chips, split=False)[0]:
            ways.append(f"--precision {precision.name}")
            break
    for factor in (2, 3, 4, 6, 8, 12, 16, 32):
        if advise(deployment, workload, chips * factor, split=False)[0]:
            ways.append(f"{chips * factor} chips")
            break
    patient = replace(workload, ttft_s=math.inf, tpot_s=math.inf)
    options = advise(deployment, patient, chips, split=False)[0]
    singles = [_point(option.fleet, 1, workload) for option in options]
    if singles:
        quick = min(singles, key=lambda point: max(point.tpot_s / workload.tpot_s, point.ttft_s / workload.ttft_s))
        ways.append(f"accepting {quick.tpot_s * 1e3:.0f} ms a token and {quick.ttft_s:.2g} s to the first")
    return ways
