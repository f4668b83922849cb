"""The planner against serving speeds that were published without a table's detail: prefill and decode of large MoEs.

Writes benchmarks/results/plan_points.json. Inputs that a source leaves open are stated in `assumed`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.fit import median
from tafkir.plan.hardware import load_chips
from tafkir.plan.layout import Layout
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment, decode_step, prefill, total

RESULT = Path(__file__).resolve().parent / "results" / "plan_points.json"


@dataclass(frozen=True, slots=True)
class Published:
    """A speed: `prefill` and `decode` are tokens/s of a chip, `user` tokens/s of one user."""

    source: str
    kind: str
    value: float
    model: str
    chip: str
    precision: str
    layout: Layout
    context: float
    batch: float
    assumed: str


POINTS = (
    Published(
        "DeepSeek open-infra-index day 6", "prefill", 73_700 / 8 * (1 - 0.563), "deepseek-v3", "h800", "fp8",
        Layout(dp=32, ep=32), 4096, 2, "uncached part alone; 4,096 tokens, 2 prompts a pass",
    ),
    Published(
        "DeepSeek open-infra-index day 6", "decode", 14_800 / 8, "deepseek-v3", "h800", "fp8",
        Layout(dp=144, ep=144), 4989, 88, "batch 88 of a chip, from 21 tokens/s a user",
    ),
    Published(
        "lmsys.org 2025-05-05", "prefill", 52_300 / 8, "deepseek-v3", "h100", "fp8", Layout(dp=32, ep=32), 2048, 4,
        "4 prompts a pass",
    ),
    Published(
        "lmsys.org 2025-05-05", "decode", 22_300 / 8, "deepseek-v3", "h100", "fp8", Layout(dp=72, ep=72), 2048, 256,
        "batch 256 of a chip, 100 ms a token",
    ),
    Published(
        "lmsys.org 2025-09-25", "prefill", 26_156, "deepseek-v3", "gb200", "nvfp4", Layout(dp=4, ep=4), 2048, 8,
        "four chips, 8 prompts a pass",
    ),
    Published(
        "lmsys.org 2025-09-25", "decode", 13_386, "deepseek-v3", "gb200", "nvfp4", Layout(dp=48, ep=48), 2048, 768,
        "batch 768 of a chip",
    ),
    Published(
        "lmsys.org 2025-09-25", "prefill", 18_471, "deepseek-v3", "gb200", "fp8", Layout(dp=8, ep=8), 2048, 8,
        "eight chips, 8 prompts a pass",
    ),
    Published(
        "lmsys.org 2025-09-25", "decode", 9_087, "deepseek-v3", "gb200", "fp8", Layout(dp=48, ep=48), 2048, 768,
        "batch 768 of a chip",
    ),
    Published(
        "lmsys.org 2025-09-26 (Ant)", "prefill", 16_500 / 8, "deepseek-v3", "h20", "fp8", Layout(tp=8), 4096, 2,
        "2 prompts a pass",
    ),
    Published(
        "lmsys.org 2025-09-26 (Ant)", "decode", 5_700 / 8, "deepseek-v3", "h20", "fp8", Layout(dp=16, ep=16), 4096, 32,
        "batch 32 of a chip",
    ),
    Published(
        "Ring-flash-2.0 model card", "user", 200, "ring-flash-2.0", "h20", "fp8", Layout(tp=4), 1024, 1, "fp8, TP4",
    ),
    Published(
        "TensorRT-LLM tech blog 1, before fusing", "user", 67, "deepseek-r1", "b200", "nvfp4-v1", Layout(tp=8, ep=8),
        2048, 1, "all chips in one group",
    ),
    Published(
        "vLLM blog 2025-12-17", "decode", 2_200, "deepseek-v3", "h200", "fp8", Layout(dp=32, ep=32), 2048, 128,
        "four nodes, batch 128 of a chip",
    ),
    Published(
        "CloudMatrix384 (2506.12708)", "prefill", 6_688, "deepseek-r1", "ascend-910c", "int8", Layout(dp=16, ep=16),
        4096, 2, "16 chips of two dies each, 2 prompts a pass",
    ),
    Published(
        "CloudMatrix384 (2506.12708)", "decode", 1_943, "deepseek-r1", "ascend-910c", "int8", Layout(dp=160, ep=160),
        4096, 96, "160 chips of two dies, batch 96, no speculation",
    ),
)  # fmt: skip


def predict(point: Published) -> float:
    """In the point's own unit."""
    d = Deployment(
        find_shape(point.model),
        load_chips(own_only=True)[point.chip],
        PRECISIONS[point.precision],
        point.layout,
        fitted_coefficients(),
    )
    if point.kind == "prefill":
        seconds = total(prefill(d, point.context, prompts=int(point.batch)))
        return point.context * point.batch * point.layout.dp / seconds / point.layout.chips
    step = total(decode_step(d, point.batch, point.context))
    return 1 / step if point.kind == "user" else point.batch * point.layout.dp / step / point.layout.chips


def main() -> None:
    """Print every point, and write them."""
    rows = []
    print(f"{'source':<40} {'what':<8} {'published':>9} {'computed':>9} {'off':>6}  assumed")
    for point in POINTS:
        value = predict(point)
        off = value / point.value - 1
        print(f"{point.source:<40} {point.kind:<8} {point.value:9,.0f} {value:9,.0f} {off:+6.0%}  {point.assumed}")
        rows.append(
            {
                "source": point.source,
                "kind": point.kind,
                "model": point.model,
                "chip": point.chip,
                "published": point.value,
                "computed": value,
                "assumed": point.assumed,
            }
        )
    middle = median([abs(row["computed"] / row["published"] - 1) for row in rows])
    print(f"median error {middle:.0%} of {len(rows)} points")
    RESULT.write_text(json.dumps({"median_error": middle, "points": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
