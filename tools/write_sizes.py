"""How large each room of the package may be: the table of docs/structure.md, whose bounds only fall.

python tools/write_sizes.py --check  print lines, code and bound of each room, say which outgrew its bound (exit code 1)
python tools/write_sizes.py --lower  print them, lower the bounds to what is there

Lines are those of Python, C++, HTML, CSS and JavaScript; nothing bundled, no data. Code is what is left of Python's
without blank lines, comments and docstrings. A room that has to grow gets its bound by hand, in a commit that says why.
"""

from __future__ import annotations

import ast
import io
import math
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tafkir"
PAGE = ROOT / "docs" / "structure.md"
START, END = "<!-- sizes: written by tools/write_sizes.py -->\n", "<!-- end of sizes -->\n"
KINDS = {".py", ".cpp", ".h", ".html", ".css", ".js"}
STEP = 50  # bounds are multiples of this many lines
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of Python that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def measure() -> dict[str, tuple[int, int]]:
    """Lines and lines of code of each room by its name."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in sorted(PACKAGE.rglob("*")):
        parts = path.relative_to(PACKAGE).parts
        if path.suffix not in KINDS or {"vendor", "runtime"} & set(parts):
            continue
        text = path.read_text(encoding="utf-8")
        room = found[parts[0] if len(parts) > 1 else "tafkir"]
        room[0] += text.count("\n")
        room[1] += code_lines(text) if path.suffix == ".py" else 0
    return {name: (lines, code) for name, (lines, code) in sorted(found.items())}


def bounds(page: str) -> dict[str, int]:
    """The most lines of each room, as the page's table has them."""
    table = page.partition(START)[2].partition(END)[0]
    return {name: int(most.replace(",", "")) for name, most in re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", table, re.M)}


def lowered(page: str, sizes: dict[str, tuple[int, int]]) -> str:
    """The page with each bound at what its room has, where that is less."""
    before, _, rest = page.partition(START)
    old = bounds(page)
    new = {name: min(old.get(name, 1 << 30), math.ceil(lines / STEP) * STEP) for name, (lines, _) in sizes.items()}
    rows = "".join(f"| `{name}` | {most:,} |\n" for name, most in new.items())
    total = f"| all | {sum(new.values()):,} |\n"
    return f"{before}{START}\n| room | lines, at most |\n|---|---|\n{rows}{total}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    page, sizes = PAGE.read_text(encoding="utf-8"), measure()
    most = bounds(page)
    for name, (lines, code) in sizes.items():
        print(f"{name:12} {lines:7,} lines {code:7,} of code, at most {most.get(name, 0):7,}")
    total, code = (sum(column) for column in zip(*sizes.values(), strict=True))
    print(f"{'all':12} {total:7,} lines {code:7,} of code, at most {sum(most.values()):7,}")
    if "--lower" in sys.argv[1:]:
        PAGE.write_text(lowered(page, sizes), encoding="utf-8")
        return 0
    large = [name for name, (lines, _) in sizes.items() if lines > most.get(name, 0)]
    for name in large:
        print(f"error: {name} has {sizes[name][0]:,} lines, at most {most.get(name, 0):,} are allowed. Fix: take "
              "something out, or raise its bound in docs/structure.md and say why", file=sys.stderr)  # fmt: skip
    return int(bool(large))


if __name__ == "__main__":
    sys.exit(main())
