"""Processors by number and by NUMA node, and that a process stays on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tafkir.errors import BackendUnavailable, RecipeError
from tafkir.native.placement import parse_processors, run_on


def test_lists_and_nodes_name_processors(tmp_path: Path) -> None:
    assert parse_processors("0-3,8") == {0, 1, 2, 3, 8}
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("4-5,12\n")
    assert parse_processors("node1", tmp_path) == {4, 5, 12}
    with pytest.raises(BackendUnavailable, match=r"no NUMA node 7.*node1"):
        parse_processors("node7", tmp_path)


@pytest.mark.parametrize("text", ["", "3-1", "a", "1,,2", "-1", "0-999999"])
def test_what_names_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="names no processors"):
        parse_processors(text)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps threads on processors")
def test_threads_stay_where_they_were_told() -> None:
    last = max(os.sched_getaffinity(0))
    script = (
        "import os, threading\nfrom tafkir.native.placement import run_on\n"
        f"assert run_on('{last}') == 1\nseen = []\n"
        "thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))\n"
        "thread.start()\nthread.join()\n"
        "print(seen[0])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == f"{{{last}}}\n"
    with pytest.raises(BackendUnavailable, match="are not this process's"):
        run_on("99999")
