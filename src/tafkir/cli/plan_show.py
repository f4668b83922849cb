"""What `tafkir plan` prints: tables, terms, and the same as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tafkir.cli.plan_question import Asked
    from tafkir.plan.advise import Option, Refusal
    from tafkir.plan.hardware import Chip
    from tafkir.plan.serving import Deployment
    from tafkir.plan.shapes import ModelShape
    from tafkir.plan.simulate import SimulatedLoad
    from tafkir.plan.training import TrainOption

__all__ = [
    "chip_cells",
    "chip_json",
    "confidence",
    "print_table",
    "print_terms",
    "serving_json",
    "show_curve",
    "show_model",
    "show_options",
    "show_terms",
    "train_cells",
]


def show_model(asked: Asked) -> None:
    """Counts of parameters, cache, checkpoint and computation, before the layouts."""
    from tafkir.plan.advise import minimum_chips
    from tafkir.plan.precision import checkpoint_bytes

    d, w = asked.deployment, asked.workload
    shape = d.shape
    cached = f" ({w.cached:.0%} cached)" if w.cached else ""
    print(
        f"{asked.name} ({asked.kind}) on {asked.chips} x {d.chip.name}, {d.precision.name}; {asked.workload_name}: "
        f"{w.prompt_tokens:,.0f} tokens in{cached}, {w.output_tokens:,.0f} out"
    )
    context = w.prompt_tokens + w.output_tokens / 2
    rows = [
        ("parameters", f"{_count(shape.total)} in all; a token meets {_active(shape)}"),
        ("checkpoint", f"{_bytes(checkpoint_bytes(shape, d.precision))} in {d.precision.name} ({d.precision.what})"),
        ("KV cache", f"{shape.kv_bytes_per_token(d.cache_dtype_bytes):,.0f} B a token; {_state(shape)}"),
        (
            "FLOPs",
            f"prefill {_flops(shape.forward_flops(w.prompt_tokens / 2, head=False))} a token, decode "
            f"{_flops(shape.forward_flops(context, absorbed=True))} at {context:,.0f} tokens",
        ),
        (
            "weights want",
            f"{minimum_chips(shape, d.precision, d.chip)} chips at least (a tenth in reserve, a quarter for caches)",
        ),
    ]
    if w.prompt_tokens + w.output_tokens > shape.max_context:
        rows.append(("context", f"{shape.max_context:,} tokens: the requests do not fit without stretching it"))
    for key, text in rows:
        print(f"{key:<13} {text}")


def _active(shape: ModelShape) -> str:
    return (
        f"{_count(shape.active)} with both embedding tables, {_count(shape.active_without_input)} without the "
        f"input's, {_count(shape.active_non_embedding)} without either"
    )


def _flops(number: float) -> str:
    size, unit = (1e9, "GFLOP") if number >= 1e8 else (1e6, "MFLOP")
    return f"{number / size:,.1f} {unit}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return f"{number:,.0f}"


def _state(shape: ModelShape) -> str:
    return f"{_bytes(shape.state_bytes)} a sequence besides" if shape.state_bytes else "nothing besides"


def show_options(asked: Asked, options: list[Option], refusals: list[Refusal]) -> None:
    """The table of layouts, best first, and what was refused."""
    head = (
        "layout",
        "users",
        "TTFT s",
        "TPOT ms",
        "tok/s",
        "tok/s/chip",
        "$/M in",
        "$/M out",
        "cache free",
        "bound by",
    )
    print()
    print_table(head, [_option_cells(option) for option in options], left=(0, 9))
    best = options[0]
    print(f"\n{_reason(best)}")
    shown = sorted(refusals, key=lambda refusal: refusal.missing)[:3]
    for refusal in shown:
        print(f"not {refusal.layout}: {refusal.why}")
    if len(refusals) > len(shown):
        print(f"and {len(refusals) - len(shown)} more layouts do not do")
    print(confidence(asked.deployment))


def _reason(option: Option) -> str:
    """Which term weighs most in the best layout."""
    heaviest = max(option.point.tpot, key=lambda term: term.seconds)
    share = heaviest.seconds / option.point.tpot_s
    unused = f"; {option.unused} chips stay unused" if option.unused else ""
    return (
        f"{option.name}: {share:.0%} of a token's time is {heaviest.name} ({heaviest.formula}); more users are kept "
        f"out by {option.limit}{unused}"
    )


def confidence(d: Deployment) -> str:
    """Where the coefficients are from, and how far off they were where that is known."""
    from tafkir.plan.calibrate import left_out_errors

    c = d.coefficients
    errors = left_out_errors()
    if c.source.startswith("fitted"):
        return (
            f"coefficients {c.source}; rows the fit did not see were off by {errors['tpot']:.0%} in TPOT and "
            f"{errors['ttft']:.0%} in TTFT (medians). Means; --simulate gives percentiles"
        )
    return f"coefficients: {c.source}. Means; --simulate gives percentiles"


def _option_cells(option: Option) -> tuple[str, ...]:
    count = f"{option.replicas} x " if option.replicas > 1 else ""
    return (
        f"{count}{option.name}",
        f"{option.point.concurrency * option.replicas:,.0f}",
        f"{option.point.ttft_s:.2f}",
        f"{option.point.tpot_s * 1e3:.1f}",
        f"{option.tokens_per_s:,.0f}",
        f"{option.tokens_per_s_per_chip:,.0f}",
        _dollars(option.dollars_in),
        _dollars(option.dollars_out),
        f"{option.headroom:.0%}",
        option.limit,
    )


def _dollars(levels: tuple[float, float, float] | None) -> str:
    """Low / mid / high, or why there is none."""
    if levels is None:
        return "no price"
    low, mid, high = levels
    return f"{mid:.3f}" if low == high else f"{low:.3f}/{mid:.3f}/{high:.3f}"


def show_terms(asked: Asked, option: Option) -> None:
    """Every number of the best layout by its terms, with sources, and what is left out."""
    from tafkir.plan.precision import mtp_bytes, part_bytes
    from tafkir.plan.serving import NOT_MODELLED

    d, chip = asked.deployment, asked.deployment.chip
    print(f"\nEvery number of {option.name}, by its terms")
    parts = {**part_bytes(d.shape, d.precision), "multi-token prediction": mtp_bytes(d.shape, d.precision)}
    print_terms("checkpoint, GB", [(name, size / 1e9, "") for name, size in parts.items() if size])
    m = option.memory
    held = [*m.weights.items(), ("activations of a chunk", m.activations), ("runtime", m.other)]
    held.append((f"cache of {option.batch} sequences", option.batch * m.sequence))
    print_terms("one chip's memory, GB", [(name, size / 1e9, "") for name, size in held])
    print(f"    {m.usable / 1e9:.1f} of {chip.memory_bytes / 1e9:.0f} GB are usable; {m.sequences} sequences would fit")
    for title, terms in (("TTFT, ms", option.point.ttft), ("TPOT, ms", option.point.tpot)):
        print_terms(title, [(t.name, t.seconds * 1e3, f"{t.formula}  [{t.source}]") for t in terms])
    if chip.price:
        p = chip.price
        print(f"  price: {p.low:.2f} / {p.mid:.2f} / {p.high:.2f} dollars a chip and hour ({p.source}, {p.date})")
    else:
        print("  price: none known for this chip; --price gives one")
    print(f"  hardware: {chip.source} ({chip.date}); table of {chip.origin}")
    print("  not modelled:")
    for line in NOT_MODELLED:
        print(f"    {line}")


def print_terms(title: str, rows: list[tuple[str, float, str]]) -> None:
    """A heading and its terms: name, value, formula with source."""
    print(f"  {title}: {sum(value for _, value, _ in rows):,.2f}")
    for name, value, words in rows:
        if value:
            print(f"    {value:>10,.2f}  {name:<24} {words}".rstrip())


def show_curve(option: Option, curve: list[SimulatedLoad], router: str | None) -> None:
    """Percentiles of one replica of a layout, or of all behind a router, as the load grows."""
    price = option.fleet.decode.chip.price
    replicas = option.replicas if router else 1
    head = (
        "req/s",
        "TTFT s p50",
        "p90",
        "p99",
        "TPOT ms p50",
        "p90",
        "p99",
        "tok/s",
        "decoding",
        "in line",
        "hits",
        "$/M out",
    )
    rows = []
    for load in curve:
        ttft = (f"{load.ttft.p50:.2f}", f"{load.ttft.p90:.2f}", f"{load.ttft.p99:.2f}")
        tpot = tuple(f"{seconds * 1e3:.1f}" for seconds in (load.tpot.p50, load.tpot.p90, load.tpot.p99))
        dollars = (
            f"{price.mid * replicas * option.fleet.chips / 3600 / load.tokens_per_s * 1e6:.3f}" if price else "no price"
        )
        numbers = (f"{load.tokens_per_s:,.0f}", f"{load.batch:.0f}", f"{load.waiting:,}", f"{load.hits:.0%}", dollars)
        rows.append((f"{load.rate:.2f}", *ttft, *tpot, *numbers))
    requests = sum(load.requests for load in curve) // max(1, len(curve))
    who = f"{replicas} x {option.name} behind {router}" if router else f"one replica of {option.name}"
    print(f"\n{who}, {requests:,} random requests a line; answers carry all dollars")
    print_table(head, rows, left=())


def serving_json(
    asked: Asked, options: list[Option], refusals: list[Refusal], curve: list[SimulatedLoad]
) -> dict[str, Any]:
    """What `--json` prints for serving."""
    from dataclasses import asdict

    from tafkir.plan.advise import minimum_chips
    from tafkir.plan.calibrate import left_out_errors
    from tafkir.plan.precision import checkpoint_bytes
    from tafkir.plan.serving import NOT_MODELLED

    d = asked.deployment
    return {
        "model": asked.name,
        "hardware": chip_json(d.chip) | {"count": asked.chips},
        "precision": d.precision.name,
        "workload": asdict(asked.workload),
        "parameters": _parameters_json(d.shape),
        "checkpoint_bytes": checkpoint_bytes(d.shape, d.precision),
        "kv_bytes_per_token": d.shape.kv_bytes_per_token(d.cache_dtype_bytes),
        "minimum_chips": minimum_chips(d.shape, d.precision, d.chip),
        "coefficients": asdict(d.coefficients),
        "left_out_errors": left_out_errors(),
        "options": [_option_json(option) for option in options],
        "refused": [asdict(refusal) | {"layout": str(refusal.layout)} for refusal in refusals],
        "simulated": [asdict(load) for load in curve],
        "not_modelled": list(NOT_MODELLED),
    }


def _parameters_json(shape: ModelShape) -> dict[str, int]:
    names = ("total", "active", "active_without_input", "active_non_embedding", "embeddings", "mtp")
    return {name: getattr(shape, name) for name in names}


def _option_json(option: Option) -> dict[str, Any]:
    from dataclasses import asdict

    fleet = option.fleet
    return {
        "name": option.name,
        "layout": asdict(fleet.decode.layout),
        "prefill_layout": asdict(fleet.prompts.layout) if fleet.prompts else None,
        "prefill_workers": fleet.num_prefill,
        "replicas": option.replicas,
        "chips_per_replica": fleet.chips,
        "unused_chips": option.unused,
        "batch": option.batch,
        "tokens_per_s": option.tokens_per_s,
        "tokens_per_s_per_chip": option.tokens_per_s_per_chip,
        "point": asdict(option.point),
        "memory": asdict(option.memory) | {"sequences": option.memory.sequences},
        "cache_free": option.headroom,
        "bound_by": option.limit,
        "dollars_per_million_in": option.dollars_in,
        "dollars_per_million_out": option.dollars_out,
    }


def train_cells(option: TrainOption) -> tuple[str, ...]:
    """A layout's row in the table of training."""
    dollars = "no price"
    if option.dollars:
        dollars = "/".join(f"{level / 1e6:.3g}" for level in option.dollars)
    return (
        str(option.layout),
        f"{sum(option.memory.values()) / 1e9:.0f}",
        f"{option.tokens_per_s_per_chip:,.0f}",
        f"{option.mfu:.1%}",
        f"{option.goodput:.1%}",
        f"{option.days:,.1f}",
        f"{option.chip_hours:,.0f}",
        dollars,
    )


def chip_cells(chip: Chip) -> tuple[str, ...]:
    """A chip's row in `tafkir plan hardware`."""
    price = (
        "none"
        if chip.price is None
        else "/".join(f"{x:.2f}" for x in (chip.price.low, chip.price.mid, chip.price.high))
    )
    return (
        chip.key,
        " ".join(f"{name} {rate / 1e12:g}" for name, rate in chip.flops.items()),
        f"{chip.memory_bytes / 1e9:g}",
        f"{chip.bandwidth / 1e12:g}",
        f"{chip.link / 1e9:g}",
        f"{chip.power_w:g}",
        price,
        f"{chip.source} ({chip.date})" + ("" if chip.origin == "tafkir" else f"; {chip.origin}"),
    )


def chip_json(chip: Chip) -> dict[str, Any]:
    """A chip for `--json`."""
    from dataclasses import asdict

    return asdict(chip)


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]], *, left: tuple[int, ...]) -> None:
    """Columns as wide as their widest cell; those of `left` start at the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
