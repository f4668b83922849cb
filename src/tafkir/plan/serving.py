"""The time of one prefill and one decode step on a layout: a roofline by part, latency by layer, and communication.

Every time is a list of `Term`s that add up to it, each with its formula in words. What the coefficients are and where
they come from is `plan/coefficients.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tafkir.plan.coefficients import Coefficients
from tafkir.plan.hardware import Chip
from tafkir.plan.layout import Layout, cache_bytes, weight_bytes_per_chip
from tafkir.plan.precision import Precision
from tafkir.plan.shapes import ModelShape

__all__ = ["NOT_MODELLED", "Deployment", "Speculation", "Term", "decode_step", "expert_coverage", "prefill", "total"]

NOT_MODELLED = (
    "kernels that an engine lacks for a chip or a shape, and how they age from version to version",
    "sampling, tokenizing and the network to the client beyond the engine's constant",
    "fragmentation of the cache, preemption and recomputation",
    "hot experts beyond the stated skew, and their replicas",
    "clock speeds under heat and power limits; neighbours on shared networks",
)
"""What every prediction leaves out."""

_ACTIVATION_BYTES = 2
# Dispatch in one byte, combine in two (DeepSeek-V3, section 3.2).
_DISPATCH_BYTES, _COMBINE_BYTES = 1, 2


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a time: what, how long (s), how it was computed, and on which source or coefficient it rests."""

    name: str
    seconds: float
    formula: str
    source: str


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafted tokens that the model checks at once.

    Attributes:
        tokens: drafted a step. acceptance: probability that one is kept, given those before it.
        cost: time of drafting one token as a share of a step.
    """

    tokens: int = 0
    acceptance: float = 0.85
    cost: float = 0.05

    @property
    def yields(self) -> float:
        """Tokens of a step in the mean: (1 - a^(g+1)) / (1 - a) (arXiv 2211.17192, equation 1)."""
        if self.acceptance >= 1:
            return self.tokens + 1.0
        return float((1 - self.acceptance ** (self.tokens + 1)) / (1 - self.acceptance))


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on chips.

    Attributes:
        cache_dtype_bytes: of one number in the cache.
        skew: the busiest expert group's load over the mean's; 1 for perfect balance.
        engine: whose constants are taken (`vllm`, `sglang`, `trtllm`).
        poll_steps: decoding steps between two looks for new requests (SGLang's `--scheduler-recv-interval`).
        stream_steps: tokens that are handed out together, the first ones, too (SGLang's `--stream-interval`).
    """

    shape: ModelShape
    chip: Chip
    precision: Precision
    layout: Layout
    coefficients: Coefficients
    engine: str = "sglang"
    cache_dtype_bytes: float = 2
    skew: float = 1.0
    speculation: Speculation = Speculation()
    poll_steps: int = 1
    stream_steps: int = 1


def total(terms: Sequence[Term]) -> float:
    """Seconds of all terms."""
    return sum(term.seconds for term in terms)


def expert_coverage(num_experts: int, top_k: int, tokens: float) -> float:
    """Experts that at least one of the tokens visits, E (1 - (1 - k/E)^T), with even routing."""
    if not num_experts:
        return 0.0
    return float(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def decode_step(deployment: Deployment, batch: float, context: float) -> list[Term]:
    """One step that gives every sequence its next token(s).

    Args:
        deployment: the model on its chips.
        batch: sequences of one data-parallel group.
        context: tokens in the cache of each.
    """
    d, c = deployment, deployment.coefficients
    rows = batch * (d.speculation.tokens + 1)
    terms = _kernels(d, rows, context, cached=batch)
    terms.append(_latency(d))
    terms += _communication(d, rows, splits=d.layout.cp > 1)
    if c.per_sequence_s:
        terms.append(Term("per sequence", batch * c.per_sequence_s, f"{batch:g} sequences", c.source))
    if d.speculation.tokens:
        drafts = d.speculation.tokens * d.speculation.cost * total(terms)
        terms.append(Term("drafting", drafts, f"{d.speculation.tokens} x {d.speculation.cost:.0%} of a step", "given"))
    return terms


def prefill(deployment: Deployment, tokens: float, *, cached: float = 0.0, prompts: int = 1) -> list[Term]:
    """One pass over prompts of `tokens` tokens.

    Args:
        deployment: the model on its chips.
        tokens: of one prompt.
        cached: share of the prompt that the prefix cache holds.
        prompts: of each data-parallel group, in one pass.
    """
    fresh = tokens * (1 - cached)
    rows = fresh * prompts
    terms = _kernels(deployment, rows, tokens * cached + fresh / 2, cached=None)
    terms.append(_latency(deployment))
    return terms + _communication(deployment, rows)


def _kernels(d: Deployment, rows: float, context: float, *, cached: float | None) -> list[Term]:
    """Each part takes the longer of reading its bytes and multiplying them; `cached` sequences read their cache."""
    shape, layout, precision = d.shape, d.layout, d.precision
    held = weight_bytes_per_chip(shape, precision, layout)
    stages = layout.pp
    width = layout.tp * layout.cp
    attention_format = precision.computes if precision.attention < 2 else precision.rest_computes
    everywhere = {name: size * stages for name, size in held.items()}
    terms = [
        _kernel(d, "attention matrices", everywhere["attention"], 2 * shape.attention * rows / width, attention_format),
        _attention(d, rows, context, cached),
    ]
    dense = everywhere["dense"] + everywhere["shared experts"] + everywhere["routers and norms"]
    flops = 2 * (shape.dense + shape.shared + shape.router) * rows / width
    terms.append(_kernel(d, "dense and shared", dense, flops, precision.computes))
    if shape.num_experts:
        terms.append(_experts(d, rows, everywhere["routed experts"]))
    head_rows = rows if cached is not None else 1
    table = shape.table * (4 if precision.name == "fp32" else 2) / width
    terms.append(_kernel(d, "output head", table, 2 * shape.table * head_rows / width, precision.rest_computes))
    return terms


def _attention(d: Deployment, rows: float, context: float, cached: float | None) -> Term:
    shape = d.shape
    split = d.layout.tp * d.layout.cp
    flops = rows * shape.attention_flops(context, absorbed=cached is not None) / split
    size = 0.0
    if cached is not None:
        most = min(context, shape.attended) if shape.attended else context
        size = cached * cache_bytes(shape, d.layout, most, d.cache_dtype_bytes) * d.layout.pp
    return _kernel(d, "cache and attention", size, flops, d.precision.rest_computes)


def _experts(d: Deployment, rows: float, stored: float) -> Term:
    """The busiest group of chips decides; what it reads are the experts that any of the replica's tokens visits."""
    shape, layout = d.shape, d.layout
    tokens = rows * layout.dp
    share = expert_coverage(shape.num_experts, shape.top_k, tokens) / shape.num_experts
    skew = d.skew if layout.ep > 1 else 1.0
    chips = layout.ep * layout.moe_tp
    flops = 2 * shape.expert * shape.top_k * shape.num_moe_layers * tokens / chips * skew
    return _kernel(d, "routed experts", stored * min(1.0, share * skew), flops, d.precision.computes)


def _kernel(d: Deployment, name: str, size: float, flops: float, number_format: str) -> Term:
    c, chip = d.coefficients, d.chip
    reading = size / (c.bandwidth_share * chip.bandwidth)
    multiplying = flops / (c.compute_share * chip.peak(number_format))
    if reading >= multiplying:
        formula = f"{size / 1e9:.3g} GB / ({c.bandwidth_share:.2f} x {chip.bandwidth / 1e12:g} TB/s)"
    else:
        peak = chip.peak(number_format) / 1e12
        formula = f"{flops / 1e12:.3g} TFLOP / ({c.compute_share:.2f} x {peak:g} TFLOPS {number_format})"
    return Term(name, max(reading, multiplying), formula, f"{chip.source}; {c.source}")


def _latency(d: Deployment) -> Term:
    c = d.coefficients
    layers = d.shape.num_layers
    return Term("latency", layers * c.layer_s, f"{layers} layers x {c.layer_s * 1e6:.0f} us", c.source)


def _communication(d: Deployment, rows: float, *, splits: bool = False) -> list[Term]:
    """All-reduces of tensor parallelism, all-to-alls of experts, hops of a pipeline; `splits`: split caches."""
    shape, layout, chip, c = d.shape, d.layout, d.chip, d.coefficients
    terms = []
    inner = layout.tp * layout.cp
    if inner > 1:
        inside = inner <= chip.domain_size
        rate = (chip.link if inside else chip.network) * c.network_share
        volume = 2 * shape.num_layers * rows * shape.hidden * _ACTIVATION_BYTES * 2 * (inner - 1) / inner
        hops = 0.0 if inside else 2 * shape.num_layers * 2 * c.network_hop_s
        formula = f"{2 * shape.num_layers} x 2(n-1)/n x {rows:g} x {shape.hidden} x 2 B at {rate / 1e9:.0f} GB/s"
        terms.append(Term("all-reduce", volume / rate + hops, formula, f"{chip.source}; {c.source}"))
    if splits:
        # Queries of all heads come together before attention, and its parts of the sums after it.
        absorbed = 2 * shape.kv_lora_rank + shape.rope_dim if shape.mixer == "mla" else shape.qk_dim + shape.v_dim
        away = (layout.cp - 1) / layout.cp
        volume = shape.num_full_layers * rows * shape.num_heads / layout.tp * absorbed * _ACTIVATION_BYTES * away
        rate = (chip.link if layout.cp <= chip.domain_size else chip.network) * c.network_share
        formula = f"{shape.num_full_layers} x {rows:g} x {shape.num_heads // layout.tp} heads x {absorbed} x 2 B"
        terms.append(Term("queries and sums", volume / rate, formula, f"{chip.source}; {c.source}"))
    if layout.ep > 1 and layout.dp > 1:
        terms.append(_all_to_all(d, rows))
    if layout.pp > 1:
        hop = rows * shape.hidden * _ACTIVATION_BYTES / chip.network + c.network_hop_s
        terms.append(Term("pipeline hops", (layout.pp - 1) * hop, f"{layout.pp - 1} hops", c.source))
    return terms


def _all_to_all(d: Deployment, rows: float) -> Term:
    """Every token's state goes to its experts and comes back; copies to one node go over the network once."""
    shape, layout, chip, c = d.shape, d.layout, d.chip, d.coefficients
    away = (layout.ep - 1) / layout.ep
    token = shape.hidden * (_DISPATCH_BYTES + _COMBINE_BYTES)
    inside = layout.chips <= chip.domain_size
    copies: float = shape.top_k
    if not inside:
        nodes = layout.chips / chip.domain_size
        copies = nodes * (1 - (1 - 1 / nodes) ** shape.top_k)
        copies = min(copies, shape.routing_groups or copies)
    rate = (chip.link if inside else chip.network) * c.network_share
    hops = 2 * (0.0 if inside else c.network_hop_s)
    seconds = shape.num_moe_layers * (rows * copies * token * away / rate + hops) * (1 - c.overlap)
    formula = f"{shape.num_moe_layers} x {rows:g} x {copies:.3g} copies x {token} B at {rate / 1e9:.0f} GB/s"
    return Term("all-to-all", seconds, formula, f"{chip.source}; {c.source}")
