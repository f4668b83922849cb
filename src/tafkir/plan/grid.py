"""Answers for every pair of model and chip that a page offers: layouts, memory, curves and cost as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tafkir.plan.advise import Option, advise, minimum_chips
from tafkir.plan.coefficients import Coefficients
from tafkir.plan.hardware import Chip
from tafkir.plan.layout import Layout
from tafkir.plan.load import predict_point
from tafkir.plan.precision import PRECISIONS, Precision
from tafkir.plan.serving import Deployment
from tafkir.plan.shapes import ModelShape
from tafkir.plan.simulate import load_curve
from tafkir.plan.workload import Workload

__all__ = ["Grid", "frontier", "grid_cells", "precision_for"]

_LAYOUTS = 6
_CURVE_POINTS = 14
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is crossed.

    Attributes:
        chips: (chip, how many; 0 for the fewest that do).
        requests: simulated at each of eight loads; 0, none.
    """

    models: Mapping[str, ModelShape]
    chips: Sequence[tuple[Chip, int]]
    workloads: Mapping[str, Workload]
    precision: Precision
    coefficients: Coefficients
    engine: str = "vllm"
    requests: int = 1500

    def __len__(self) -> int:
        return len(self.models) * len(self.chips) * len(self.workloads)


def precision_for(chip: Chip, asked: Precision) -> Precision:
    """What was asked where the chip computes in it, otherwise the smallest format without four-bit weights."""
    for precision in (asked, *(PRECISIONS[name] for name in ("fp8", "int8", "bf16", "fp32"))):
        if precision.computes in chip.flops and precision.rest_computes in chip.flops:
            return precision
    return asked


def grid_cells(grid: Grid) -> Iterator[dict[str, Any]]:
    """One cell after the other, as JSON takes it."""
    for model, shape in grid.models.items():
        for chip, count in grid.chips:
            for name, workload in grid.workloads.items():
                precision = precision_for(chip, grid.precision)
                d = Deployment(shape, chip, precision, Layout(), grid.coefficients, grid.engine)
                yield _cell(grid, d, count, workload) | {"model": model, "chip": chip.key, "workload": name}


def _cell(grid: Grid, d: Deployment, count: int, workload: Workload) -> dict[str, Any]:
    least = minimum_chips(d.shape, d.precision, d.chip)
    found: list[Option] = []
    tried = 0
    for tried in [count] if count else [size for size in _SIZES if size >= 0.75 * least][:4]:
        found = advise(d, workload, tried)[0]
        if found:
            break
    cell: dict[str, Any] = {"precision": d.precision.name, "count": tried, "least": least, "layouts": []}
    if not found:
        return cell
    cell["layouts"] = [_layout(option) for option in found[:_LAYOUTS]]
    cell["pareto"] = frontier([point for option in found for point in _curve(option, workload)])
    if grid.requests:
        cell["simulated"] = _simulated(found[0], workload, grid.requests)
        cell["simulated_layout"] = _name(found[0])
    return cell


def _name(option: Option) -> str:
    return f"{option.replicas} x {option.name}" if option.replicas > 1 else option.name


def _layout(option: Option) -> dict[str, Any]:
    memory, point = option.memory, option.point
    cache = option.batch * memory.sequence
    parts = {
        "weights": sum(memory.weights.values()),
        "cache": cache,
        "activations": memory.activations,
        "runtime": memory.other,
        "free": max(0.0, memory.free - cache),
        "reserve": option.fleet.decode.chip.memory_bytes - memory.usable,
    }
    return {
        "name": _name(option),
        "users": point.concurrency * option.replicas,
        "ttft_s": point.ttft_s,
        "tpot_s": point.tpot_s,
        "tokens_per_s": option.tokens_per_s,
        "per_chip": option.tokens_per_s_per_chip,
        "dollars_out": option.dollars_out,
        "dollars_in": option.dollars_in,
        "limit": option.limit,
        "memory": parts,
    }


def _curve(option: Option, workload: Workload) -> list[dict[str, Any]]:
    """Mean speeds from one user to as many as fit, in equal ratios."""
    most = max(1, option.memory.sequences)
    points = []
    for batch in sorted({max(1, round(most ** (i / (_CURVE_POINTS - 1)))) for i in range(_CURVE_POINTS)}):
        point = predict_point(
            option.fleet, batch, workload.prompt_tokens, workload.output_tokens, cached=workload.cached
        )
        points.append(
            {
                "layout": option.name,
                "per_user": 1 / point.tpot_s,
                "per_chip": point.tokens_per_s / option.fleet.chips,
                "users": point.concurrency,
            }
        )
    return points


def frontier(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that no other beats both in tokens a second of a user and of a chip, fastest users first."""
    kept: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (-point["per_user"], -point["per_chip"])):
        if not kept or point["per_chip"] > kept[-1]["per_chip"]:
            kept.append(point)
    return kept


def _simulated(option: Option, workload: Workload, requests: int) -> list[dict[str, Any]]:
    """One replica's percentiles at growing load, with what a million tokens of answers cost at each."""
    fleet = option.fleet
    price = fleet.decode.chip.price
    rows = []
    for load in load_curve(option, workload, requests):
        dollars = None
        if price:
            dollars = price.scaled(fleet.chips / 3600 / load.tokens_per_s * 1e6)
        rows.append(
            {
                "rate": load.rate * option.replicas,
                "ttft_s": [load.ttft.p50, load.ttft.p90, load.ttft.p99],
                "tpot_s": [load.tpot.p50, load.tpot.p90, load.tpot.p99],
                "dollars_out": dollars,
            }
        )
    return rows
