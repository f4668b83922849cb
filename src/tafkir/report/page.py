"""The frame of every page: one self-contained HTML file that runs no script and asks nobody for anything."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

__all__ = ["frame_page", "page_style", "plain_table"]

# Even if an escape were missed, the page could neither run a script nor reach the network.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def frame_page(title: str, body: str, *, language: str = "en") -> str:
    """A whole page around `body`, which is HTML; Arabic runs from right to left."""
    direction = ' dir="rtl"' if language == "ar" else ""
    return (
        f'<!doctype html>\n<html lang="{language}"{direction}>\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{page_style()}</style>\n</head>\n<body>\n"
        f'<div class="wrap">{body}</div>\n</body>\n</html>\n'
    )


def page_style() -> str:
    """The style sheets of reports and plans: the look that all pages share, and their own."""
    files = (("tafkir", "look.css"), ("tafkir.report", "page.css"))
    return "".join(resources.files(package).joinpath(name).read_text(encoding="utf-8") for package, name in files)


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1, wide: int | None = None) -> str:
    """A table whose first `words` columns are text and the others numbers; column `wide` may wrap.

    What follows a line break in a cell is its small print. On a phone a table scrolls by itself, by keys as well.
    """

    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="num"' if column >= words else ' class="wide"' if column == wide else ""
        figure, _, rest = text.partition("\n")
        small = f"<small>{escape(rest)}</small>" if rest else ""
        return f"<{tag}{kind}>{escape(figure)}{small}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, column, text) for column, text in enumerate(cells)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    table = f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"
    return f'<div class="table" tabindex="0">{table}</div>'
