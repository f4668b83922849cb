"""`tafkir trm watch --out`: how a model thought about one puzzle, as an animated GIF or as a page that plays it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafkir.engine.trace import Thought, Trace
from tafkir.errors import BackendUnavailable, RequestError
from tafkir.export.page import page_source, page_style
from tafkir.runlog.atomic import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["FILM_KINDS", "render_film_html", "write_film"]

FILM_KINDS = (".gif", ".html")

Colour = tuple[int, int, int]
# The page's light colours.
_PAPER, _RAISED, _INK = (250, 249, 247), (255, 255, 255), (31, 29, 26)
_LINE, _STRONG, _WALL = (227, 223, 216), (104, 99, 91), (55, 51, 46)
_ACCENT, _GOAL, _GIVEN, _QUIET = (15, 118, 110), (180, 83, 9), (246, 244, 241), (104, 99, 91)

_BOARD, _MARGIN, _FOOT = 384, 24, 56
# Drawn larger and made smaller, so that edges are smooth.
_OVER = 2
_FIRST_MS, _STEP_MS, _LAST_MS = 900, 650, 2600


def write_film(trace: Trace, path: Path | str) -> None:
    """Write a film; its kind is the file's ending.

    Raises:
        RequestError: the ending is none of `FILM_KINDS`.
        BackendUnavailable: a GIF is wanted and Pillow is missing.
        RunDirError: the place is not writable.
    """
    path = Path(path)
    if path.suffix.lower() == ".html":
        write_bytes(path, render_film_html(trace).encode())
    elif path.suffix.lower() == ".gif":
        write_bytes(path, _render_gif(trace))
    else:
        raise RequestError(f"films cannot be written as {path.suffix or path.name!r}", expected=" or ".join(FILM_KINDS))


def render_film_html(trace: Trace) -> str:
    """A page without requests that plays the steps, in English or Arabic."""
    scripts = "\n".join(page_source(name) for name in ("words.js", "board.js", "film.js"))
    html = page_source("film.html").replace("/*CSS*/", page_style())
    content = json.dumps(_recorded(trace), ensure_ascii=False).replace("</", "<\\/")
    return html.replace("/*TRACE*/", content).replace("/*JS*/", scripts.replace("</", "<\\/"))


def _recorded(trace: Trace) -> dict[str, Any]:
    """Tokens instead of signs, which is what `board.js` draws from."""
    thoughts = trace.shown()
    steps = trace.to_dict()["steps"][: len(thoughts)]
    return {
        "model": trace.model,
        "format": trace.format.model_dump(mode="json"),
        "question": trace.question.tolist(),
        "verdict": trace.verdict,
        "taken": trace.taken,
        "steps": [step | {"answer": t.answer.tolist()} for step, t in zip(steps, thoughts, strict=True)],
    }


# ---- GIF -----------------------------------------------------------------------------------------------------------


def _render_gif(trace: Trace) -> bytes:
    import io

    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        fix = "pip install 'tafkir[trm-web]', or --out x.html"
        raise BackendUnavailable("Pillow is not installed", where="tafkir trm watch --out", fix=fix) from error
    frames = list(_frames(trace))
    times = [_FIRST_MS] + [_STEP_MS] * (len(frames) - 2) + [_LAST_MS]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times[: len(frames)], loop=0)
    return buffer.getvalue()


def _frames(trace: Trace) -> Iterator[Image]:
    yield _frame(trace, None, 0)
    for number, thought in enumerate(trace.shown(), start=1):
        yield _frame(trace, thought, number)


def _frame(trace: Trace, thought: Thought | None, number: int) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = trace.format.rows, trace.format.columns
    cell = _OVER * _BOARD / max(rows, columns)
    width, height = round(cell * columns), round(cell * rows)
    margin = _OVER * _MARGIN
    board = Image.new("RGB", (width, height), _RAISED)
    (_draw_maze if trace.format.kind == "maze" else _draw_signs)(ImageDraw.Draw(board), trace, thought, cell)
    image = Image.new("RGB", (width + 2 * margin, height + 2 * margin + _OVER * _FOOT), _PAPER)
    image.paste(board, (margin, margin))
    draw = ImageDraw.Draw(image)
    draw.rectangle((margin, margin, margin + width, margin + height), outline=_LINE, width=_OVER)
    font = ImageFont.load_default(_OVER * 15)
    text = f"Step {number}" if thought else "Puzzle"
    foot = height + 2 * margin
    draw.text((margin, foot), text, _INK, font)
    if thought:
        draw.text((margin + width, foot), f"{100 * min(thought.q, 0.994):.0f} % sure", _QUIET, font, anchor="ra")
        bar = foot + _OVER * 28
        draw.rounded_rectangle((margin, bar, margin + width, bar + _OVER * 6), _OVER * 3, _LINE)
        draw.rounded_rectangle(
            (margin, bar, margin + max(_OVER * 6, width * thought.q), bar + _OVER * 6), _OVER * 3, _ACCENT
        )
    return image.resize((image.width // _OVER, image.height // _OVER), Image.Resampling.LANCZOS)


def _draw_signs(draw: ImageDraw, trace: Trace, thought: Thought | None, cell: float) -> None:
    from PIL import ImageFont

    format, font = trace.format, ImageFont.load_default(cell * 0.5)
    columns, blank = format.columns, format.blank
    for place, given in enumerate(trace.question.tolist()):
        row, column = divmod(place, columns)
        is_given = format.symbols[given] != blank if format.kind == "sudoku" else thought is None
        token = given if is_given or thought is None else int(thought.answer[place])
        sure = 1.0 if is_given or thought is None else float(thought.confidence[place])
        square = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        if is_given and format.kind == "sudoku":
            draw.rectangle(square, _GIVEN)
        elif thought is not None:
            draw.rectangle(square, _mix(_RAISED, _ACCENT, 0.22 * sure**2))
        sign = format.symbols[token]
        if sign and sign != blank:
            colour = _INK if is_given else _mix(_RAISED, _ACCENT, 0.28 + 0.72 * sure)
            draw.text(((column + 0.5) * cell, (row + 0.5) * cell), sign, colour, font, anchor="mm")
    _draw_lines(draw, trace, cell)


def _draw_lines(draw: ImageDraw, trace: Trace, cell: float) -> None:
    rows, columns = trace.format.rows, trace.format.columns
    box_rows, box_columns = trace.format.box or (rows, columns)
    for strong in (False, True):
        colour, width = (_STRONG, 2 * _OVER) if strong else (_LINE, _OVER)
        for c in range(1, columns):
            if (c % box_columns == 0) == strong:
                draw.line((c * cell, 0, c * cell, rows * cell), colour, width)
        for r in range(1, rows):
            if (r % box_rows == 0) == strong:
                draw.line((0, r * cell, columns * cell, r * cell), colour, width)


def _draw_maze(draw: ImageDraw, trace: Trace, thought: Thought | None, cell: float) -> None:
    symbols, columns = trace.format.symbols, trace.format.columns
    for place, given in enumerate(trace.question.tolist()):
        row, column = divmod(place, columns)
        middle, sign = ((column + 0.5) * cell, (row + 0.5) * cell), symbols[given]
        if sign == "#":
            draw.rectangle((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), _WALL)
        elif sign in "SG":
            draw.circle(middle, 0.32 * cell, _ACCENT if sign == "S" else _GOAL)
        elif thought is not None and symbols[int(thought.answer[place])] == "o":
            sure = float(thought.confidence[place])
            draw.circle(middle, (0.12 + 0.16 * sure) * cell, _mix(_RAISED, _ACCENT, 0.25 + 0.75 * sure))


def _mix(low: Colour, high: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue
