"""Every room of the package keeps to its bound, which a tool only lowers."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from write_sizes import PAGE, bounds, code_lines, lowered, measure


def test_rooms_keep_to_their_bounds() -> None:
    most, sizes = bounds(PAGE.read_text(encoding="utf-8")), measure()
    assert set(sizes) == set(most), "give a new room its row: python tools/write_sizes.py --lower"
    too_large = {name: lines for name, (lines, _) in sizes.items() if lines > most[name]}
    assert not too_large, "take something out, or raise the bound in docs/structure.md and say why"


def test_bounds_only_fall() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (name, bound) = next(iter(bounds(page).items()))
    assert bounds(lowered(page, {name: (bound + 1, 0)})) == {name: bound}
    assert bounds(lowered(page, {name: (bound - 120, 0)})) == {name: bound - 100}
    assert (
        lowered(page, {name: (bound + 1, 0)}).partition("<!-- end of sizes")[2]
        == page.partition("<!-- end of sizes")[2]
    )


def test_code_is_what_is_left_without_words() -> None:
    words = '"""Two\nlines."""\n\n# why\n'
    assert code_lines(words + 'x = """a\nb"""\n\n\ndef f():\n    "Says."\n    return (  # so\n        x\n    )\n') == 6
