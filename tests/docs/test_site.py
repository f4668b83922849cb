"""The docs site builds, with every link checked: mkdocs' strict mode ends at the first page that leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install 'tafkir[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_what_is_generated_is_there(site: Path) -> None:
    def text(name: str) -> str:
        return (site / f"{name}.html").read_text(encoding="utf-8")

    assert "icepop" in text("reference/recipe").lower() and "tafkir plan claims" in text("reference/cli")
    assert "1.2T" in text("reference/claims") and 'dir="rtl"' in text("index.ar")
    assert "sinkhorn" in text("reference/python")


def test_it_asks_nothing_of_the_network(site: Path) -> None:
    """Pictures, styles and scripts come with the site; links that a reader follows may lead out."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://[^"]+"', text), page
