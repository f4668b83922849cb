"""This machine's processor as a chip: its peak and its memory's bandwidth measured on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

from tafkir.errors import BackendUnavailable
from tafkir.plan.hardware import Chip
from tafkir.runlog.rundir import cpu_model, memory_bytes

__all__ = ["measure_machine"]

# In a process of its own, because the planner knows nothing of torch: the best of a few matrix products in each number
# format, and of a few copies that no cache holds (which read once and write once).
_MEASURE = """
import json, time, torch
def best(run, repeats=5):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
    return min(times)
found = {"threads": torch.get_num_threads()}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    a, b = (torch.randn(768, 768).to(dtype) for _ in range(2))
    found[name] = 2 * 768**3 / best(lambda: a @ b)
source, target = (torch.zeros(24 << 20, dtype=torch.float32) for _ in range(2))
found["bandwidth"] = 2 * source.numel() * 4 / best(lambda: target.copy_(source), 3)
print(json.dumps(found))
"""


def measure_machine() -> Chip:
    """The processor that this runs on; takes a few seconds.

    Raises:
        BackendUnavailable: torch, which measures, cannot be imported.
    """
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BackendUnavailable(f"torch cannot measure this machine: {last}", fix="see `tafkir doctor`")
    found = json.loads(done.stdout)
    return Chip(
        key="cpu",
        name=f"{cpu_model()}, {found['threads']} threads",
        aliases=(),
        memory_bytes=float(memory_bytes()),
        bandwidth=found["bandwidth"],
        flops={"fp32": found["fp32"], "bf16": found["bf16"]},
        sparsity=1.0,
        link=found["bandwidth"],
        domain_size=1,
        network=125e6,
        power_w=100.0,
        price=None,
        source="measured: products of 768 x 768, copies of 96 MB; network and power are guesses",
        date=date.today().isoformat(),
        origin="this machine",
    )
