"""Memory does not grow with the checkpoint: R1's shape, small and ten times as large, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quantize_memory import Shape, write_checkpoint

SMALL = Shape(
    hidden_size=256, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=256, moe_intermediate_size=32,
    intermediate_size=640, vocab_size=2048, q_lora_rank=64, kv_lora_rank=32, num_attention_heads=8,
)  # fmt: skip


# A child's peak in the books of the system starts from its parent's, which holds torch; its own starts from nothing.
SCRIPT = """
import atexit, sys
from tafkir.cli.main import main
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024, file=sys.stderr)
atexit.register(peak)
main()
"""


def peak_mb(source: Path, out: Path, env: dict[str, str]) -> tuple[float, float]:
    """The most memory that `tafkir quantize` holds, and how many times smaller the checkpoint is after it."""
    command = [sys.executable, "-c", SCRIPT, "quantize", str(source), str(out), "--preset", "r1-fp4", "--json"]
    command += ["--workers", "2", "--shard-size", "0.05"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    return float(done.stderr.splitlines()[-1]), result["source_bytes"] / result["output_bytes"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory was held")
def test_memory_does_not_grow_with_the_checkpoint(
    native_library: Path, cli_env: dict[str, str], tmp_path: Path
) -> None:
    large = replace(SMALL, hidden_size=1024, moe_intermediate_size=64, intermediate_size=2560)
    found = {}
    for name, shape in (("small", SMALL), ("large", large)):
        size = write_checkpoint(tmp_path / name, shape, shard_bytes=60e6)
        found[name] = (
            size / 1e6,
            *peak_mb(tmp_path / name, tmp_path / f"{name}-out", cli_env | {"TAFKIR_KERNELS": "native"}),
        )
    (size, peak, _), (larger, peak_of_larger, ratio) = found["small"], found["large"]
    assert larger > 6 * size > 120
    # What a process of Python takes, the buffers of two threads, and the names of some thousand tensors.
    assert peak_of_larger < 150 and peak_of_larger - peak < 40 < larger - size, found
    # A layer for multi-token prediction in every fourth: it stays BF16, so little is saved.
    assert ratio == pytest.approx(1.0, abs=0.2)
