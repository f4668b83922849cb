"""Writes the map of the code in docs/structure.md: one line per file, taken from the file's own docstring.

python tools/write_structure.py          rewrite the map
python tools/write_structure.py --check  say whether it is out of date (exit code 1)
"""

from __future__ import annotations

import ast
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tafkir"
PAGE = ROOT / "docs" / "structure.md"
START, END = "<!-- map: written by tools/write_structure.py -->\n", "<!-- end of map -->\n"


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def render_map() -> str:
    """Every module of the package as a Markdown list, folder by folder."""
    files = sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.relative_to(PACKAGE).parts), path))
    parts = []
    for folder, group in groupby(files, key=lambda path: path.parent):
        members = list(group)
        name = "/".join(("tafkir", *folder.relative_to(PACKAGE).parts))
        parts.append(f"### `{name}/`\n\n{first_line(folder / '__init__.py')}\n\n")
        parts += [f"- `{path.name}`: {first_line(path)}\n" for path in members if path.name != "__init__.py"]
        parts.append("\n")
    return "".join(parts)


def updated_page() -> str:
    """The page with a fresh map between its two marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + render_map() + END + after


def main() -> int:
    fresh = updated_page()
    if "--check" in sys.argv[1:]:
        return int(fresh != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
