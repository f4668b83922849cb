"""docs/structure.md lists every file with what its docstring says, and names places that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("tool", ["write_structure", "write_robustness"])
def test_what_tools_write_into_pages_is_up_to_date(tool: str) -> None:
    """The map of the code, and the tables of `make crash` and `make fuzz`."""
    done = subprocess.run([sys.executable, f"tools/{tool}.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, f"run `python tools/{tool}.py` and commit docs/"


def test_what_the_page_points_at_is_there() -> None:
    places = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(places) > 30
    for file, name in places:
        body = ast.parse((ROOT / "src" / "tafkir" / file).read_text(encoding="utf-8")).body
        assert name in {getattr(node, "name", None) for node in body}, f"{file} has no {name}"


def test_a_stranger_finds_the_places_by_name_at_the_top() -> None:
    top = PAGE.partition("## Floors")[0].lower()
    for wanted in ("icepop", "sinkhorn step", "nvfp4 rounding", "block manager", "rl step", "retention interval"):
        assert wanted in top
