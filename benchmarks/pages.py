"""Tables of the benchmarks in the pages of docs/, between marks that name who wrote them."""

from __future__ import annotations

from pathlib import Path

from tafkir.runlog.atomic import write_text

__all__ = ["write_between"]

END = "<!-- end -->"


def write_between(page: Path, writer: str, text: str) -> None:
    """Replace what stands between `<!-- measured: written by benchmarks/WRITER.py -->` and the next end mark.

    Raises:
        SystemExit: the page lacks the marks.
    """
    begin = f"<!-- measured: written by benchmarks/{writer}.py -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no place for the table: expected {begin!r}, then {END!r}")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{END}{after}")
