"""Published serving measurements, as the cost model reads them: 26 rows of NVIDIA's silicon references (Apache-2.0)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tafkir.errors import DataError, RecipeError
from tafkir.plan.coefficients import ENGINES, Coefficients
from tafkir.plan.hardware import Chip, find_chip, load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.load import Fleet, Point, predict_point
from tafkir.plan.precision import find_precision
from tafkir.plan.serving import Deployment
from tafkir.plan.shapes import ModelShape, list_shapes, load_shape, shape_of
from tafkir.recipe.presets import list_presets, load_preset

__all__ = ["REFERENCES", "Reference", "find_shape", "predict_reference", "read_references"]

REFERENCES = Path(__file__).resolve().parent / "tables" / "silicon_refs" / "silicon_refs.csv"
"""The shipped rows; their licence and origin lie beside them."""

# Parts of published names that say which shape a checkpoint has, the longest match first.
_SHAPES = {
    "deepseek-v3": "deepseek-v3",
    "deepseek-r1": "deepseek-r1",
    "kimi-k2": "kimi-k2",
    "minimax-m2": "minimax-m2.5",
    "glm-5": "glm-5",
    "gpt-oss-120b": "gpt-oss-120b",
    "gpt-oss-20b": "gpt-oss-20b",
    "llama-3.1-405b": "llama-3.1-405b",
    "llama-3.1-70b": "llama-3.3-70b",
    "llama-3.3-70b": "llama-3.3-70b",
    "llama-3.1-8b": "llama-3.1-8b",
    "qwen2.5-72b": "qwen2.5-72b",
    "ring-flash": "ring-flash-2.0",
    "ling-flash": "ring-flash-2.0",
    "ring-mini": "ring-mini-2.0",
    "ling-mini": "ring-mini-2.0",
    "ring-1t": "ring-1t",
    "ling-1t": "ring-1t",
    "glm-4.5-air": "glm-4.5-air",
    "glm-4.6": "glm-4.5",
    "glm-4.7": "glm-4.5",
}
# The weights' format as the table names it; R1 in FP4 is NVIDIA's first checkpoint.
_PRECISIONS = {
    "fp8": "fp8",
    "fp4": "nvfp4-v1",
    "nvfp4": "nvfp4-v1",
    "mxfp4": "nvfp4-v1",
    "w4a16": "w4a16",
    "": "bf16",
    "bf16": "bf16",
    "fp16": "bf16",
    "int8": "int8",
}


@dataclass(frozen=True, slots=True)
class Reference:
    """One measurement.

    Attributes:
        fields: the row as it stands in the table.
        ttft_s: measured, seconds. tpot_s: measured, seconds.
    """

    fields: Mapping[str, str]
    ttft_s: float
    tpot_s: float

    @property
    def name(self) -> str:
        return self.fields["id"]

    @property
    def measurement(self) -> tuple[str, float, float]:
        """The same for rows that repeat one measurement under another name."""
        return self.fields["system"], self.ttft_s, self.tpot_s


def _launched(fields: Mapping[str, str]) -> tuple[int, int]:
    """Steps between looks for new requests, and tokens handed out together, as the rows' own launch scripts set them.

    SemiAnalysisAI/InferenceX, benchmarks/single_node: on Blackwell SGLang gets `--scheduler-recv-interval 30` from 16
    users on and 10 below, and `--stream-interval 30` in FP8 and 10 in FP4 (dsr1_fp8_b200.sh, dsr1_fp4_b300.sh,
    qwen3.5_fp8_b200.sh); DeepSeek on H200 the latter with 10 alone (dsr1_fp8_h200.sh). Others have the defaults.
    """
    if fields["backend"] != "sglang" or fields["mode"] != "agg":
        return 1, 1
    if fields["system"][:4] in ("b200", "b300"):
        return (30 if _size(fields, "batch_size") >= 16 else 10), (10 if "fp4" in fields["precision"] else 30)
    deepseek_on_h200 = fields["system"].startswith("h200") and "deepseek" in fields["model_path"].lower()
    return 1, (10 if deepseek_on_h200 else 1)


def read_references(path: Path = REFERENCES) -> list[Reference]:
    """The rows of a table.

    Raises:
        DataError: the file is missing, or a measured time is no positive number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError("no such table", where=str(path)) from None
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            ttft, tpot = (float(row[f"silicon_{name}_ms"]) / 1e3 for name in ("ttft", "tpot"))
        except (KeyError, TypeError, ValueError):
            raise DataError("no measured times", where=f"{path}:{number}", expected="silicon_ttft_ms, ..") from None
        if ttft <= 0 or tpot <= 0:
            raise DataError("a measured time is not positive", where=f"{path}:{number}")
        found.append(Reference(row, ttft, tpot))
    return found


@cache
def _chips() -> Mapping[str, Chip]:
    return load_chips(own_only=True)


@cache
def find_shape(name: str) -> ModelShape:
    """The shape of a published checkpoint, by the name that hubs and tables give it (`deepseek-ai/DeepSeek-R1`).

    Raises:
        RecipeError: its shape is not known.
    """
    known = [*list_presets(), *list_shapes()]
    plain = name.rpartition("/")[2].lower()
    if "distill" in plain or plain.startswith("glm-4.7-flash"):
        raise RecipeError("it is another model than its name begins with", where=name, fix="name its shape")
    exact = sorted((key for key in known if plain.startswith(key)), key=len)
    parts = sorted((part for part in _SHAPES if part in plain), key=len)
    key = exact[-1] if exact else _SHAPES[parts[-1]] if parts else None
    if key is None:
        raise RecipeError("its shape is not known", where=name, expected=f"one of {', '.join(known)}")
    return load_shape(key) if key in list_shapes() else shape_of(load_preset(key), key)


def predict_reference(reference: Reference, coefficients: Coefficients) -> Point:
    """What the cost model says to a row. Caches are taken to be bfloat16, prompts not to be cached, routing even.

    Raises:
        RecipeError: the row's model, chip, engine or layout is not known; the message says which.
    """
    fields = reference.fields
    shape = find_shape(fields["model_path"])
    chip = find_chip(fields["system"], _chips())
    if fields["precision"] not in _PRECISIONS:
        raise RecipeError(f"precision {fields['precision']!r} is not known", where=reference.name)
    precision = find_precision(_PRECISIONS[fields["precision"]])
    if precision.computes == "fp4" and ("fp4" not in chip.flops or shape.name.startswith("gpt-oss")):
        # Four-bit weights on chips without such units, and gpt-oss's MXFP4 experts, are multiplied in bfloat16.
        precision = find_precision("w4a16")
    chip.peak(precision.computes)
    engine = fields["backend"]
    if engine not in ENGINES:
        raise RecipeError(f"engine {engine!r} is not known", where=reference.name, expected=", ".join(ENGINES))

    def deployment(prefix: str) -> Deployment:
        d = Deployment(shape, chip, precision, _layout(fields, prefix), coefficients, engine)
        poll, stream = _launched(fields)
        return replace(d, poll_steps=poll, stream_steps=stream)

    if fields["mode"] == "disagg":
        fleet = Fleet(
            deployment("decode_"),
            _size(fields, "decode_num_workers"),
            deployment("prefill_"),
            _size(fields, "prefill_num_workers"),
        )
        batch = _size(fields, "decode_batch_size")
    else:
        fleet, batch = Fleet(deployment("")), _size(fields, "batch_size")
    return predict_point(fleet, batch, _size(fields, "isl"), _size(fields, "osl"))


def _layout(fields: Mapping[str, str], prefix: str) -> Layout:
    tp, pp, dp, ep = (
        _size(fields, f"{prefix}{name}") for name in ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size")
    )
    return Layout(tp=tp, pp=pp, dp=dp, ep=ep)


def _size(fields: Mapping[str, str], name: str) -> int:
    """A count of the row; what is left empty or zero is one."""
    try:
        return max(1, int(float(fields.get(name) or 1)))
    except ValueError:
        raise RecipeError(f"{name} is {fields[name]!r}", where=fields["id"], expected="a number") from None
