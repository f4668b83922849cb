"""docs/structure.md lists every file with what its docstring says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_map_of_the_code_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "tools/write_structure.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `python tools/write_structure.py` and commit docs/structure.md"
