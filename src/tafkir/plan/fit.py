"""Fit the cost model's coefficients to measurements, and say what it would have predicted of each unseen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tafkir.errors import DataError
from tafkir.plan.coefficients import ENGINES, Coefficients
from tafkir.plan.references import Reference, predict_reference

__all__ = ["PRIOR", "LeaveOneOut", "fit_coefficients", "leave_one_out", "median"]

PRIOR = Coefficients(
    bandwidth_share=0.8,
    compute_share=0.5,
    network_share=0.8,
    layer_s=100e-6,
    network_hop_s=10e-6,
    per_sequence_s=0.0,
    overlap=0.0,
    burst=0.3,
    request_s=0.08,
    first_token_steps=dict.fromkeys(ENGINES, 8.0),
    source="prior",
)
"""What one would guess before any measurement; every fitted coefficient is held near it."""

# How many octaves a coefficient may wander for the price of a relative error of one.
_FREE = ("bandwidth_share", "compute_share", "network_share", "layer_s", "burst", "request_s")
_STIFFNESS = {
    "bandwidth_share": 4.0,
    "compute_share": 2.0,
    "network_share": 2.0,
    "layer_s": 1.0,
    "burst": 0.5,
    "request_s": 0.5,
}
_ENGINE_STIFFNESS = 0.25
# An error of a factor of two counts as much as a greater one: such rows measure what the model does not contain.
_WORST = math.log(2)
_LIMITS = {"bandwidth_share": 0.95, "compute_share": 0.8, "network_share": 0.95, "burst": 1.0}


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """What a fit without this measurement (and its repetitions) says about it.

    Attributes:
        ttft_error: predicted over measured, minus one; the same for tpot_error.
    """

    reference: Reference
    ttft_s: float
    tpot_s: float

    @property
    def ttft_error(self) -> float:
        return self.ttft_s / self.reference.ttft_s - 1

    @property
    def tpot_error(self) -> float:
        return self.tpot_s / self.reference.tpot_s - 1


def median(numbers: Sequence[float]) -> float:
    """The middle number, or the mean of the two in the middle."""
    ordered = sorted(numbers)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def fit_coefficients(references: Sequence[Reference], *, source: str = "fitted") -> Coefficients:
    """The coefficients with the smallest sum of capped log errors, held near `PRIOR`.

    Rows that repeat a measurement count once together. A pattern search over the logarithms of the coefficients: they
    are few, and the cost is cheap.

    Raises:
        DataError: there is nothing to fit on.
    """
    if not references:
        raise DataError("no measurements to fit on")
    best = PRIOR
    lowest = _objective(best, references)
    stride = 0.4
    while stride > 0.02:
        improved = False
        for name in (*_FREE, *ENGINES):
            for factor in (1 + stride, 1 / (1 + stride)):
                moved = _moved(best, name, factor)
                value = _objective(moved, references)
                if value < lowest - 1e-9:
                    best, lowest, improved = moved, value, True
                    break
        if not improved:
            stride /= 2
    return replace(best, source=source)


def leave_one_out(references: Sequence[Reference]) -> list[LeaveOneOut]:
    """Predict every measurement from a fit on all others; rows that repeat it are left out with it."""
    found = []
    for reference in references:
        others = [other for other in references if other.measurement != reference.measurement]
        point = predict_reference(reference, fit_coefficients(others))
        found.append(LeaveOneOut(reference, point.ttft_s, point.tpot_s))
    return found


def _moved(coefficients: Coefficients, name: str, factor: float) -> Coefficients:
    if name in ENGINES:
        constants: Mapping[str, float] = coefficients.first_token_steps
        return replace(coefficients, first_token_steps={**constants, name: constants[name] * factor})
    value = min(_LIMITS.get(name, math.inf), getattr(coefficients, name) * factor)
    return replace(coefficients, **{name: value})


def _objective(coefficients: Coefficients, references: Sequence[Reference]) -> float:
    error = 0.0
    repeated = Counter(reference.measurement for reference in references)
    for reference in references:
        point = predict_reference(reference, coefficients)
        for predicted, measured in ((point.ttft_s, reference.ttft_s), (point.tpot_s, reference.tpot_s)):
            error += min(_WORST, abs(math.log(predicted / measured))) / repeated[reference.measurement]
    for name in _FREE:
        error += _STIFFNESS[name] * abs(math.log(getattr(coefficients, name) / getattr(PRIOR, name)))
    for engine in ENGINES:
        error += _ENGINE_STIFFNESS * abs(
            math.log(coefficients.first_token_steps[engine] / PRIOR.first_token_steps[engine])
        )
    return error
