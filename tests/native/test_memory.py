"""Freed memory stays with a process that asks for it; a person's own settings count more."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
from tafkir.native.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(b"x") * 2**25
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(keep_freed_memory(), first, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_unless_the_user_has_told_glibc_otherwise(cli_env: dict[str, str]) -> None:
    def run(**more: str) -> list[str]:
        command = [sys.executable, "-c", FAULTS]
        return subprocess.run(
            command, env={**cli_env, **more}, capture_output=True, text=True, check=True
        ).stdout.split()

    told, before, after = run()
    if told == "False":
        pytest.skip("another C library")
    # 32 MiB are 8,192 pages: cleared once instead of five times.
    assert int(before) > 5 * 8000 > 2 * 8200 > int(after)
    assert run(MALLOC_TRIM_THRESHOLD_="0")[0] == "False"
