"""README.ar.md says what README.md says: the same commands, links, pictures and figures."""

from __future__ import annotations

import re
from collections import Counter

from tests.conftest import ROOT

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
ARABIC = (ROOT / "README.ar.md").read_text(encoding="utf-8")


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _links(text: str) -> Counter[str]:
    found = Counter(re.findall(r"\]\(([^)]+)\)", text))
    return Counter({link: count for link, count in found.items() if not link.startswith("README")})


def _table_figures(text: str) -> list[list[str]]:
    """The numbers of every table's rows, in order; a name's own digits (`GSM8K`, `r1-fp4`) among them."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"\d[\d.,]*\d|\d", row)) for row in rows]


def test_both_have_the_same_commands() -> None:
    assert _blocks(ARABIC) == _blocks(ENGLISH) != []


def test_both_lead_to_the_same_pages() -> None:
    assert _links(ARABIC) == _links(ENGLISH)
    for link in _links(ENGLISH):
        assert (ROOT / link).exists(), link


def test_both_tables_hold_the_same_figures() -> None:
    english, arabic = _table_figures(ENGLISH), _table_figures(ARABIC)
    assert len(english) == len(arabic)
    for theirs, ours in zip(english, arabic, strict=True):
        assert theirs == ours


def test_each_names_the_other_and_fits_on_a_few_screens() -> None:
    assert "(README.ar.md)" in ENGLISH and "(README.md)" in ARABIC
    assert max(ENGLISH.count("\n"), ARABIC.count("\n")) <= 200


def test_arabic_prose_runs_right_to_left_and_commands_left_to_right() -> None:
    """Prose stands inside right-to-left blocks, fenced commands outside of them."""
    depth = 0
    fenced = False
    for line in ARABIC.splitlines():
        depth += line.count('<div dir="rtl">') - line.count("</div>")
        fenced ^= line.startswith("```")
        assert depth in (0, 1)
        assert not (fenced and depth), line
        if re.search(r"[\u0600-\u06ff]", line):
            assert depth == 1 or fenced, line
    assert depth == 0 and not fenced
